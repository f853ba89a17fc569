"""Stop requests: what SIGINT (Ctrl-C), SIGTERM (a scheduler) and SIGHUP (a closed terminal) do to a run.

    with handle_signals():  from here on the first signal raises `StopRequested` in the main thread, wherever it is
        ...
        with defer_signals():     here it waits until the code says that it can be stopped
            ...
            check_stop()            a safe place: raises `StopRequested` if a signal has come

A stage that has nothing to save (loading, reading data, generating samples) stops at once. Training holds the request
back until the micro-batch in hand is done, so that what was made of the run can be saved. Whoever polls also tells the
watchdog that the run is alive (`watchdog.py`), so a safe place belongs into everything that takes long.

A second signal ends the process at once, by the kernel where the process is ours; files are written whole or not at
all, so the last checkpoint is good then too. Only the main thread can install handlers; elsewhere (a notebook's worker)
nothing is installed and signals behave as they did.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from solotune.runtime import watchdog

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHOW_CURSOR = "\x1b[?25h"  # a live display hides it, and a second signal leaves no time to show it again


class StopRequested(KeyboardInterrupt):
    """A stop signal has come; a KeyboardInterrupt, for libraries let those pass."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Requests:
    """The process's one state: signals are the process's."""

    def __init__(self) -> None:
        self.received = 0
        self.is_taken = False  # `check_stop` has raised it, and somebody sees to it
        self.is_held_back = False
        self.is_ours = False  # the process; else a caller's
        self.before: dict[int, Any] = {}

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.received = int(number)
        for each, handler in self.before.items():
            signal.signal(each, signal.SIG_DFL if self.is_ours else handler)
        if self.is_ours:
            self.say()
        if not self.is_held_back:
            raise StopRequested(self.received)

    def say(self) -> None:
        """To stderr and past Python's buffers, which may be in use by the very code that was interrupted."""
        note = f"{signal.Signals(self.received).name}: stopping at the next safe place; once more to stop at once\n"
        with contextlib.suppress(OSError):
            os.write(2, (SHOW_CURSOR * os.isatty(2) + note).encode())


_requests = _Requests()


@contextlib.contextmanager
def handle_signals(is_ours: bool = False) -> Iterator[None]:
    """Stop signals raise `StopRequested` within the block; within another such block it is without effect.

    Args:
        is_ours: the process does nothing but this, so a second signal ends it, and so does one that comes as it leaves.
    """
    if _requests.before or threading.current_thread() is not threading.main_thread():
        yield
        return
    _requests.is_ours, _requests.received, _requests.is_taken = is_ours, 0, False
    _requests.before = {number: signal.signal(number, _requests.receive) for number in STOPPING}
    hook, sys.unraisablehook = sys.unraisablehook, _pass_over
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in _requests.before.items():
            signal.signal(number, signal.SIG_DFL if is_ours else handler)
        _requests.before = {}


def _pass_over(unraisable: sys.UnraisableHookArgs) -> None:
    """An interruption that came in a destructor is lost there; the next check_stop raises it again."""
    if not isinstance(unraisable.exc_value, StopRequested):
        sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Within the block a signal is only noted, for `check_stop`; one that nobody polled for is raised at its end."""
    outside, _requests.is_held_back = _requests.is_held_back, True
    try:
        yield
    finally:
        _requests.is_held_back = outside
    if not outside:
        check_stop()


def check_stop() -> None:
    """A place where the run may be stopped, and a sign of life.

    Raises:
        StopRequested: a signal has come; raised by one check_stop alone, for what follows is the way out.
    """
    watchdog.beat()
    if _requests.received and _requests.before and not _requests.is_taken:
        _requests.is_taken = True
        raise StopRequested(_requests.received)


def received() -> int:
    """The number of the signal that has come, 0 if none has."""
    return _requests.received
