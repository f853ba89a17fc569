"""`solotune watch`: the live view of a run from another terminal, from its files alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solotune.diagnosis.catalogue import FAULTS
from solotune.display.notebook import showing
from solotune.display.observer import RunObserver
from solotune.display.progress import Display
from solotune.display.run_follower import RunFollower, State
from solotune.errors import CheckError, DeviceError, InputError, NonFiniteError, program, resume_command
from solotune.result_repr import ResultRepr
from solotune.run.events import DeviceFailedEvent, DiagnosedEvent, NonFiniteEvent
from solotune.run.record import RunRecord, number_in
from solotune.run.run_dir import METRICS, RunDirectory, located
from solotune.units import format_bytes, plus_minus

POLL_SECONDS = 0.5
LOGGING_STEPS = 25  # until the run's config is there


@dataclass(frozen=True, repr=False)
class WatchedRun(ResultRepr):
    """Result of `watch`: how the run ended."""

    run_dir: Path
    status: State  # finished, or gone: its process ended before the run did
    step: int
    total_steps: int
    problem: str  # what ended a run that is not finished
    exit_code: int
    """0; 3: the diagnosis found a fault, or the process is gone; 6: NaN or infinite values; 7: the GPU failed."""

    def figures(self) -> dict[str, object]:
        shown = {"run": self.run_dir, "status": self.status, "steps": f"{self.step:,}/{self.total_steps:,}"}
        return {**shown, "problem": self.problem or None, **self._record_in_words()}

    def facts(self) -> dict[str, str]:
        """What the command line prints: the figures, and how to go on."""
        shown = {"run": str(self.run_dir), "status": f"{self.status}, step {self.step:,} of {self.total_steps:,}"}
        if self.status == "finished":
            return {**shown, **self._record_in_words(), "next": f"{program()} chat {self.run_dir} --base"}
        problem = {"problem": self.problem} if self.problem else {}
        return {**shown, **problem, **self._record_in_words(), "continue": _resume_command(self.run_dir)}

    def to_json(self) -> dict[str, Any]:
        record = RunRecord(self.run_dir, ())
        return {
            "run": str(self.run_dir),
            "status": self.status,
            "step": self.step,
            "total_steps": self.total_steps,
            "problem": self.problem or None,
            "exit_code": self.exit_code,
            "evaluation": record.evaluation,
            "diagnosis": (record.diagnosis or {}).get("verdict"),
        }

    def _record_in_words(self) -> dict[str, str]:
        """Held-out loss, diagnosis, memory and time, each if the run's files have it."""
        record = RunRecord(self.run_dir, ())
        found: dict[str, str] = {}
        losses = [_loss_in_words(record.evaluation, name) for name in ("base", "tuned")]
        if all(losses):
            verdict = (record.evaluation or {}).get("verdict")
            found["held-out loss"] = " → ".join(losses) + (f", {verdict}" if isinstance(verdict, str) else "")
        if self.status == "finished" and (diagnosis := _diagnosis_in_words(record.diagnosis)):
            found["diagnosis"] = diagnosis
        peaks = [number_in(record.plan, part, "peak_bytes") for part in ("measured", "predicted")]
        if peaks[0] and peaks[1]:
            found["memory"] = f"{format_bytes(peaks[0])} measured, {format_bytes(peaks[1])} planned"
        times = (("measured", "step_seconds"), ("predicted", "seconds", "step"))
        steps = [number_in(record.plan, *keys) for keys in times]
        if steps[0] and steps[1]:
            found["step time"] = f"{steps[0]:.3g} s measured, {steps[1]:.3g} s planned"
        return found


