"""`solotune train`: a whole run, step by step.

    prepare_run   resolve the config, check, read the data, plan, load the model, try the largest step; writes nothing
    _train        record, train, save the adapter, evaluate, diagnose, write report.html and the manifest

The stages of `prepare_run` and the files written before the first step are in `setup`; the loop is `training.loop`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from solotune.api.evaluate import compare
from solotune.api.python_config import config_of
from solotune.api.report import rewrite_page
from solotune.api.types import ConfigSource, Overrides
from solotune.config.run_config import Choice, RunConfig
from solotune.display.notebook import showing
from solotune.display.observer import Observers, Resilient, RunObserver
from solotune.display.progress import Display, PlainDisplay, make_console
from solotune.errors import InterruptedRunError, RunNote, program
from solotune.result_repr import ResultRepr, Table
from solotune.run.atomic_io import LogFile, whole_folder
from solotune.run.events import DeviceFailedEvent, EndEvent
from solotune.run.history import history_of
from solotune.run.record import RunRecord
from solotune.run.run_dir import LOG, STACKS, RunDirectory
from solotune.run.run_log import RunLog
from solotune.runtime.library_noise import quiet_libraries

if TYPE_CHECKING:
    from pandas import DataFrame

    from solotune.api.setup import PreparedRun
    from solotune.diagnosis.evidence import Diagnosis
    from solotune.evaluation.compare import Evaluation
    from solotune.evaluation.scores import Score


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

    Raises:
        InputError: config, data or model cannot be used.
        CheckError: the machine is not fit, the run does not fit in memory, or a fault is certain before the first step
            and `allow_faults` does not name it. Nothing is written.
        DirectoryInUseError: `output_dir` has a run already, or another process writes there.
        IntegrityError: with `resume`, data, base or config are not those of the run.
        NonFiniteError: loss, gradient or weights became NaN or infinite.
        DeviceError: the GPU failed, or its memory is full.
        StorageError: a file cannot be written.
        InterruptedRunError: the run was stopped; `change` says how to continue.
    """
    checked = config_of(config, overrides, keys)
    from solotune.hardware import doctor
    from solotune.runtime import signals

    doctor.require_torch()
    with showing(display, checked.logging_steps, stays=True) as chosen, signals.handle_signals():
        user_display = Resilient(chosen)
        try:
            return _train(checked, resume, user_display)
        except signals.StopRequested as stop:
            problem = f"stopped while {user_display.stage}; there is nothing to save yet"
            raise InterruptedRunError(stop.number, problem, "start it again") from None


def prepare_run(config: RunConfig, resume: bool, display: RunObserver) -> PreparedRun:
    """Do everything that may refuse a run, the cheapest checks first. Nothing is written yet.

    Raises:
        SolotuneError: the run cannot start.
    """
    from solotune.api import setup
    from solotune.diagnosis import certain_faults
    from solotune.diagnosis.sources import solotune_run
    from solotune.training import resume as resuming
    from solotune.training import trained_run

    certain_faults.allowed_codes(config)  # before anything takes long
    checked, machine, choices = trained_run.resolve_for_machine(config)
    checked, kept = resuming.keep_micro_batch(checked, resuming.continued(checked.output_dir) if resume else None)
    model_files = setup.check(checked, machine, resume)
    tokenizer, prepared, findings = setup.read_data(checked, model_files, resume, display)
    plan = setup.plan(checked, model_files, machine, prepared, display)
    checked = plan.resolved
    run_facts = solotune_run.from_prepared(checked, tokenizer, prepared, findings, model_files)
    rules = setup.stop_before_harm(checked, run_facts, resume, display)
    model_files = setup.fetch_weights(model_files, display)
    model = setup.load_model(checked, model_files, machine, tokenizer, prepared, resume, display)
    preflight = setup.try_largest_step(checked, model, prepared, display)
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
        run_facts=run_facts,
        rules=rules,
    )


def _train(config: RunConfig, resume: bool, user_display: Resilient) -> TrainResult:
    """Prepare, open the run directory, record, train, save, evaluate, diagnose, write report and manifest."""
    from solotune.api import setup
    from solotune.diagnosis.monitor import Monitor
    from solotune.hardware.gpu_errors import device_failure
    from solotune.runtime import signals, watchdog
    from solotune.trackers.observer import Trackers
    from solotune.training import checkpoint, loop
    from solotune.training.resume import fingerprints, open_run, run_to_continue, which_run

    if resume:
        config = run_to_continue(config)
        user_display.note(which_run(config))
    ready = prepare_run(config, resume, user_display)
    config, prepared, model = ready.config, ready.prepared, ready.model
    run_fingerprints = fingerprints(config, prepared, ready.machine, ready.model_files)
    run, resume_point = open_run(config, run_fingerprints, resume)  # only now is something written
    log = LogFile(run.path / LOG)
    watchdog.stacks_into(run.path / STACKS)
    display = Observers(user_display, Resilient(_log_display(log, config.logging_steps)))
    trackers = Trackers(config.trackers, run.path, display.note)
    try:
        display.note(f"run directory: {run.path}")
        display.choices(ready.choices)
        summary = setup.write_initial_files(run, ready, run_fingerprints, resume_point, display)
        told = Observers(RunLog(run), display)
        monitor = Monitor(model, ready.run_facts, told, RunRecord.read(run.path), ready.rules)
        observer = Observers(display, Resilient(trackers), Resilient(monitor))
        start = resume_point.point if resume_point else None
        with signals.defer_signals():
            tuned_score = loop.train(
                model, prepared.train, prepared.validation, config, run, observer, start, run_fingerprints
            )
            _write_adapter(run, ready)

        evaluation = _evaluate(run, ready, tuned_score, display) if prepared.validation else None
        _record_measurements(run, ready)
        _write_diagnosis(run, monitor.diagnosis(), display)
        trackers.close("finished")
        rewrite_page(run, display, is_over=True)
        log.close()
        run.write_manifest()
        return TrainResult(run.path, summary, ready.choices, evaluation)
    except signals.StopRequested as stop:
        if not run.adapter.is_dir():
            raise
        problem = f"stopped while {user_display.stage}; the adapter is saved"
        change = f"compare it with its base model: {program()} evaluate {run.path}"
        raise InterruptedRunError(stop.number, problem, change) from None
    except Exception as error:
        error.add_note(RunNote(run.path))  # the command line writes a bug's traceback to this run's log
        if failure := device_failure(error, config.memory, run.path, checkpoint.newest(run.checkpoints)):
            seen = None if failure.seen is None else str(failure.seen)
            Observers(RunLog(run), user_display).failed(DeviceFailedEvent(failure.problem, seen))
            raise failure from error
        raise
    finally:
        run.release()
        trackers.close("failed")  # nothing if it is closed
        log.close()


def _log_display(log: LogFile, logging_steps: int) -> PlainDisplay:
    """What log.txt gets: the lines of a run, as in a pipe."""
    return PlainDisplay(logging_steps, make_console(cast(TextIO, log), is_log=True))


def _evaluate(run: RunDirectory, ready: PreparedRun, tuned_score: Score | None, display: RunObserver) -> Evaluation:
    display.phase("comparing base and tuned on held-out rows")
    settings = ready.config.evaluation
    result = compare(ready.model, ready.tokenizer, ready.prepared, settings, tuned_score, display)
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
