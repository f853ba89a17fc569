"""Read the files of a run directory in any state: finished, crashed, unfinished, resumed, torn, with NaN."""

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
    """The config of a run.

    Raises:
        InputError: config.yaml has keys or values that this version does not know.
    """
    path = run.path / "config.yaml"
    try:
        ranks = json_of(run.path / "environment.json").get("world_size")
        return load_config(path).on_ranks(ranks if type(ranks) is int and ranks > 1 else 1)
    except InputError as error:
        made_by = json_of(run.path / "environment.json").get("solotune")
        raise InputError(
            f"{path}: solotune {__version__} cannot read the config of this run",
            seen=error.problem,
            change=f"use solotune {made_by}, which wrote it"
            if made_by not in (None, __version__)
            else "the file was changed after the run, or another version wrote it; check with solotune verify",
        ) from None


def day(run: RunDirectory) -> Any:
    """The date that its templates printed; None if it is not recorded."""
    with contextlib.suppress(SolotuneError):
        return day_of(run.path)
    return None


def newest_adapter(run: RunDirectory) -> Path | None:
    """The folder of the final adapter, else of the newest checkpoint; None if nothing was saved."""
    return run.adapter if run.adapter.is_dir() else checkpoint.newest(run.checkpoints)


def summary(record: RunRecord) -> dict[str, Any]:
    """Counts from the start event of the run: rows, trainable parameters, ranks of a run on several GPUs."""
    keys = ("train_rows", "validation_rows", "trainable_parameters", "world_size")
    counts = {key: getattr(record.start, key, None) for key in keys}
    return {key: count for key, count in counts.items() if count is not None}


def findings(record: RunRecord) -> list[Finding]:
    """Findings in data.json, from the start of the run; for runs whose rows are gone."""
    found = (record.data or {}).get("findings")
    entries = found if isinstance(found, list) else []
    return [finding for one in entries if (finding := Finding.from_json(one)) is not None]


def json_of(path: Path | None) -> dict[str, Any]:
    """A JSON object; empty if it is missing or cannot be read."""
    return (json_object(path) if path is not None else None) or {}


def saved_of(folder: Path) -> Saved | None:
    """The adapter of a folder of solotune or PEFT; None if it is missing or cannot be read."""
    try:
        tensors = adapter_tensors(folder)
    except SolotuneError:
        return None
    has_state = (folder / "state.json").is_file()
    optimizer = (folder / "optimizer.safetensors").is_file() if has_state else None
    return Saved(tensors, json_of(folder / "adapter_config.json"), optimizer, optimizer)


def trace_of(record: RunRecord) -> Trace:
    """The events of a run as arrays, its errors, and the steps after which it was resumed."""
    return replace(
        curves(record.steps, record.evals),
        total_steps=record.total_steps,
        is_finished=record.is_finished,
        errors=tuple(_in_words(failure) for failure in record.failures),
        seams=record.resumed_steps,
    )


def curves(steps: Sequence[StepEvent], evals: Sequence[EvalEvent]) -> Trace:
    """Steps and evaluations as arrays; total steps, state and errors stay unset."""
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


def continued(before: Trace, after: Trace) -> Trace:
    """Two parts of a curve as one; what is not an array is the first part's."""
    arrays = [name for name, value in vars(before).items() if isinstance(value, np.ndarray)]
    return replace(before, **{name: np.concatenate([getattr(before, name), getattr(after, name)]) for name in arrays})


def _in_words(failure: NonFiniteEvent | DeviceFailedEvent) -> str:
    """A failure event as one line."""
    if isinstance(failure, DeviceFailedEvent):
        return f"{failure.problem}: {failure.seen}"
    return f"step {failure.step}: not finite: {failure.seen}"


def column(entries: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """float64; NaN for entries without a number under this key."""
    return np.array([_float(entry.get(key)) for entry in entries], float)


def _float(value: Any) -> float:
    try:
        return math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
