"""`solotune train`: a whole run, step by step.

    prepare_run   resolve the config, check, read the data, plan, load the model, try the largest step; writes nothing
    _lead         record, train, save the adapter, evaluate, diagnose, write report.html and the manifest
    _take_part    in place of _lead on ranks other than 0, which write nothing (`ranks`): train

The stages of `prepare_run` and the files written before the first step are in `setup`; the loop is `training.loop`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from solotune.api import ranks
from solotune.api.evaluate import compare
from solotune.api.python_config import config_of
from solotune.api.report import rewrite_page
from solotune.api.types import ConfigSource, Overrides
from solotune.config.run_config import Choice, RunConfig
from solotune.display.notebook import showing
from solotune.display.observer import Observers, Resilient, RunObserver, SilentObserver
from solotune.display.progress import Display, PlainDisplay, SilentDisplay, make_console
from solotune.errors import (
    DeviceError,
    InterruptedRunError,
    RankError,
    RunNote,
    SolotuneError,
    program,
    resume_command,
)
from solotune.result_repr import ResultRepr, Table
from solotune.run.atomic_io import LogFile, append_line, whole_folder
from solotune.run.events import DeviceFailedEvent, EndEvent
from solotune.run.history import history_of
from solotune.run.record import RunRecord
from solotune.run.run_dir import LOG, STACKS, RunDirectory
from solotune.run.run_log import RunLog
from solotune.runtime import rank_processes
from solotune.runtime.heartbeat import RankLost, rank_error
from solotune.runtime.library_noise import quiet_libraries
from solotune.runtime.world import ALONE, World, joined

if TYPE_CHECKING:
    from pandas import DataFrame

    from solotune.api.setup import PreparedRun
    from solotune.diagnosis.evidence import Diagnosis
    from solotune.evaluation.compare import Evaluation
    from solotune.evaluation.scores import Score
    from solotune.runtime.signals import StopRequested


@dataclass(frozen=True, repr=False)
class TrainResult(ResultRepr):
    """Result of `train`."""

    run_dir: Path
    summary: dict[str, Any]  # rows, steps and parameters, as in the start event
    choices: list[Choice]  # settings that solotune chose, and why
    evaluation: Evaluation | None  # base compared with tuned; None without held-out rows

    @property
    def history(self) -> DataFrame:
        """The run's steps and evaluations as a pandas DataFrame, one row for each step: see `history_of`.

        Raises:
            CheckError: pandas is not installed.
        """
        return history_of(RunRecord.read(self.run_dir))

    def figures(self) -> dict[str, object]:
        compared = self.evaluation.figures() if self.evaluation else {}
        names = ("base_loss", "tuned_loss", "base_exact_match", "tuned_exact_match")
        steps = self.summary["total_steps"]
        return {"run_dir": self.run_dir, "steps": steps, **{name: compared.get(name) for name in names}}

    def tables(self) -> Iterable[Table]:
        return self.evaluation.tables() if self.evaluation else ()

    def to_json(self) -> dict[str, Any]:
        return {
            "run": str(self.run_dir),
            **self.summary,
            "choices": [choice._asdict() for choice in self.choices],
            "evaluation": self.evaluation.to_json() if self.evaluation else None,
        }


@quiet_libraries()
def train(
    config: ConfigSource, overrides: Overrides = (), resume: bool = False, display: Display | None = None, **keys: Any
) -> TrainResult:
    """Train an adapter and compare it with its base model; everything is saved in one run directory.

        result = solotune.train("run.yaml", learning_rate=1e-4)
        print(result.run_dir, result.evaluation.to_json()["tuned"])

    Args:
        config: path of a YAML file, a mapping of keys, or a `RunConfig`.
        overrides: `key=value` strings, or a mapping of keys, that replace values of the config.
        resume: continue the run in `output_dir`, or else the newest run of this config. A run that was killed before
            its first checkpoint starts again from step 0.
        display: shows progress. The default is one updating cell in a notebook, and nothing in a script;
            `solotune.display.progress.SilentDisplay()` shows nothing.
        keys: keys of the config; they win. `dataset` and `eval_dataset` may be a list of rows or a `datasets.Dataset`.

    Ctrl-C, or the stop button of a notebook, saves a checkpoint at the next step; the error says how to continue.

    Started by torchrun in several processes, it trains on their GPUs together: rank 0 writes and shows everything.

    Raises:
        InputError: config, data or model cannot be used; or the ranks differ.
        CheckError: the machine is not fit, the run does not fit in memory, or a fault is certain before the first step
            and `allow_faults` does not name it. Nothing is written.
        DirectoryInUseError: `output_dir` has a run already, or another process writes there.
        IntegrityError: with `resume`, data, base or config are not those of the run.
        NonFiniteError: loss, gradient or weights became NaN or infinite.
        DeviceError: the GPU failed, or its memory is full.
        StorageError: a file cannot be written.
        InterruptedRunError: the run was stopped; `change` says how to continue.
        RankError: another rank failed, died or hangs; `change` says how to continue.
    """
    world = World.of_environment(os.environ)
    rank_processes.begin(os.environ)
    with ranks.failing_together(world):
        checked = config_of(config, overrides, keys).on_ranks(world.size)
    from solotune.hardware import doctor
    from solotune.runtime import signals

    doctor.require_torch()
    display = display if world.is_owner else SilentDisplay()
    with showing(display, checked.logging_steps, stays=True) as chosen, signals.handle_signals():
        user_display = Resilient(chosen)
        if words := ranks.alone_under_srun(os.environ):
            user_display.note(words)
        with joined(world, ranks.departure_of, user_display.note):
            resume = resume or world.restarts > 0
            try:
                ranks.start(world, checked, resume)
                if note := ranks.note_of_other_gpus(world, checked, config, overrides, resume):
                    user_display.note(note)
                return _train(checked, resume, user_display, world)
            except signals.StopRequested as stop:
                raise _stopped_early(world.why(stop), user_display.stage) from None


def _stopped_early(stop: StopRequested, stage: str) -> SolotuneError:
    """The error of a run that is stopped before there is anything to save."""
    if isinstance(stop, RankLost):
        return rank_error(stop.lost, None, "start all ranks again")
    what = f"{stop.sender}stopped while {stage}; there is nothing to save yet"
    return InterruptedRunError(stop.number, what, "start it again")


def _stopped_outside_loop(stop: StopRequested, stage: str, run: RunDirectory) -> SolotuneError | None:
    """The error of a run that is stopped before or after its steps; None: a signal has come, and nothing is saved."""
    is_saved = run.adapter.is_dir()
    change = f"compare it with its base model: {program()} evaluate {run.path}"
    if isinstance(stop, RankLost):
        how = change if is_saved else f"continue with: {resume_command(run.path)}"
        return rank_error(stop.lost, "the adapter is saved" if is_saved else None, how)
    what = f"{stop.sender}stopped while {stage}; the adapter is saved"
    return InterruptedRunError(stop.number, what, change) if is_saved else None


def prepare_run(config: RunConfig, resume: bool, display: RunObserver, world: World = ALONE) -> PreparedRun:
    """Do everything that may refuse a run, the cheapest checks first. Nothing is written yet.

    Raises:
        SolotuneError: the run cannot start.
    """
    from solotune.api import setup
    from solotune.diagnosis import certain_faults
    from solotune.diagnosis.sources import solotune_run
    from solotune.model.sharded_blocks import require_ranks
    from solotune.training import trained_run
    from solotune.training.resume import fingerprints

    certain_faults.allowed_codes(config)  # before anything takes long
    require_ranks(config, world.machines)
    checked, machine, choices = trained_run.resolve_for_machine(config)
    checked, kept = ranks.keep_micro_batch(world, checked, resume)
    machine = machine.shared_by(len(world.local_ranks))
    model_files = setup.check(checked, machine, resume, world)
    day = world.broadcast(lambda: setup.rendering_day(checked, resume))
    with world.one_after_another():
        tokenizer, prepared, findings = setup.read_data(checked, model_files, day, display)
    ranks.require_rows(world, checked, prepared)
    plan = setup.plan(checked, model_files, machine, prepared, display, len(world.local_ranks))
    checked = ranks.with_plan_of_rank_0(world, checked, plan.resolved)
    run_facts = solotune_run.from_prepared(checked, tokenizer, prepared, findings, model_files)
    is_begun = world.broadcast(lambda: setup.goes_on(checked, resume))
    rules = setup.stop_before_harm(checked, run_facts, is_begun, display)
    model_files = setup.fetch_weights(model_files, display)
    run_fingerprints = fingerprints(checked, prepared, machine, model_files)
    ranks.require_same_run(world, run_fingerprints)  # before ranks share one base
    model = setup.load_model(checked, model_files, machine, tokenizer, prepared, resume, display, world)
    preflight = setup.try_largest_step(checked, model, prepared, display, world)
    return setup.PreparedRun(
        config=checked,
        machine=machine,
        choices=[*choices, *kept, *plan.choices, *model.choices],
        model_files=model_files,
        tokenizer=tokenizer,
        prepared=prepared,
        plan=plan,
        model=model,
        preflight=preflight,
        fingerprints=run_fingerprints,
        run_facts=run_facts,
        rules=rules,
    )


def _train(config: RunConfig, resume: bool, user_display: Resilient, world: World) -> TrainResult:
    """Prepare the run; then lead it, or take part in it."""
    from solotune.training.resume import which_run

    if resume:
        config = ranks.run_to_continue(world, config)
        user_display.note(which_run(config))
    try:
        ready = prepare_run(config, resume, user_display, world)
    except DeviceError:
        ranks.raise_if_lost(world, config)
        raise
    if world.is_owner:
        return _lead(ready, resume, user_display, world)
    return _take_part(ready, world)


def _lead(ready: PreparedRun, resume: bool, user_display: Resilient, world: World) -> TrainResult:
    """Open the run directory, record, train, save, evaluate, diagnose, write report and manifest."""
    from solotune.api import setup
    from solotune.diagnosis.monitor import Monitor
    from solotune.hardware.gpu_errors import device_failure
    from solotune.runtime import signals, watchdog
    from solotune.trackers.observer import Trackers
    from solotune.training import checkpoint, loop
    from solotune.training.resume import open_run

    config, rows, model, run_fingerprints = ready.config, ready.prepared, ready.model, ready.fingerprints
    run, resume_point = open_run(config, run_fingerprints, resume)  # only now is something written
    log = LogFile(run.path / LOG)
    watchdog.stacks_into(run.path / STACKS)
    display = Observers(user_display, Resilient(_log_display(log, config.logging_steps)))
    trackers = Trackers(config.trackers, run.path, display.note)
    try:
        display.note(f"run directory: {run.path}")
        display.choices(ready.choices)
        summary = setup.write_initial_files(run, ready, run_fingerprints, resume_point, display)
        listeners = Observers(RunLog(run), display)
        monitor = Monitor(model, ready.run_facts, listeners, RunRecord.read(run.path), ready.rules)
        observer = Observers(display, Resilient(trackers), Resilient(monitor))
        _, start = ranks.share_start(world, run.path, resume_point)
        with signals.defer_signals():
            tuned_score = loop.train(
                model, rows.train, rows.validation, config, run, observer, start, run_fingerprints, world
            )
            if model.shared is None:
                world.disconnect()
            _write_adapter(run, ready)
        evaluation = _evaluate(run, ready, tuned_score, display, world)
        _record_measurements(run, ready)
        _write_diagnosis(run, monitor.diagnosis(), display)
        trackers.close("finished")
        rewrite_page(run, display, is_over=True)
        log.close()
        run.write_manifest()
        return TrainResult(run.path, summary, ready.choices, evaluation)
    except signals.StopRequested as stop:
        if (stopped := _stopped_outside_loop(world.why(stop), user_display.stage, run)) is None:
            raise
        raise stopped from None
    except RankError as error:
        _keep_traceback(error, run)
        raise
    except Exception as error:
        error.add_note(RunNote(run.path))  # the command line writes a bug's traceback to this run's log
        if failure := device_failure(error, config.memory, run.path, saved := checkpoint.newest(run.checkpoints)):
            ranks.raise_if_lost(world, config, run.path, saved)
            seen = None if failure.seen is None else str(failure.seen)
            Observers(RunLog(run), user_display).failed(DeviceFailedEvent(failure.problem, seen))
            raise failure from error
        raise
    finally:
        run.release()
        trackers.close("failed")  # nothing if it is closed
        log.close()


def _take_part(ready: PreparedRun, world: World) -> TrainResult:
    """Train as a rank that writes nothing."""
    from solotune.api import setup
    from solotune.hardware.gpu_errors import device_failure
    from solotune.runtime import signals
    from solotune.training import loop

    config, rows = ready.config, ready.prepared
    path, point = ranks.share_start(world, Path(), None)
    run = RunDirectory(path)
    observer = Resilient(SilentObserver())
    try:
        with signals.defer_signals():
            loop.train(
                ready.model, rows.train, rows.validation, config, run, observer, point, ready.fingerprints, world
            )
            if ready.model.shared is not None:
                ready.model.shared.close()  # rank 0 reads this rank's part until it has compared base and tuned
            world.disconnect()
    except signals.StopRequested as stop:
        if isinstance(lost := world.why(stop), RankLost):
            raise rank_error(lost.lost, None, f"continue with: {resume_command(run.path)}") from None
        raise
    except Exception as error:
        if failure := device_failure(error, config.memory, run.path):
            ranks.raise_if_lost(world, config, run.path)
            raise failure from error
        raise
    return TrainResult(run.path, setup.summary(ready), ready.choices, None)


def _keep_traceback(error: RankError, run: RunDirectory) -> None:
    """Write the traceback of a bug on another rank to the run's log; the command line says where it is."""
    if error.traceback:
        append_line(run.path / LOG, error.traceback)
        error.add_note(RunNote(run.path))


