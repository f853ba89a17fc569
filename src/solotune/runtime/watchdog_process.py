"""The process that watches a run: started by `watchdog.py`, told of each sign of life, and ends the run without one.

A process of its own, since a hanging call may hold Python's lock, and then no thread of the run's can do anything. It
counts seconds by itself, one at a time, and none while the run is stopped (SIGSTOP, Ctrl-Z): a frozen machine or a
paused container stops both, so only time in which the run could have worked is counted.

    python -I -S watchdog_process.py PID DUMP_SIGNAL EXIT_FD       orders come line by line on stdin

It imports the standard library alone, to be started in no time.
"""

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

TICK_SECONDS = 0.5
DUMP_SECONDS = 1.0  # for all stacks to be written
LEAVE_SECONDS = 2.0  # for the run's process to end with exit code 9 before it is killed


class Orders(NamedTuple):
    """What a read of stdin brought; `is_over`: the run has gone."""

    lines: list[str]
    is_over: bool


def is_stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except OSError:  # no /proc
        return False


def orders(seconds: float) -> Iterator[Orders]:
    """What is said within each tick, for ever."""
    rest = b""
    while True:
        ready, _, _ = select.select([0], [], [], seconds)
        if not ready:
            yield Orders([], False)
            continue
        found = os.read(0, 1 << 16)
        *whole, rest = (rest + found).split(b"\n")
        yield Orders([line.decode(errors="replace") for line in whole], not found)


def watch(pid: int, dump_signal: int, exit_fd: int) -> None:
    limit, doing, stacks, silent, is_paused = float("inf"), "starting", "above", 0.0, False
    last = time.monotonic()
    for lines, is_over in orders(TICK_SECONDS):
        now = time.monotonic()
        passed, last = min(now - last, 2 * TICK_SECONDS), now
        if is_over:
            return
        for line in lines:
            word, _, rest = line.partition(" ")
            silent = 0.0
            if word == "limit":
                limit = float(rest)
            elif word == "doing":
                doing = rest
            elif word == "stacks":
                stacks = "in " + rest
            elif word in ("pause", "go"):
                is_paused = word == "pause"
        if not lines and not is_paused and not is_stopped(pid):
            silent += passed
        if silent > limit:
            end(pid, dump_signal, exit_fd, f"no sign of life for {silent:.0f} s while {doing}", stacks)
            return


def end(pid: int, dump_signal: int, exit_fd: int, problem: str, stacks: str) -> None:
    os.kill(pid, dump_signal)
    time.sleep(DUMP_SECONDS)
    text = f"error: {problem}\n  seen:    where each thread was is {stacks}\n"
    text += "  change:  start it again with --resume; it goes on from its last checkpoint\n"
    say(text)
    with contextlib.suppress(OSError):
        os.write(exit_fd, b"x")
    killed_at = time.monotonic() + LEAVE_SECONDS
    for _, is_over in orders(TICK_SECONDS):
        if is_over:  # it ended with exit code 9
            return
        if time.monotonic() > killed_at:
            break
    say("error: the call that hangs holds Python's lock, so the process is killed (SIGKILL, exit code 137)\n")
    os.kill(pid, signal.SIGKILL)


def say(text: str) -> None:
    """To stderr, which may take nothing any more; the run is ended all the same."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the run, whose end this process sees
    try:
        watch(*map(int, sys.argv[1:4]))
    except OSError:  # the run has gone
        sys.exit(0)
