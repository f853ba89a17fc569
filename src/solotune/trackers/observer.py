"""The observer that sends a run to trackers: it starts one process for each, and looks now and then how they are.

    trackers = Trackers(("wandb",), run.path, observer.note)
    trackers.begin(120)          starts the processes
    trackers.step(event)         looks every CHECK_SECONDS
    trackers.close("finished")   tells them, and waits a little

The run never waits for a tracker, except FINISH_SECONDS at its end. What is not sent by then goes on being sent by the
tracker's process. A tracker that fails is said once, on the screen and in log.txt.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from solotune.display.observer import SilentObserver
from solotune.errors import StorageError
from solotune.run.atomic_io import remove
from solotune.run.record import json_object
from solotune.run.run_dir import TRACKERS
from solotune.trackers import tracker_process
from solotune.trackers.libraries import Status

if TYPE_CHECKING:
    from solotune.run.events import StepEvent

CHECK_SECONDS = 5.0
FINISH_SECONDS = 10.0  # for all trackers together
SOURCE = Path(tracker_process.__file__).parents[2]  # the folder of this package


class Trackers(SilentObserver):
    """Send a run to the trackers of `report_to`."""

    def __init__(self, names: Sequence[str], run_dir: Path, say: Callable[[str], None]) -> None:
        """Args:
        say: gets each line for people.
        """
        self._run_dir, self._say = run_dir, say
        self._names = names
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._is_told: set[str] = set()
        self._checked = time.monotonic()

    def begin(self, total_steps: int, done: int = 0) -> None:
        """Start the processes; they read what the run has written already by themselves."""
        for name in self._names:
            if not done:  # of a run that was killed before its first checkpoint, and starts again
                with contextlib.suppress(StorageError):
                    remove(self._run_dir / TRACKERS / f"{name}.json")
            words = [name, str(self._run_dir), *([str(done)] if done else [])]
            try:
                self._processes[name] = subprocess.Popen(
                    [sys.executable, "-P", tracker_process.__file__, *words], stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_environment(), start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                self._tell_failure(name, error.strerror or str(error))

    def step(self, event: StepEvent) -> None:
        if time.monotonic() - self._checked >= CHECK_SECONDS:
            self._checked = time.monotonic()
            self._check()

    def close(self, status: Status) -> None:
        """Say how the run ended, wait at most FINISH_SECONDS, and tell what is not sent."""
        for process in self._processes.values():
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # it has failed
                process.stdin.write(status.encode() + b"\n")
                process.stdin.close()
        end = time.monotonic() + FINISH_SECONDS
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.01, end - time.monotonic()))
        self._check()
        for name, process in self._processes.items():
            if process.poll() is None:
                step = (self._report(name) or {}).get("step") or 0
                self._say(
                    f"{name} is slow or does not answer: it has the run up to step {step:,}. The rest is still being "
                    f"sent (process {process.pid}); metrics.jsonl has everything"
                )
        self._processes.clear()

    def _check(self) -> None:
        """Tell where a tracker shows the run, and which has failed, each once."""
        for name, process in self._processes.items():
            report = self._report(name) or {}
            if (code := process.poll()) not in (None, 0):
                self._tell_failure(name, str(report.get("problem") or f"its process ended with {code}"))
            elif (where := report.get("where")) and name not in self._is_told:
                self._is_told.add(name)
                self._say(f"{name}: {where}")

    def _tell_failure(self, name: str, problem: str) -> None:
        if f"{name} failed" not in self._is_told:
            self._is_told.add(f"{name} failed")
            self._say(f"warning: {name} failed and gets nothing more of this run ({problem}); the run is not affected")

    def _report(self, name: str) -> dict[str, object] | None:
        return json_object(self._run_dir / TRACKERS / f"{name}.json")


def _environment() -> dict[str, str]:
    """The process finds this package as this one did."""
    paths = [str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
