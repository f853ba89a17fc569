"""What the live view, the logs, the monitor and trackers cost a run, measured in the run itself.

    python -m bench.observers CONFIG [KEY=VALUE ...]        report_to=tensorboard: with a tracker

It trains as `solotune train` does on a terminal (a pseudo-terminal, 100 columns) and measures, per step and as a share
of the median step, what each observer costs: the seconds that the loop waits for it, and the processor's seconds among
them. On a busy machine only the latter mean something, and of the thread that draws the live line only they count: it
waits for the interpreter's lock, which costs nobody. The bar is 0.5 % of processor time. What trackers cost lies in
their own processes; on a machine whose cores are all busy that is not free, so compare the median step with and without
`report_to`, too.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.live import Live

import solotune
from solotune.config.load import load_config
from solotune.display.observer import Resilient
from solotune.display.progress import LiveDisplay
from solotune.run.record import RunRecord
from solotune.run.run_log import RunLog

BAR = 0.005
DRAWING = "drawing thread"


class Spent:
    """Seconds in each observer while the loop trains."""

    def __init__(self) -> None:
        self.waited: dict[str, float] = defaultdict(float)
        self.worked: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.is_training = False

    def timed(self, owner: Any, method: str, name: Callable[[Any], str]) -> None:
        """Measure a method of a class from now on; `name(self)` says for whom."""
        real = getattr(owner, method)

        def call(this: Any, *args: Any, **keys: Any) -> Any:
            began, worked = time.perf_counter(), time.thread_time()
            try:
                return real(this, *args, **keys)
            finally:
                if self.is_training:
                    self.waited[name(this)] += time.perf_counter() - began
                    self.worked[name(this)] += time.thread_time() - worked
                    self.calls[name(this)] += 1

        setattr(owner, method, call)


class Measured(LiveDisplay):
    """The live view; training is from `begin` to `finish`."""

    def __init__(self, spent: Spent, console: Console) -> None:
        self._spent = spent
        super().__init__(1, console)

    def begin(self, total_steps: int, done: int = 0) -> None:
        super().begin(total_steps, done)
        self._spent.is_training = True

    def finish(self) -> None:
        self._spent.is_training = False
        super().finish()


def read_all(handle: int) -> None:
    """What a terminal does: take what is written to it."""
    try:
        while os.read(handle, 65536):
            pass
    except OSError:
        return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    spent = Spent()
    spent.timed(RunLog, "step", lambda log: "metrics.jsonl")
    spent.timed(Resilient, "_pass_on", lambda this: type(this._observer).__name__)
    spent.timed(Live, "refresh", lambda live: DRAWING)
    terminal, screen = pty.openpty()
    threading.Thread(target=read_all, args=(terminal,), daemon=True).start()
    with os.fdopen(screen, "w") as stream, tempfile.TemporaryDirectory(prefix="solotune-observers-") as folder:
        console = Console(file=stream, width=100, force_terminal=True, markup=False, highlight=False, emoji=False)
        overrides = [*args.overrides, f"output_dir={folder}/run"]
        display = Measured(spent, console)
        display.logging_steps = load_config(args.config, overrides).logging_steps  # as the command does
        try:
            result = solotune.train(args.config, overrides, display=display)
        finally:
            display.finish()  # rich gives stdout and stderr back
        steps = RunRecord.read(result.run_dir).steps
    return reported(spent, len(steps), statistics.median(step.step_seconds for step in steps))


def reported(spent: Spent, steps: int, step_seconds: float) -> int:
    """Print what was spent; 1 if it is above the bar."""
    waited, worked = (
        {name: seconds / steps for name, seconds in each.items()} for each in (spent.waited, spent.worked)
    )
    waited[DRAWING] = 0.0  # the loop does not wait for it
    totals = sum(waited.values()), sum(worked.values())
    print(f"{'per step':16} {'calls':>6} {'the loop waits':>15} {'processor':>10}")
    for name in sorted(worked, key=lambda name: -worked[name]):
        print(f"{name:16} {spent.calls[name] / steps:6.2f} {_cell(waited[name], step_seconds)} "
              f"{_cell(worked[name], step_seconds)}")  # fmt: skip
    print(f"{'all':16} {'':6} {_cell(totals[0], step_seconds)} {_cell(totals[1], step_seconds)} "
          f"of a step of {step_seconds:.3g} s (bar {BAR:.1%})")  # fmt: skip
    print(json.dumps({"steps": steps, "step_seconds": step_seconds, "waited": waited, "worked": worked,
                      "share": totals[1] / step_seconds}))  # fmt: skip
    return 0 if totals[1] / step_seconds <= BAR else 1


def _cell(seconds: float, of: float) -> str:
    return f"{1e6 * seconds:7,.0f} µs {seconds / of:7.3%}"


if __name__ == "__main__":
    sys.exit(main())
