"""What a run directory of ours holds, read as it is: finished, crashed, unfinished, resumed, torn, with NaN."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from solotune import __version__, checkpoint
from solotune.config import RunConfig, load_config
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.subject import Saved, Trace
from solotune.errors import InputError, SolotuneError
from solotune.record import RunDirectory
from solotune.resume import day_of

MAX_JSON_BYTES = 256 << 20  # the state of a long training by Trainer has some megabytes
Events = Sequence[Mapping[str, Any]]


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


def summary(events: Events) -> dict[str, Any]:
    """What the run counted when it began."""
    start = [event for event in events if event.get("event") == "start"]
    keys = ("train_rows", "validation_rows", "trainable_parameters")
    return {key: start[-1][key] for key in keys if start and isinstance(start[-1].get(key), int)}


def findings(run: RunDirectory) -> list[Finding]:
    """What the data door said when the run began, where the rows are not here any more."""
    found = json_of(run.path / "data.json").get("findings")
    return [finding for one in found or () if (finding := Finding.from_json(one)) is not None]


def json_of(path: Path | None) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    try:
        if path is None or path.stat().st_size > MAX_JSON_BYTES:
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def saved_of(folder: Path) -> Saved | None:
    """The adapter of a folder, ours or PEFT's; None where there is none that can be read."""
    try:
        tensors = checkpoint.read_adapter(folder)
    except SolotuneError:
        return None
    has_state = (folder / "state.json").is_file()
    optimizer = (folder / "optimizer.safetensors").is_file() if has_state else None
    return Saved(tensors, json_of(folder / "adapter_config.json"), optimizer, optimizer)


def trace_of(events: Events) -> Trace:
    """The events of metrics.jsonl as arrays; its log's errors, and the steps after which it was resumed."""
    steps = [event for event in events if event.get("event") == "step" and isinstance(event.get("step"), int)]
    evals = [event for event in events if event.get("event") == "eval" and isinstance(event.get("step"), int)]
    resumed = [event.get("step") for event in events if event.get("event") == "resume"]
    totals = [event["total_steps"] for event in steps if isinstance(event.get("total_steps"), int)]
    return Trace(
        step_S=np.array([event["step"] for event in steps], np.int64),
        loss_S=column(steps, "loss"),
        learning_rate_S=column(steps, "learning_rate"),
        grad_norm_S=column(steps, "grad_norm"),
        epoch_S=column(steps, "epoch"),
        eval_step_E=np.array([event["step"] for event in evals], np.int64),
        eval_loss_E=column(evals, "loss"),
        total_steps=totals[-1] if totals else None,
        is_finished=any(event.get("event") == "end" for event in events),
        errors=_errors(events),
        seams=tuple(step for step in resumed if isinstance(step, int)),
    )


def column(entries: Events, key: str) -> np.ndarray:
    """float64, NaN where an entry has no number under this key."""
    return np.array([_float(entry.get(key)) for entry in entries], float)


def _float(value: Any) -> float:
    try:
        return math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError):
        return math.nan


def _errors(events: Events) -> tuple[str, ...]:
    """What ended the run, as it is recorded: a device that failed, a step that was not finite."""
    found = []
    for event in events:
        if event.get("event") == "device_failed":
            found.append(f"{event.get('problem')}: {event.get('seen')}")
        if event.get("event") == "non_finite":
            found.append(f"step {event.get('step')}: not finite: {event.get('seen')}")
    return tuple(found)
