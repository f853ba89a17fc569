"""The curves of a run, small enough to be sent in a mail: of a long run the lowest and highest value of each bucket.

    curves("runs/demo")                  {"next": 24106, "last_step": 60, "series": {"loss": {"steps", "values"}, ...}}
    curves("runs/demo", since=24106)     what was logged after that byte of metrics.jsonl

Every point is a step that was logged: nothing is averaged away, so a spike of one step out of 200,000 is drawn at its
height and can be read off. A value that is NaN or infinite is null, which leaves a gap. A page that stays open asks
again with `next`; `restarted` says that the file is shorter than `since` (a resumed run cuts it back), so that these
are all points, not only new ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from solotune.run.events import DiagnosedEvent, EvalEvent, Event, NonFiniteEvent, ResumeEvent, StepEvent
from solotune.run.record import METRICS, RunRecord, lines_since

MAX_BUCKETS = 6_000
"""A bucket becomes two points. A chart has some 1,000 pixels: it can be zoomed 6 times before points are left out."""
SMOOTHED = ("loss", "grad_norm", "step_seconds")
"""Curves that jump from step to step: each has an average beside it."""
DIGITS = 6  # significant digits of a value: more than a chart shows
OF_STEPS = ("loss", "learning_rate", "grad_norm", "token_accuracy", "step_seconds", "tokens_per_second", "peak_bytes")


def curves(run_dir: str | Path, since: int = 0) -> dict[str, Any]:
    """The curves of the run in a folder, from a byte of metrics.jsonl on; without points if there are none. `findings`:
    how many the monitor wrote since."""
    record, found = read_run(run_dir, since)
    return {**found, "findings": len(record.of(DiagnosedEvent))}


def read_run(run_dir: str | Path, since: int = 0) -> tuple[RunRecord, dict[str, Any]]:
    """The record of a run and its curves, from one reading of metrics.jsonl."""
    path = Path(run_dir) / METRICS
    restarted = since > (path.stat().st_size if path.is_file() else 0)
    lines, after = lines_since(path, 0 if restarted else since)
    record = RunRecord(Path(run_dir), tuple(lines))
    return record, {**of_events(record.events), "next": after, "restarted": restarted}


def of_events(events: Sequence[Event]) -> dict[str, Any]:
    """The curves of these events: a step that was logged twice counts as it was logged last."""
    steps = {event.step: event for event in events if isinstance(event, StepEvent)}
    ordered = [steps[number] for number in sorted(steps)]
    numbers = np.array([event.step for event in ordered], np.int64)
    columns = {name: np.array([_known(event, name) for event in ordered], np.float64) for name in OF_STEPS}
    columns |= {f"smoothed_{name}": smoothed(columns[name]) for name in SMOOTHED}
    series = {}
    for name, values in columns.items():
        kept = bucket_extremes(columns[name.removeprefix("smoothed_")])  # an average is drawn at the steps of its curve
        if np.isfinite(values).any():
            series[name] = {"steps": numbers[kept].tolist(), "values": _rounded(values[kept])}
    evals = {event.step: event for event in events if isinstance(event, EvalEvent)}
    if evals:
        scores = [evals[number] for number in sorted(evals)]
        series["held_out"] = {
            "steps": [score.step for score in scores],
            "values": _rounded([score.loss for score in scores]),
            "stderr": _rounded([score.stderr for score in scores]),
        }
    return {
        "last_step": int(numbers[-1]) if len(numbers) else 0,
        "series": series,
        "resumed": sorted({event.step for event in events if isinstance(event, ResumeEvent)}),
        "non_finite": sorted(
            {event.step for event in events if isinstance(event, NonFiniteEvent)}
            | {event.step for event in ordered if not (math.isfinite(event.loss) and math.isfinite(event.grad_norm))}
        )[:MAX_BUCKETS],
    }


def bucket_extremes(values: np.ndarray, buckets: int = MAX_BUCKETS) -> np.ndarray:
    """The places to keep of a long curve: of each bucket the lowest and highest value, and the first non-finite one.

    Args:
        values: float64 (N,).

    Returns:
        int64 (M,), ascending; all places if there are at most two for each bucket.
    """
    if len(values) <= 2 * buckets:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    edges = np.linspace(0, len(values), buckets + 1).astype(int)
    is_finite = np.isfinite(values)
    for begin, end in pairwise(edges):
        finite = begin + np.flatnonzero(is_finite[begin:end])
        if len(finite):
            kept |= {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}
        if len(finite) < end - begin:
            kept.add(int(begin + np.flatnonzero(~is_finite[begin:end])[0]))
    return np.array(sorted(kept))


def smoothed(values: np.ndarray) -> np.ndarray:
    """Exponential moving average over about a fiftieth of the run (at least 5 steps), from the first value on.

    It starts as a plain mean, so that the first value has no more weight than others; NaN is passed over.
    """
    weight = 2 / (max(5, len(values) / 50) + 1)
    found, mean, total = np.full(len(values), np.nan), 0.0, 0.0
    for place, value in enumerate(values.tolist()):
        if math.isfinite(value):
            mean, total = (1 - weight) * mean + weight * value, (1 - weight) * total + weight
            found[place] = mean / total
    return found


def _known(event: StepEvent, name: str) -> float:
    """0 stands for memory that was not recorded."""
    value = float(getattr(event, name))
    return math.nan if name == "peak_bytes" and value == 0 else value


def _rounded(values: Sequence[float] | np.ndarray) -> list[float | None]:
    return [float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None for value in values]
