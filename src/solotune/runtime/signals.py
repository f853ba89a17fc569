"""Stop requests: what SIGINT (Ctrl-C), SIGTERM (a scheduler) and SIGHUP (a closed terminal) do to a run.

    with handle_signals():        the first signal raises `StopRequested` in the main thread, wherever it is
        ...
        with defer_signals():     the signal waits until the code reaches a stopping point
            ...
            check_stop()          a stopping point: raises `StopRequested` if a signal has come

When a run stops
----------------
A stage with nothing to save (loading, reading data, generating samples) stops at once. Training defers the request
until the current micro-batch is done, so that its state can be saved. `check_stop` also tells the watchdog that the run
is alive (`watchdog.py`), so every long loop must call it.

A second signal ends the process at once (by the kernel, if the process belongs to solotune); files are written
completely or not at all, so the last checkpoint stays valid. Only the main thread can install handlers; in other
threads (a notebook's worker) nothing is installed and signals behave as before.

Ranks
-----
torchrun passes a signal on that the terminal or the scheduler has sent to the workers already, so one Ctrl-C comes
twice. In a process with a launcher, what follows within `ECHO_SECONDS` of the first signal is its echo. Only rank 0
says on the screen that the run stops. What other ranks do is a stop request too (`request_stop`, from `heartbeat`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from solotune.runtime import watchdog

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ECHO_SECONDS = 5.0
SHOW_CURSOR = "\x1b[?25h"  # a live display hides it, and a second signal leaves no time to show it again


class StopRequested(KeyboardInterrupt):
    """A stop signal has come. A KeyboardInterrupt, because libraries do not catch those."""

    def __init__(self, number: int, rank: int | None = None) -> None:
        """Args:
        rank: which got the signal; None: this one.
        """
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.sender = "" if rank is None else f"rank {rank} got {self}: "


class _Requests:
    """State of the process: signals belong to the process, so there is one."""

    def __init__(self) -> None:
        self.received = 0
        self.is_taken = False  # `check_stop` has raised it
        self.is_held_back = False
        self.is_ours = False  # the process belongs to solotune, not to a caller
        self.has_launcher = False  # which passes signals on
        self.is_quiet = False
        self.received_at = 0.0
        self.asked: StopRequested | None = None  # by another thread, not by a signal
        self.before: dict[int, Any] = {}

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and self.has_launcher:
            if time.monotonic() - self.received_at > ECHO_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.received, self.received_at = int(number), time.monotonic()
        for each, handler in self.before.items() if not self.has_launcher else ():
            signal.signal(each, signal.SIG_DFL if self.is_ours else handler)
        if self.is_ours and not self.is_quiet:
            self.announce()
        if not self.is_held_back:
            raise StopRequested(self.received)

    def announce(self) -> None:
        """Write to stderr without Python's buffers, which the interrupted code may be using."""
        name, again = signal.Signals(self.received).name, "Send it again"
        if self.received == signal.SIGINT:
            name, again = "Ctrl-C", "Press it again"
        how, without = (" as soon as it is safe", ", without saving") if self.is_held_back else ("", "")
        note = f"{name}: stopping{how}. {again} to stop at once{without}.\n"
        with contextlib.suppress(OSError):
            os.write(2, (SHOW_CURSOR * os.isatty(2) + note).encode())


_requests = _Requests()


@contextlib.contextmanager
def handle_signals(is_ours: bool = False, has_launcher: bool = False, is_quiet: bool = False) -> Iterator[None]:
    """Let stop signals raise `StopRequested` in the block; a nested block has no effect.

    Args:
        is_ours: the process does nothing else, so a second signal ends it, and so does one that comes while it exits.
        has_launcher: a launcher of ranks passes on what the process has received already.
        is_quiet: do not say that the run stops: another rank does.
    """
    if _requests.before:
        yield
        return
    _requests.is_taken, _requests.asked = False, None
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _requests.is_ours, _requests.received = is_ours, 0
    _requests.has_launcher, _requests.is_quiet = has_launcher, is_quiet
    _requests.before = {number: signal.signal(number, _requests.receive) for number in STOPPING}
    hook, sys.unraisablehook = sys.unraisablehook, _ignore_in_destructor
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in _requests.before.items():
            signal.signal(number, signal.SIG_DFL if is_ours else handler)
        _requests.before = {}


def _ignore_in_destructor(unraisable: sys.UnraisableHookArgs) -> None:
    """Ignore a stop request that was raised in a destructor, where it is lost; the next check_stop raises it again."""
    if not isinstance(unraisable.exc_value, StopRequested):
        sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Only record signals in the block, for `check_stop`; one that was not raised there is raised at its end."""
    outside, _requests.is_held_back = _requests.is_held_back, True
    try:
        yield
    finally:
        _requests.is_held_back = outside
    if not outside:
        check_stop()


@contextlib.contextmanager
def ctrl_c_interrupts() -> Iterator[None]:
    """Let Ctrl-C raise a plain KeyboardInterrupt in the block: it ends what the block does, not the program.

    Outside the main thread, where no handler can be installed, it changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def check_stop() -> None:
    """Stop here if a signal has come, and tell the watchdog that the run is alive.

    Raises:
        StopRequested: a signal has come, or another rank has ended (in any thread, without handlers too); raised once,
            because the code that follows is already stopping.
    """
    watchdog.beat()
    if ((_requests.received and _requests.before) or _requests.asked) and not _requests.is_taken:
        _requests.is_taken = True
        raise _requests.asked or StopRequested(_requests.received)


def request_stop(stop: StopRequested) -> None:
    """Let the next `check_stop` raise this, as if a signal had come; from any thread."""
    _requests.asked = _requests.asked or stop


def received() -> int:
    """Number of the signal that has come, 0 if none."""
    return _requests.received
