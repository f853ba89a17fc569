"""The process that sends one run to one tracker: `observer.py` starts it, and nothing imports it.

    python -P tracker_process.py wandb RUN_DIR RESUMED_STEP     stdin: how the run ended; closed without a word: killed

It reads metrics.jsonl as it grows (`run.tail`), so it may be slow, and a step that it has not sent yet is still in the
file. What it has to say stands in RUN_DIR/trackers/NAME.json: the run's id there, where it is to be seen, the last
step that was sent, and what went wrong.

Each call of the library has CALL_SECONDS; then the kernel ends this process (SIGALRM), even if the call holds Python's
global lock. Signals of the terminal do not reach it: it has a session of its own.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from solotune.config.secrets import without_secrets
from solotune.errors import StorageError
from solotune.run.atomic_io import json_text, make_folder, write_whole
from solotune.run.events import EvalEvent, Event, StepEvent
from solotune.run.record import RunRecord, json_object, number_in
from solotune.run.run_dir import TRACKERS
from solotune.run.tail import MetricsTail
from solotune.trackers.libraries import LIBRARIES, Status, TrackedRun, Tracker
from solotune.units import first_line

CALL_SECONDS = 300  # one call of a library
POLL_SECONDS = 1.0
LONGEST_VALUE = 500  # characters of a config value
NICENESS = 10  # the run has the processor first


@dataclass
class Report:
    """What `observer.py` reads."""

    path: Path
    id: str
    where: str = ""
    step: int = 0
    problem: str = ""
    is_finished: bool = False

    def write(self) -> None:
        content = {"id": self.id, "where": self.where, "step": self.step, "problem": self.problem}
        with contextlib.suppress(StorageError):  # a full disk is for the run to report
            write_whole(self.path, json_text({**content, "finished": self.is_finished}))


def main(name: str, run_dir: Path, resumed_step: int | None) -> int:
    """Send the run until it ends; returns the exit code."""
    folder = run_dir / TRACKERS
    make_folder(folder)
    before = json_object(folder / f"{name}.json") if resumed_step is not None else None
    known = (before or {}).get("id")
    if not isinstance(known, str):
        known, resumed_step = uuid.uuid4().hex[:12], None
    report = Report(folder / f"{name}.json", known)
    try:
        tracker = LIBRARIES[name].make()
        config = flat(RunRecord(run_dir, ()).config or {})
        with limited():
            report.id, report.where = tracker.start(config, TrackedRun(run_dir.name, known, folder, resumed_step))
        report.where = without_secrets(report.where)
        report.write()
        send(tracker, run_dir, resumed_step or 0, report)
        report.is_finished = True
    except BaseException as error:  # libraries raise SystemExit too
        report.problem = without_secrets(first_line(error, with_type=True))
    report.write()
    return 1 if report.problem else 0


def send(tracker: Tracker, run_dir: Path, after: int, report: Report) -> None:
    """Log the steps after `after` until the run ends, then finish."""
    tail, status = MetricsTail(run_dir), None
    while True:
        status = status or ended(POLL_SECONDS)  # before the file is read: then nothing comes after it
        while events := tail.poll().events:
            for event in events:
                if not isinstance(event, (StepEvent, EvalEvent)):
                    continue
                is_old = event.step < after or (event.step == after and isinstance(event, StepEvent))
                if is_old or not (values := values_of(event)):
                    continue
                with limited():
                    tracker.log(event.step, values)
                report.step = event.step
        if status is not None:
            break
    if status == "finished" and (values := results(run_dir)):
        with limited():
            tracker.log(report.step, values)
    with limited():
        tracker.finish(status)


def ended(seconds: float, orders: int = 0) -> Status | None:
    """How the run ended; None if it did not within these seconds.

    Args:
        orders: the file descriptor where the run says it; it is closed without a word if the run's process is gone.
    """
    ready, _, _ = select.select([orders], [], [], seconds)
    if not ready:
        return None
    word = os.read(orders, 64).decode(errors="replace").strip()
    return cast(Status, word) if word in ("finished", "failed") else "killed"


@contextmanager
def limited() -> Iterator[None]:
    """End this process if the block takes longer than CALL_SECONDS."""
    signal.setitimer(signal.ITIMER_REAL, CALL_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def values_of(event: Event) -> dict[str, float]:
    """The numbers of a step or an evaluation that trackers get; those that are not finite are left out."""
    found: dict[str, float] = {}
    if isinstance(event, StepEvent):
        found = {
            "train/loss": event.loss,
            "train/learning_rate": event.learning_rate,
            "train/grad_norm": event.grad_norm,
            "train/epoch": event.epoch,
            "train/token_accuracy": event.token_accuracy,
            "train/tokens_per_second": event.tokens_per_second,
            "train/step_seconds": event.step_seconds,
            "train/peak_gib": event.peak_bytes / 2**30,
        }
    elif isinstance(event, EvalEvent):
        found = {"eval/loss": event.loss, "eval/stderr": event.stderr, "eval/exact_match": event.exact_match}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def results(run_dir: Path) -> dict[str, float]:
    """Base against tuned, at the end of the run."""
    evaluation = RunRecord(run_dir, ()).evaluation
    keys = {"eval/base_loss": ("base", "loss"), "eval/tuned_loss": ("tuned", "loss")}
    keys["eval/p_value"] = ("difference", "p_value")
    found = {name: number_in(evaluation, *path) for name, path in keys.items()}
    return {name: value for name, value in found.items() if value is not None}


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as trackers take it: numbers, and texts that are not too long."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, (bool, int, float)):
            found[key] = value
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
            found[key] = without_secrets(text)[:LONGEST_VALUE]
    return found


if __name__ == "__main__":
    os.nice(NICENESS)
    arguments = sys.argv[1:]
    sys.exit(main(arguments[0], Path(arguments[1]), int(arguments[2]) if len(arguments) > 2 else None))