def watch(
    run: str | Path, wait_for_resume: bool = False, poll_seconds: float = POLL_SECONDS, display: Display | None = None
) -> WatchedRun:
    """Show a run until it ends, from its files alone: in a notebook as one updating cell, in a script nothing.

        solotune.watch("latest").status

    The run may be on another terminal of this machine, not started yet, or finished. Nothing is written.

    Args:
        run: the folder, the name of one below runs/, or `latest`; if it is not there yet, this waits for it.
        wait_for_resume: if the process of the run ends before the run does, wait for `--resume` to continue it.
        poll_seconds: seconds between two looks at the files.
        display: shows progress. The default is one updating cell in a notebook, and nothing in a script.

    Raises:
        InputError: it is a file, or a folder without a run.
    """
    with showing(display, LOGGING_STEPS, stays=True) as shown:
        found = _wait_until_there(run, poll_seconds, shown)
        follower = RunFollower(found, shown, _finding_in_words)
        was_alive, before = False, "waiting"
        while (state := follower.poll()) != "finished":
            if state == "gone" != before:
                shown.note(_gone_in_words(follower, found))
                if was_alive and wait_for_resume:
                    shown.phase("waiting for --resume (Ctrl-C ends this view)")
            if state == "gone" and not (was_alive and wait_for_resume):
                break
            was_alive, before = was_alive or state == "running", state
            time.sleep(poll_seconds)
        return _result(follower, found)


def _wait_until_there(run: str | Path, poll_seconds: float, display: RunObserver) -> RunDirectory:
    """The run's directory, as soon as it has a run in it."""
    is_told = False
    while True:
        path = located(run)
        if path.is_file():
            raise InputError(f"{run}: a file", allowed="a run directory, which need not exist yet")
        if (path / "config.yaml").is_file() or (path / METRICS).is_file():
            return RunDirectory(path)
        if not is_told:
            display.phase(f"waiting for {run}: no run there yet")
            is_told = True
        time.sleep(poll_seconds)


def _result(follower: RunFollower, run: RunDirectory) -> WatchedRun:
    problem = "" if follower.state == "finished" else _failure_in_words(follower)
    code = 0
    if follower.state == "gone":
        kinds = {NonFiniteEvent: NonFiniteError, DeviceFailedEvent: DeviceError}
        code = kinds.get(type(follower.failure), CheckError).exit_code
    elif (RunRecord(run.path, ()).diagnosis or {}).get("verdict") == "fault":
        code = CheckError.exit_code
    return WatchedRun(run.path, follower.state, follower.last_step, follower.total_steps, problem, code)


def _gone_in_words(follower: RunFollower, run: RunDirectory) -> str:
    """The line about a run whose process has ended before it."""
    where = f"step {follower.last_step:,} of {follower.total_steps:,}" if follower.total_steps else "its first step"
    why = f": {follower_failure}" if (follower_failure := _failure_in_words(follower)) else ""
    saved = f"newest checkpoint: step {follower.saved.step:,}" if follower.saved else "no checkpoint"
    return f"the process of this run is gone; it was at {where}{why} ({saved}). Continue: {_resume_command(run.path)}"


def _resume_command(run: Path) -> str:
    return resume_command(run, RunRecord.read(run).launched)


def _failure_in_words(follower: RunFollower) -> str:
    """What the run recorded before it ended; empty if it had no time to."""
    match follower.failure:
        case NonFiniteEvent() as event:
            seen = event.seen or ", ".join(event.tensors or ())
            return f"values are not finite in step {event.step:,}" + (f" ({seen})" if seen else "")
        case DeviceFailedEvent() as event:
            return event.problem
    return ""


def _finding_in_words(event: DiagnosedEvent) -> str:
    """One line, as the run's own view has it."""
    fault = FAULTS.get(event.code)
    slug, fix = (f" {fault.slug}", f" → {fault.fix}") if fault else ("", "")
    word = "remark " if event.kind == "remark" else ""
    return f"{word}{event.code}{slug}: {event.says}{fix} (solotune explain {event.code})"


def _loss_in_words(evaluation: Any, name: str) -> str:
    loss = number_in(evaluation, name, "loss")
    return "" if loss is None else plus_minus(loss, number_in(evaluation, name, "stderr"))


def _diagnosis_in_words(diagnosis: Any) -> str:
    """`healthy`, or `fault: F17 pad-masks-terminator`."""
    verdict = diagnosis.get("verdict") if isinstance(diagnosis, dict) else None
    if not isinstance(verdict, str):
        return ""
    culprits = diagnosis.get("culprits")
    found = [one for one in culprits if isinstance(one, dict)] if isinstance(culprits, list) else []
    names = ", ".join(f"{one.get('fault', '')} {one.get('slug', '')}" for one in found[:3])
    return f"{verdict}: {names}" if names else verdict
