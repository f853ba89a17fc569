"""What a run directory of ours holds, read as it is: finished, crashed, unfinished, resumed, torn, with NaN."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from solotune.config.load import load_config
from solotune.config.run_config import RunConfig
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.run_facts import Saved, Trace
from solotune.errors import InputError, SolotuneError
from solotune.model.adapter import adapter_tensors
from solotune.run.events import DeviceFailedEvent, EvalEvent, NonFiniteEvent, StepEvent
from solotune.run.record import RunRecord, json_object
from solotune.run.run_dir import RunDirectory
from solotune.training import checkpoint
from solotune.training.resume import day_of
from solotune.version import __version__


def recorded(run: RunDirectory) -> RunConfig:
    path = run.path / "config.yaml"
    try:
        return load_config(path)
    except InputError as error:
        made_by = json_of(run.path / "environment.json").get("solotune")
        raise InputError(
            f"{path}: solotune {__version__} cannot read the config of this run",
            seen=error.problem,
            change=f"solotune {made_by} wrote it; use that version"
            if made_by not in (None, __version__)
            else "the file was changed since its run, or another version wrote it; solotune verify tells",
        ) from None


def day(run: RunDirectory) -> Any:
    with contextlib.suppress(SolotuneError):
        return day_of(run.path)
    return None


def newest_adapter(run: RunDirectory) -> Path | None:
    return run.adapter if run.adapter.is_dir() else checkpoint.newest(run.checkpoints)


def summary(record: RunRecord) -> dict[str, Any]:
    """What the run counted when it began."""
    keys = ("train_rows", "validation_rows", "trainable_parameters")
    counts = {key: getattr(record.start, key, None) for key in keys}
    return {key: count for key, count in counts.items() if count is not None}


def findings(record: RunRecord) -> list[Finding]:
    """What the data door said when the run began, where the rows are not here any more."""
    found = (record.data or {}).get("findings")
    entries = found if isinstance(found, list) else []
    return [finding for one in entries if (finding := Finding.from_json(one)) is not None]


def json_of(path: Path | None) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    return (json_object(path) if path is not None else None) or {}


def saved_of(folder: Path) -> Saved | None:
    """The adapter of a folder, ours or PEFT's; None where there is none that can be read."""
    try:
        tensors = adapter_tensors(folder)
    except SolotuneError:
        return None
    has_state = (folder / "state.json").is_file()
    optimizer = (folder / "optimizer.safetensors").is_file() if has_state else None
    return Saved(tensors, json_of(folder / "adapter_config.json"), optimizer, optimizer)


def trace_of(record: RunRecord) -> Trace:
    """The events of a run as arrays; its log's errors, and the steps after which it was resumed."""
    return replace(
        curves(record.steps, record.evals),
        total_steps=record.total_steps,
        is_finished=record.is_finished,
        errors=tuple(_in_words(failure) for failure in record.failures),
        seams=record.resumed_steps,
    )


def curves(steps: Sequence[StepEvent], evals: Sequence[EvalEvent]) -> Trace:
    """Steps and evaluations as arrays, and nothing else of the run."""
    return Trace(
        step_S=np.array([event.step for event in steps], np.int64),
        loss_S=np.array([event.loss for event in steps], float),
        learning_rate_S=np.array([event.learning_rate for event in steps], float),
        grad_norm_S=np.array([event.grad_norm for event in steps], float),
        epoch_S=np.array([event.epoch for event in steps], float),
        eval_step_E=np.array([event.step for event in evals], np.int64),
        eval_loss_E=np.array([event.loss for event in evals], float),
        total_steps=None,
        is_finished=False,
    )


def _in_words(failure: NonFiniteEvent | DeviceFailedEvent) -> str:
    """What ended the run."""
    if isinstance(failure, DeviceFailedEvent):
        return f"{failure.problem}: {failure.seen}"
    return f"step {failure.step}: not finite: {failure.seen}"


def column(entries: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """float64, NaN where an entry has no number under this key."""
    return np.array([_float(entry.get(key)) for entry in entries], float)


def _float(value: Any) -> float:
    try:
        return math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError):
        return math.nan
