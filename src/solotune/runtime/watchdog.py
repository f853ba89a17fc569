"""A run that hangs is ended: the stacks of all its threads are written down, and the exit code is 9.

    with watched():          a second process is started that watches this one (`watchdog_process.py`)
        beat()               a sign of life; every safe place gives one (`signals.check_stop`)

Too long without one, the guard ends the process. What hangs may hold Python's lock (a native call) or sit in the
kernel (a dead network drive, a FIFO that nobody writes), so nothing depends on Python code of this process:

    stacks    faulthandler's own handler of a signal, in C, writes them: to stderr, or where `stacks_into` said
    exit      a thread waits for a byte from the guard and ends the process with 9. It needs Python's lock; where the
              call that hangs holds it, the guard kills the process some seconds later (SIGKILL; shells see 137).

The limit is generous, for ending a run that only is slow would be worse than a hang: half an hour, or twenty times the
longest silence so far, or ten times what the plan expects of a step, whichever is most. Downloads say nothing for
hours and have time limits of their own, so they are left out (`paused`).

What it does not do: watch a process of somebody else, such as a notebook that calls `solotune.train`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from solotune.runtime import watchdog_process

EXIT_CODE = 9
LIMIT_SECONDS = 1800.0
TIMES_LONGEST, TIMES_EXPECTED = 20, 10
BEAT_SECONDS = 0.2  # the guard need not know more often
DUMP_SIGNAL = getattr(signal, "SIGRTMIN", signal.SIGUSR1 - 3) + 3  # one that nobody else sends


class _Guard:
    """The watching process, and what it has been told."""

    def __init__(self) -> None:
        read_fd, exit_fd = os.pipe()
        command = [
            sys.executable,
            "-I",
            "-S",
            watchdog_process.__file__,
            str(os.getpid()),
            str(int(DUMP_SIGNAL)),
            str(exit_fd),
        ]
        self.exit_thread = threading.Thread(target=_exit_on_request, args=(read_fd,), name="watchdog", daemon=True)
        try:
            self.exit_thread.start()
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0, pass_fds=[exit_fd], cwd="/"
            )
        finally:
            os.close(exit_fd)  # the guard alone holds it, so the thread ends when the guard does
        assert self.process.stdin is not None
        self.pipe = self.process.stdin.fileno()
        os.set_blocking(self.pipe, False)
        self.limit, self.longest, self.last = 0.0, 0.0, time.monotonic()
        self.stacks: IO[str] | None = None
        self.set_limit(LIMIT_SECONDS)

    def tell(self, line: str) -> None:
        with contextlib.suppress(OSError):  # a guard that is gone or does not listen must not end the run
            os.write(self.pipe, line.encode(errors="replace") + b"\n")

    def set_limit(self, seconds: float) -> None:
        if seconds > self.limit:
            self.limit = seconds
            self.tell(f"limit {seconds:.1f}")

    def beat(self) -> None:
        now = time.monotonic()
        if now - self.last < BEAT_SECONDS:
            return
        self.longest, self.last = max(self.longest, now - self.last), now
        self.tell("beat")
        self.set_limit(TIMES_LONGEST * self.longest)

    def leave(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.exit_thread.join()
        if self.stacks is not None:
            self.stacks.close()


def _exit_on_request(read_fd: int) -> None:
    """Thread: ends the process with 9 when the guard writes a byte; returns when the guard is gone."""
    # signals are for the main thread, whose waiting they interrupt
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    if os.read(read_fd, 1):
        os._exit(EXIT_CODE)
    os.close(read_fd)


_guard: _Guard | None = None  # of the process, as its signals and its exit code are: there is one for all threads


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """The process is watched within the block; it must be ours to end."""
    global _guard
    if _guard is not None or not hasattr(faulthandler, "register"):
        yield
        return
    faulthandler.register(DUMP_SIGNAL, sys.__stderr__ or 2, all_threads=True)
    try:
        with contextlib.suppress(OSError, RuntimeError):  # no process or thread to be had: the run works, unwatched
            _guard = _Guard()
        yield
    finally:
        guard, _guard = _guard, None
        faulthandler.unregister(DUMP_SIGNAL)
        if guard is not None:
            guard.leave()


def beat() -> None:
    """A sign of life; costs nothing where nobody watches."""
    if _guard is not None:
        _guard.beat()


def set_stage(stage: str) -> None:
    """What the run is at, for the message."""
    if _guard is not None:
        _guard.tell("doing " + " ".join(stage.split()))


def expect(seconds: float) -> None:
    """The run will be this long between two signs of life."""
    if _guard is not None:
        _guard.set_limit(TIMES_EXPECTED * seconds)


def stacks_into(path: Path) -> None:
    """Where the stacks go from now on; the file is there, and empty, as long as nothing hangs."""
    if _guard is not None:
        with contextlib.suppress(OSError):
            _guard.stacks = open(path, "w", encoding="utf-8")  # noqa: SIM115 - open as long as the guard is
            faulthandler.register(DUMP_SIGNAL, _guard.stacks, all_threads=True)
            _guard.tell(f"stacks {path}")


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Silence is no alarm within the block: what is in it has limits of its own."""
    if _guard is not None:
        _guard.tell("pause")
    try:
        yield
    finally:
        if _guard is not None:
            _guard.last = time.monotonic()
            _guard.tell("go")
