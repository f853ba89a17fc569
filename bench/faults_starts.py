"""Many starts in one directory at once: exactly one may win, and only as long as it lives."""

from __future__ import annotations

import os
import select
import signal
import time

from bench.faults_run import KILLED, Workload
from solotune.config.load import load_config
from solotune.run.run_dir import RunDirectory

IN_USE = 4
HOLD_SECONDS = 600.0  # longer than any other takes to see that it has lost


def contend(work: Workload, at_once: int) -> str | None:
    """What went wrong in one round; None where one process got the directory and the others were told whose it is."""
    gate_read, gate_write = os.pipe()
    won_read, won_write = os.pipe()

    def start() -> None:
        os.close(gate_write)
        os.read(gate_read, 1)  # until the parent lets go
        RunDirectory.create(load_config(work.keys).output_dir)
        os.write(won_write, b"%d\n" % os.getpid())
        time.sleep(HOLD_SECONDS)

    children = [work.child(start) for _ in range(at_once)]
    for pipe in (gate_read, gate_write, won_write):
        os.close(pipe)
    winner, *second = map(int, os.read(won_read, 4096).split() or [0])  # two may have written before the first read
    waiting, losers = set(children) - {winner}, []
    while waiting and not second and winner:
        if select.select([won_read], [], [], 0.005)[0]:
            second = [*map(int, os.read(won_read, 4096).split())]
        ended = {pid: outcome for pid in waiting if (outcome := work.ended(pid))}
        losers += ended.values()
        waiting -= set(ended)
    os.close(won_read)
    if not winner:
        return f"no process got it: {[work.wait(pid) for pid in children]}"
    for pid in (winner, *waiting):
        os.kill(pid, signal.SIGKILL)
        killed = work.wait(pid)
    if second:
        return f"{second[0]} got it as well as {winner}"
    if killed.code != KILLED:
        return f"the winner ended with {killed.code}: {killed.said}"
    for loser in losers:
        if loser.code != IN_USE or f"process {winner} on " not in loser.said or " since " not in loser.said:
            return f"a loser ended with {loser.code}: {loser.said}"
    again = RunDirectory.create(load_config(work.keys).output_dir)
    again.release()
    return None
