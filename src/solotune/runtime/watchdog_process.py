"""The process that watches a run: started by `watchdog.py`, it receives beats and ends the run if they stop.

It is a separate process because a hanging call may hold Python's global lock, and then no thread of the run can act. It
counts seconds one by one, and none while the run is stopped (SIGSTOP, Ctrl-Z): a frozen machine or a paused container
stops both, so only time in which the run could have worked is counted.

    python -I -S watchdog_process.py PID DUMP_SIGNAL EXIT_FD       orders come line by line on stdin

It imports only the standard library, so that it starts fast.
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
DUMP_SECONDS = 1.0  # time to write all stacks
LEAVE_SECONDS = 2.0  # time for the run to exit with code 9 before it is killed


class Orders(NamedTuple):
    """Lines from one read of stdin; `is_over`: the run has ended."""

    lines: list[str]
    is_over: bool


def is_stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except OSError:  # no /proc
        return False


def orders(seconds: float) -> Iterator[Orders]:
    """Orders of each tick, without end."""
    rest = b""
    while True:
        ready, _, _ = select.select([0], [], [], seconds)
        if not ready:
            yield Orders([], False)
            continue
        content = os.read(0, 1 << 16)
        *lines, rest = (rest + content).split(b"\n")
        yield Orders([line.decode(errors="replace") for line in lines], not content)


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
            end(pid, dump_signal, exit_fd, f"no progress for {silent:.0f} s while {doing}", stacks)
            return


def end(pid: int, dump_signal: int, exit_fd: int, problem: str, stacks: str) -> None:
    os.kill(pid, dump_signal)
    time.sleep(DUMP_SECONDS)
    text = f"error: {problem}\n  seen:    the stack of each thread is {stacks}\n"
    text += "  change:  start it again with --resume; it continues from the last checkpoint\n"
    say(text)
    with contextlib.suppress(OSError):
        os.write(exit_fd, b"x")
    killed_at = time.monotonic() + LEAVE_SECONDS
    for _, is_over in orders(TICK_SECONDS):
        if is_over:  # it exited with code 9
            return
        if time.monotonic() > killed_at:
            break
    say("error: the hanging call holds Python's global lock, so the process is killed (SIGKILL, exit code 137)\n")
    os.kill(pid, signal.SIGKILL)


def say(text: str) -> None:
    """Write to stderr; if that fails, the run is ended all the same."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the run; this process notices when it ends
    try:
        watch(*map(int, sys.argv[1:4]))
    except OSError:  # the run has ended
        sys.exit(0)
