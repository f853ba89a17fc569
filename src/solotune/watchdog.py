"""A run that hangs is ended: the stacks of all its threads are written down, and the exit code is 9.

    with watched():          a second process is started that watches this one (`guard.py`)
        beat()               a sign of life; every safe place gives one (`signals.poll`)

Too long without one, the guard ends the process. What hangs may hold Python's lock (a native call) or sit in the
kernel (a dead network drive, a FIFO that nobody writes), so none of it is left to Python code of this process:

    stacks    faulthandler's own handler of a signal, in C, writes them: to stderr, or where `stacks_into` said
    exit      a thread of the C library waits for a byte from the guard (POSIX aio) and then calls _exit(9). Where the
              C library has no aio, the guard kills the process, which shells see as 137.

The limit is generous, for ending a run that only is slow would be worse than a hang: half an hour, or twenty times the
longest silence so far, or ten times what the plan expects of a step, whichever is most. Downloads say nothing for
hours and have time limits of their own, so they are left out (`paused`).

What it does not do: watch a process of somebody else, such as a notebook that calls `solotune.train`.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO

EXIT_CODE = 9
LIMIT_SECONDS = 1800.0
TIMES_LONGEST, TIMES_EXPECTED = 20, 10
BEAT_SECONDS = 0.2  # the guard need not know more often
DUMP_SIGNAL = getattr(signal, "SIGRTMIN", signal.SIGUSR1 - 3) + 3  # one that nobody else sends
SIGEV_THREAD = 2


class _Guard:
    """The watching process, and what it has been told."""

    def __init__(self) -> None:
        exit_fd = _exit_pipe()
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py"))]
        command += [str(os.getpid()), str(int(DUMP_SIGNAL)), str(exit_fd)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0, pass_fds=[exit_fd], cwd="/"
        )
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
        if self.stacks is not None:
            self.stacks.close()


_guard: _Guard | None = None


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """The process is watched within the block; it must be ours to end."""
    global _guard
    if _guard is not None or not hasattr(faulthandler, "register"):
        yield
        return
    faulthandler.register(DUMP_SIGNAL, sys.__stderr__ or 2, all_threads=True)
    try:
        with contextlib.suppress(
            OSError
        ):  # no second process to be had: the run is not watched, and works all the same
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


def doing(stage: str) -> None:
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


class _SigEvent(ctypes.Structure):
    """`struct sigevent` of Linux; padded to its 64 bytes."""

    _fields_ = (
        ("value", ctypes.c_long),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_char * 32),
    )


class _Aiocb(ctypes.Structure):
    """`struct aiocb` of glibc and musl on 64 bits, and room for what they keep behind it."""

    _fields_ = (
        ("fildes", ctypes.c_int),
        ("lio_opcode", ctypes.c_int),
        ("reqprio", ctypes.c_int),
        ("buf", ctypes.c_void_p),
        ("nbytes", ctypes.c_size_t),
        ("sigevent", _SigEvent),
        ("private", ctypes.c_char * 256),
    )


@cache
def _exit_pipe() -> int:
    """The end of a pipe into which a byte is written to have this process call _exit(9), whatever Python does.

    Made once in a process: the thread that reads it cannot be called back.
    """
    read_fd, write_fd = os.pipe()  # this process keeps both ends, so a guard that dies does not close the pipe
    libraries = [ctypes.CDLL(None), *(ctypes.CDLL(name) for name in [ctypes.util.find_library("rt")] if name)]
    aio_read = next((getattr(library, "aio_read") for library in libraries if hasattr(library, "aio_read")), None)  # noqa: B009
    if aio_read is None or not sys.platform.startswith("linux") or ctypes.sizeof(ctypes.c_void_p) != 8:
        return write_fd
    request, buffer = _Aiocb(), ctypes.create_string_buffer(1)
    request.fildes, request.buf, request.nbytes = read_fd, ctypes.addressof(buffer), 1
    request.sigevent.notify, request.sigevent.value = SIGEV_THREAD, EXIT_CODE
    request.sigevent.function = ctypes.cast(ctypes.CDLL(None)._exit, ctypes.c_void_p).value
    aio_read(ctypes.byref(request))
    _kept.extend((request, buffer))
    return write_fd


_kept: list[object] = []  # what the C library's thread reads, for as long as the process lives