def _log_display(log: LogFile, logging_steps: int) -> PlainDisplay:
    """What log.txt gets: the lines of a run, as in a pipe."""
    return PlainDisplay(logging_steps, make_console(cast(TextIO, log), is_log=True))


def _evaluate(
    run: RunDirectory, ready: PreparedRun, tuned_score: Score | None, display: RunObserver, world: World
) -> Evaluation | None:
    """Compare base and tuned, if there are held-out rows; the last that reads the base."""
    model, settings, result = ready.model, ready.config.evaluation, None
    if ready.prepared.validation:
        display.phase("comparing base and tuned on held-out rows")
        result = compare(model, ready.tokenizer, ready.prepared, settings, tuned_score, display)
    if model.shared is not None:
        model.shared.close()  # the others are still there, so what was computed was computed with their parts
        world.disconnect()
    if result is not None:
        run.write_json("evaluation.json", result.to_json())
    return result


def _record_measurements(run: RunDirectory, ready: PreparedRun) -> None:
    """Write measured memory and time next to the plan's, then the end event."""
    from solotune.hardware import device_memory

    peak_bytes = device_memory.peak_bytes(ready.model.device)
    record = RunRecord.read(run.path)
    measured = {"peak_bytes": peak_bytes, **record.medians()}
    run.write_json("plan.json", {**ready.plan_json(), "measured": measured})
    run.log(EndEvent(record.last_step, peak_bytes))


def _write_diagnosis(run: RunDirectory, diagnosis: Diagnosis, display: RunObserver) -> None:
    from solotune.diagnosis import message

    run.write_json("diagnosis.json", diagnosis.to_json())
    display.note(
        f"diagnosis: {message.summary(diagnosis)} (model probes not run; solotune diagnose {run.path} runs them)"
    )


def _write_adapter(run: RunDirectory, ready: PreparedRun) -> None:
    from solotune.dataset.chat.tokenizer import saved_files
    from solotune.model import lora
    from solotune.model.adapter import Adapter

    config, model = ready.config, ready.model
    with whole_folder(run.adapter) as folder:
        base, revision = config.model_name_or_path, config.model_revision
        peft_config = lora.peft_config(config.lora, model.lora_layers, model.module, base=base, revision=revision)
        Adapter(peft_config, lora.state_dict(model.lora_layers)).write(folder)
        for name, content in saved_files(ready.tokenizer):
            folder.write(name, content)
