"""Run a function as several ranks: processes forked from this one, which has torch loaded already."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

SECONDS = 120.0


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What a launcher without a store of its own sets."""
    values = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in values.items()} | {"TOKENIZERS_PARALLELISM": "false"}


class Ranks:
    """Forked processes, one for each rank; `ends` waits for all."""

    def __init__(self, size: int, work: Callable[[int], int], folder: Path, also: Mapping[str, str] | None = None):
        """Args:
        work: called in each process with its rank; its result is the exit code.
        folder: each rank's stdout and stderr go to `rank-N.txt` there.
        also: more environment variables.
        """
        port = free_port()
        self.folder, self.pids = folder, [0] * size
        for rank in range(size):
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                _become(work, rank, {**environment(rank, size, port), **(also or {})}, folder / f"rank-{rank}.txt")
            self.pids[rank] = pid

    def ends(self, seconds: float = SECONDS) -> list[int]:
        """The exit code of each rank; minus the signal that killed it."""
        codes: dict[int, int] = {}
        until = time.monotonic() + seconds
        while len(codes) < len(self.pids):
            for rank, pid in enumerate(self.pids):
                if rank in codes:
                    continue
                if time.monotonic() > until:
                    os.kill(pid, signal.SIGKILL)
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        return [codes[rank] for rank in range(len(self.pids))]

    def said(self, rank: int) -> str:
        return (self.folder / f"rank-{rank}.txt").read_text(encoding="utf-8")


def _become(work: Callable[[int], int], rank: int, variables: Mapping[str, str], output: Path) -> None:
    """Do a rank's work in this forked process, and end it: nothing of the test process runs here any more."""
    code = 1
    try:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for number in (1, 2):
            os.dup2(handle, number)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for the life of this process
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        os.environ.update(variables)
        code = work(rank)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)
