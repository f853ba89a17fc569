"""Many starts in one directory at once: exactly one may win, and only as long as it lives."""

from __future__ import annotations

import os
import signal
import time

from bench.faults_run import KILLED, Workload
from solotune.config import load_config
from solotune.record import RunDirectory

IN_USE = 4
WAIT_SECONDS = 30.0


def contend(work: Workload, at_once: int) -> str | None:
    """What went wrong in one round; None where one process got the directory and the others were told whose it is."""
    gate_read, gate_write = os.pipe()
    won_read, won_write = os.pipe()

    def start() -> None:
        os.close(gate_write)
        os.read(gate_read, 1)  # until the parent lets go
        RunDirectory.create(load_config(work.keys))
        os.write(won_write, b"%d\n" % os.getpid())
        time.sleep(WAIT_SECONDS)

    children = [work.child(start) for _ in range(at_once)]
    os.close(gate_read)
    os.close(gate_write)
    os.close(won_write)
    winner = int(os.read(won_read, 64).split()[0])
    losers = [work.wait(pid) for pid in children if pid != winner]
    os.kill(winner, signal.SIGKILL)
    killed = work.wait(winner)
    others = os.read(won_read, 64)
    os.close(won_read)
    if others or killed.code != KILLED:
        return f"more than one got it: {others!r}, the first ended with {killed.code}"
    for loser in losers:
        if loser.code != IN_USE or f"process {winner} on " not in loser.said or " since " not in loser.said:
            return f"a loser ended with {loser.code}: {loser.said}"
    again = RunDirectory.create(load_config(work.keys))
    again.release()
    return None
