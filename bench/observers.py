"""What the live view, the logs, the monitor and trackers cost a run, measured in the run itself.

    python -m bench.observers CONFIG [KEY=VALUE ...]        report_to=tensorboard: with a tracker

It trains as `solotune train` does on a terminal (a pseudo-terminal, 100 columns) and measures the seconds that the loop
spends in each observer, and those of the thread that draws the live line, per step and as a share of the median step.
The bar is 0.5 %. What trackers cost lies in their own processes; on a machine whose cores are all busy that is not
free, so compare the median step with and without `report_to`, too.
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


class Spent:
    """Seconds in each observer while the loop trains."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.is_training = False

    def timed(self, owner: Any, method: str, name: Any) -> None:
        """Measure a method of a class from now on; `name(self)` says for whom."""
        real = getattr(owner, method)

        def call(this: Any, *args: Any, **keys: Any) -> Any:
            began = time.perf_counter()
            try:
                return real(this, *args, **keys)
            finally:
                if self.is_training:
                    self.seconds[name(this)] += time.perf_counter() - began

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
    spent.timed(Live, "refresh", lambda live: "drawing thread")
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
    median = statistics.median(step.step_seconds for step in steps)
    per_step = {name: seconds / len(steps) for name, seconds in spent.seconds.items()}
    total = sum(per_step.values())
    for name, seconds in sorted(per_step.items(), key=lambda item: -item[1]):
        print(f"{name:16} {1e6 * seconds:9,.0f} µs a step  {seconds / median:8.4%}")
    share = total / median
    print(f"{'all':16} {1e6 * total:9,.0f} µs a step  {share:8.4%} of a step of {median:.3g} s (bar {BAR:.1%})")
    print(json.dumps({"steps": len(steps), "step_seconds": median, "seconds_per_step": per_step, "share": share}))
    return 0 if share <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
