"""`solotune train`: the whole run, in order.

    prepare_run   settle, check, read the data, plan, load the model, try the largest step: nothing is written yet
    _train      record what is known, train, save the adapter, evaluate, diagnose, seal

The stages of `prepare_run` and what is recorded before the first step are in `setup`; the loop is in `training`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from solotune.api.evaluate import compare
from solotune.api.types import ConfigSource
from solotune.config.run_config import Choice, RunConfig, load_config
from solotune.display.observer import Observers, Resilient, RunObserver
from solotune.display.progress import Display, PlainDisplay, SilentDisplay, make_console
from solotune.errors import InterruptedRunError, RunNote
from solotune.hardware import device_memory
from solotune.run.atomic_io import LogFile, whole_folder
from solotune.run.events import DeviceFailedEvent, EndEvent
from solotune.run.record import RunRecord
from solotune.run.run_dir import LOG, STACKS, RunDirectory
from solotune.run.run_log import RunLog

if TYPE_CHECKING:
    from solotune.api.setup import PreparedRun
    from solotune.evaluation.compare import Evaluation
    from solotune.model.loading import TrainableModel


@dataclass(frozen=True)
class TrainResult:
    run_dir: Path
    summary: dict[str, Any]
    choices: list[Choice]
    evaluation: Evaluation | None

    def to_json(self) -> dict[str, Any]:
        return {
            "run": str(self.run_dir),
            **self.summary,
            "choices": [choice._asdict() for choice in self.choices],
            "evaluation": self.evaluation.to_json() if self.evaluation else None,
        }


def train(
    config: ConfigSource, overrides: Iterable[str] = (), resume: bool = False, display: Display | None = None
) -> TrainResult:
    """The whole run: settle the config, prepare the data, load, train, save the adapter, evaluate base against tuned.

    Args:
        resume: continue the run in `output_dir`, or else the newest run of this config; one that was killed before its
            first checkpoint starts anew.

    Raises:
        SolotuneError: see `solotune.errors`; each kind has its exit code.
    """
    from solotune.hardware import doctor
    from solotune.runtime import signals

    checked = load_config(config, overrides)
    doctor.require_torch()
    heard = Resilient(display or SilentDisplay())
    with signals.handle_signals():
        try:
            return _train(checked, resume, heard)
        except signals.StopRequested as stop:
            problem = f"stopped while {heard.stage}; nothing to save yet"
            raise InterruptedRunError(stop.number, problem, "start it again") from None


def prepare_run(config: RunConfig, resume: bool, display: RunObserver) -> PreparedRun:
    """Everything that may refuse a run, in the order of what it costs to ask; nothing is written yet."""
    from solotune.api import setup
    from solotune.diagnosis.sources import solotune_run
    from solotune.training import trained_run

    checked, machine, choices = trained_run.resolve_for_machine(config)
    model_files = setup.check(checked, machine, resume)
    tokenizer, prepared, findings = setup.read_data(checked, model_files, resume, display)
    planned = setup.plan(checked, model_files, machine, prepared, display)
    checked = planned.resolved
    model = setup.load_model(checked, model_files, machine, tokenizer, prepared, resume, display)
    tried = setup.try_largest_step(checked, model, prepared, display)
    choices = [*choices, *planned.choices, *model.choices]
    run_facts = solotune_run.from_prepared(checked, tokenizer, prepared, findings, model_files)
    return setup.PreparedRun(
        checked, machine, choices, model_files, tokenizer, prepared, planned, model, tried, run_facts
    )


def _train(config: RunConfig, resume: bool, heard: Resilient) -> TrainResult:
    from solotune.api import setup
    from solotune.diagnosis import message
    from solotune.diagnosis.monitor import Monitor
    from solotune.hardware.gpu_errors import device_failure
    from solotune.runtime import signals, watchdog
    from solotune.training import checkpoint, loop
    from solotune.training.resume import fingerprints, open_run

    ready = prepare_run(config, resume, heard)
    checked, prepared, model = ready.config, ready.prepared, ready.model
    marks = fingerprints(checked, prepared, ready.machine, ready.model_files)
    run, start = open_run(checked, marks, resume)  # nothing is written before all that can be refused was seen
    log = LogFile(run.path / LOG)
    watchdog.stacks_into(run.path / STACKS)
    try:
        written = PlainDisplay(checked.logging_steps, make_console(cast(TextIO, log)))
        display = Observers(heard, Resilient(written))
        display.note(f"run directory: {run.path}")
        display.choices(ready.choices)
        summary = setup.write_initial_files(run, ready, marks, start, display)
        monitor = Monitor(model, ready.run_facts, Observers(RunLog(run), display), RunRecord.read(run.path))
        observer = Observers(display, Resilient(monitor))
        point = start.point if start else None
        with signals.defer_signals():
            tuned = loop.train(model, prepared.train, prepared.validation, checked, run, observer, point, marks)
            _write_adapter(run, model, checked, ready.tokenizer)
        result = None
        if prepared.validation:
            display.phase("comparing base and tuned on held-out rows")
            result = compare(model, ready.tokenizer, prepared, checked, tuned, display)
            run.write_json("evaluation.json", result.to_json())
        peak_bytes = device_memory.peak_bytes(model.device)
        measured = {"peak_bytes": peak_bytes, **RunRecord.read(run.path).medians()}
        run.write_json("plan.json", {**ready.plan_json(), "measured": measured})
        run.log(EndEvent(summary["total_steps"], peak_bytes))
        found = monitor.diagnosis()
        run.write_json("diagnosis.json", found.to_json())
        display.note(f"diagnosis by rules alone: {message.summary(found)}")
        log.close()
        run.write_manifest()
        return TrainResult(run.path, summary, ready.choices, result)
    except signals.StopRequested as stop:
        if not run.adapter.is_dir():
            raise
        problem = f"stopped while {heard.stage}; the adapter is saved"
        raise InterruptedRunError(
            stop.number, problem, f"compare it with its base: solotune evaluate {run.path}"
        ) from None
    except Exception as error:
        error.add_note(RunNote(run.path))  # where the command line writes a bug's traceback
        if failure := device_failure(error, checked, run.path, checkpoint.newest(run.checkpoints)):
            seen = None if failure.seen is None else str(failure.seen)
            Observers(RunLog(run), heard).failed(DeviceFailedEvent(failure.problem, seen))
            raise failure from error
        raise
    finally:
        log.close()
        run.release()


def _write_adapter(run: RunDirectory, model: TrainableModel, config: RunConfig, tokenizer: Any) -> None:
    from solotune.model import lora
    from solotune.model.adapter import Adapter

    with whole_folder(run.adapter) as folder:
        peft_config = lora.peft_config(config, model.lora_layers, model.module)
        Adapter(peft_config, lora.state_dict(model.lora_layers)).write(folder)
        for name, content in _tokenizer_files(tokenizer):
            folder.write(name, content)


def _tokenizer_files(tokenizer: Any) -> Iterator[tuple[str, bytes]]:
    """(name, content) of what transformers writes of a tokenizer; it writes by itself, so elsewhere at first."""
    with tempfile.TemporaryDirectory(prefix="solotune-") as scratch:
        tokenizer.save_pretrained(scratch)
        for path in sorted(path for path in Path(scratch).rglob("*") if path.is_file()):
            yield path.relative_to(scratch).as_posix(), path.read_bytes()
