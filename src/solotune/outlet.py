"""The display of a run as the run sees it: one that never fails, and at which the run can be stopped.

Nobody may be reading: `solotune train ... | head -1` closes the pipe, a terminal goes away, a disk behind `> out.txt`
fills up. Hours of work do not hang on that: the display then falls silent, and the run goes on, with its log and its
metrics. Each thing shown is also a safe place to be stopped at (`signals.poll`) and a sign of life.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from solotune import signals, watchdog
from solotune.terminal import Display


class _Outlet:
    """Passes everything on to `display`, as long as there is somebody to hear it."""

    def __init__(self, display: Display) -> None:
        self.display = display
        self.stage = "getting ready"
        self.failure: str | None = None

    def phase(self, name: str) -> None:
        self.stage = name
        watchdog.doing(name)
        self.tell("phase", name)

    def begin(self, total_steps: int, done: int = 0) -> None:
        self.stage = "training"
        watchdog.doing("training")
        self.tell("begin", total_steps, done)

    def tell(self, name: str, *args: Any) -> None:
        signals.poll()
        if self.failure is not None:
            return
        try:
            getattr(self.display, name)(*args)
        except OSError as error:
            self.failure = error.strerror or str(error)
        except SystemExit:  # what rich makes of a closed pipe
            self.failure = "Broken pipe"

    def __getattr__(self, name: str) -> Callable[..., None]:
        def tell(*args: Any) -> None:
            self.tell(name, *args)

        return tell


def outlet(display: Display) -> Display:
    """`display` for a run; see above."""
    return cast(Display, _Outlet(display))


def stage_of(display: Display) -> str:
    """What a run was at, by what its outlet showed last."""
    return cast(_Outlet, display).stage
