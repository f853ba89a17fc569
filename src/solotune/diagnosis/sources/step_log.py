"""`StepLog`: the logged steps of one run, from any log, under transformers' names.

    log = of_entries("jsonl", file, [{"current_steps": 5, "loss": 2.4, "lr": 1e-4}, ...])
    best([log, other])          the log to use
    trace_of(log)               as the rules read it

If several runs were appended to one file, the last one counts; a run that continues from a checkpoint stays one run,
with a seam.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from solotune.diagnosis.run_facts import Trace
from solotune.diagnosis.sources import run_files
from solotune.run.events import MAX_INT

_ALIASES = {
    "lr": "learning_rate", "gradnorm": "grad_norm", "gradient_norm": "grad_norm", "val_loss": "eval_loss",
    "valid_loss": "eval_loss", "validation_loss": "eval_loss", "current_steps": "step", "global_step": "step",
    "training_loss": "loss", "total_steps": "of_steps", "max_steps": "of_steps",
}  # fmt: skip
_KEPT = {"step", "loss", "learning_rate", "grad_norm", "epoch", "eval_loss", "of_steps"}


Entry = dict[str, Any]


@dataclass(frozen=True)
class StepLog:
    """The logged steps of one run."""

    kind: str
    file: Path
    entries: Sequence[Entry]
    """With `step`, and any of loss, learning_rate, grad_norm, epoch, eval_loss."""
    total_steps: int | None = None
    is_finished: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    """As the tracker recorded them, with the trainer's names."""
    text: str = ""
    """Console output beside it, where its errors are."""
    num_runs: int = 1
    """Runs in this file or folder; the entries are those of the last."""
    seams: tuple[int, ...] = ()
    num_others: int = 0
    """Logs of the same kind beside it, of earlier runs."""

    @property
    def num_steps(self) -> int:
        return sum("loss" in entry for entry in self.entries)


def best(logs: Sequence[StepLog]) -> StepLog | None:
    """The first log with a loss; None if there is none.

    A trainer that crashed leaves the state of its last checkpoint: another log of the same run, which goes further, is
    then the better one.
    """
    with_steps = [log for log in logs if log.num_steps]
    if not with_steps:
        return None
    first = with_steps[0]
    if first.kind != "state" or first.is_finished:
        return first
    last = first.entries[-1]["step"]
    return next((log for log in with_steps[1:] if log.entries[-1]["step"] > last and _is_same_run(first, log)), first)


def _is_same_run(one: StepLog, other: StepLog) -> bool:
    """Whether both logs have the same losses at the same steps."""
    losses = ({e["step"]: number for e in log.entries if (number := _number(e.get("loss"))) is not None}
              for log in (one, other))  # fmt: skip
    mine, theirs = losses
    shared = mine.keys() & theirs.keys()
    return bool(shared) and all(math.isclose(mine[step], theirs[step], rel_tol=0.01) for step in shared)


def trace_of(log: StepLog, errors: tuple[str, ...] = ()) -> Trace:
    """The log as arrays."""
    steps = [entry for entry in log.entries if "loss" in entry]
    evals = [entry for entry in log.entries if "eval_loss" in entry]
    return Trace(
        step_S=np.array([entry["step"] for entry in steps], np.int64),
        loss_S=run_files.column(steps, "loss"),
        learning_rate_S=run_files.column(steps, "learning_rate"),
        grad_norm_S=run_files.column(steps, "grad_norm"),
        epoch_S=run_files.column(steps, "epoch"),
        eval_step_E=np.array([entry["step"] for entry in evals], np.int64),
        eval_loss_E=run_files.column(evals, "eval_loss"),
        total_steps=log.total_steps,
        is_finished=log.is_finished,
        errors=errors,
        seams=log.seams,
    )


NO_STEPS = StepLog("none", Path(), ())
"""Of a run that logged nothing but errors."""


def of_entries(
    kind: str, file: Path, found: Iterable[Mapping[str, Any]], settings: Any = None, is_finished: bool = False
) -> StepLog | None:
    """The log of entries under any names; None if none has a loss."""
    entries, order, total = [], 0, None
    for one in found:
        entry = _normal(one)
        if "loss" not in entry and "eval_loss" not in entry:
            continue
        order += 1
        step = entry.get("step")
        if not isinstance(step, (int, float)) or not math.isfinite(step) or abs(step) > MAX_INT:
            step = order
        of_steps = entry.pop("of_steps", None)
        total = int(of_steps) if isinstance(of_steps, (int, float)) and 0 < of_steps <= MAX_INT else total
        entries.append({**entry, "step": int(step)})
    if not entries:
        return None
    entries, num_runs, seams = _last_run(entries)
    last = entries[-1]["step"]
    return StepLog(
        kind,
        file,
        entries,
        total,
        is_finished or (total is not None and 0 < total <= last),
        settings if isinstance(settings, Mapping) else {},
        num_runs=num_runs,
        seams=seams,
    )


def _normal(one: Mapping[str, Any]) -> Entry:
    """An entry under transformers' names, without `train/`; numbers alone."""
    entry: Entry = {}
    for key, value in one.items():
        if key == "global_step/max_steps" and isinstance(value, str) and re.fullmatch(r"\d{1,12}/\d{1,12}", value):
            entry["step"], entry["of_steps"] = map(int, value.split("/"))
            continue
        name = re.sub(r"^(?:train|training)/", "", str(key))
        name = re.sub(r"^(?:eval|val|valid|validation)/(?:.*_)?loss$", "eval_loss", name)
        name = _ALIASES.get(name, name)
        if name in _KEPT and (number := _number(value)) is not None:
            entry.setdefault(name, number)
    return entry


def _number(value: Any) -> float | int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and len(value) > 40:
        return None
    try:
        return value if isinstance(value, (int, float)) else float(value)
    except ValueError:
        return None


def _last_run(entries: list[Entry]) -> tuple[list[Entry], int, tuple[int, ...]]:
    """(entries of the last run, number of runs, steps at which it was continued). A step back to the start of a run
    begins another; a step back to a later place continues the same run from a checkpoint."""
    current: list[Entry] = []
    seams: list[int] = []
    num_runs = 1
    for entry in entries:
        if current and entry["step"] < current[-1]["step"]:
            if entry["step"] <= current[0]["step"]:
                current, seams, num_runs = [], [], num_runs + 1
            else:
                while current and current[-1]["step"] >= entry["step"]:
                    current.pop()
                seams.append(current[-1]["step"] if current else 0)
        current.append(entry)
    return current, num_runs, tuple(seams)


def is_step(value: Any) -> TypeGuard[int]:
    return type(value) is int and abs(value) <= MAX_INT
