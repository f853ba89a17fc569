"""End a run that hangs: write the stacks of all its threads, and exit with code 9.

    with watched():          start a second process that watches this one (`watchdog_process.py`)
        beat()               report that the run is alive; `signals.check_stop` calls it

How it ends the run
-------------------
After too long without a beat, the watching process acts. The hanging call may hold Python's global lock (a native call)
or wait in the kernel (a dead network drive, a FIFO that nothing writes), so no Python code of this process is needed:

    stacks    faulthandler's signal handler, in C, writes them to stderr, or to the file of `stacks_into`
    exit      a thread waits for a byte from the watching process and exits with 9. It needs the global lock; if the
              hanging call holds that, the watching process kills this one some seconds later (SIGKILL; shells show 137)

The limit
---------
It is generous, because ending a run that is only slow would be worse than a hang: half an hour, or twenty times the
longest silence so far, or ten times what the plan expects of a step, whichever is longest. Downloads give no beats for
hours and have time limits of their own, so they do not count (`paused`).

What it does not do: watch a process that belongs to a caller, such as a notebook that calls `solotune.train`.
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
BEAT_SECONDS = 0.2  # more beats than this are not sent
DUMP_SIGNAL = getattr(signal, "SIGRTMIN", signal.SIGUSR1 - 3) + 3  # unused by other programs


class _Watcher:
    """The watching process and the connection to it."""

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
            os.close(exit_fd)  # only the watching process keeps it open, so the thread ends when that process ends
        assert self.process.stdin is not None
        self.pipe = self.process.stdin.fileno()
        os.set_blocking(self.pipe, False)
        self.limit, self.longest, self.last = 0.0, 0.0, time.monotonic()
        self.stacks: IO[str] | None = None
        self.set_limit(LIMIT_SECONDS)

    def tell(self, line: str) -> None:
        with contextlib.suppress(OSError):  # a watching process that is gone must not end the run
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
    """Thread: exit with code 9 when the watching process writes a byte; return when that process is gone."""
    # signals must reach the main thread and interrupt its waiting
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    if os.read(read_fd, 1):
        os._exit(EXIT_CODE)
    os.close(read_fd)


_watcher: _Watcher | None = None  # one for all threads, because signals and the exit code belong to the process


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Watch this process in the block; it must belong to solotune, since it may be ended."""
    global _watcher
    if _watcher is not None or not hasattr(faulthandler, "register"):
        yield
        return
    faulthandler.register(DUMP_SIGNAL, sys.__stderr__ or 2, all_threads=True)
    try:
        with contextlib.suppress(
            OSError, RuntimeError
        ):  # no process or thread could be started: the run works without a watchdog
            _watcher = _Watcher()
        yield
    finally:
        watcher, _watcher = _watcher, None
        faulthandler.unregister(DUMP_SIGNAL)
        if watcher is not None:
            watcher.leave()


def beat() -> None:
    """Report that the run is alive; costs nothing without a watchdog."""
    if _watcher is not None:
        _watcher.beat()


def set_stage(stage: str) -> None:
    """Set what the run is doing, for the message."""
    if _watcher is not None:
        _watcher.tell("doing " + " ".join(stage.split()))


def expect(seconds: float) -> None:
    """Expect this many seconds between two beats."""
    if _watcher is not None:
        _watcher.set_limit(TIMES_EXPECTED * seconds)


def stacks_into(path: Path) -> None:
    """Write stacks to this file from now on; the file exists, and stays empty as long as nothing hangs."""
    if _watcher is not None:
        with contextlib.suppress(OSError):
            # open as long as the watchdog runs; a FIFO in its place would wait for a reader
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            _watcher.stacks = os.fdopen(os.open(path, flags, 0o666), "w", encoding="utf-8")
            faulthandler.register(DUMP_SIGNAL, _watcher.stacks, all_threads=True)
            _watcher.tell(f"stacks {path}")


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Do not count time in the block: its code has time limits of its own."""
    if _watcher is not None:
        _watcher.tell("pause")
    try:
        yield
    finally:
        if _watcher is not None:
            _watcher.last = time.monotonic()
            _watcher.tell("go")
