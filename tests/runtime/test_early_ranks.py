"""What the ranks of a machine make of one that is gone or stopped before all have met."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from solotune.errors import RankError, is_said
from solotune.runtime import early_ranks
from solotune.runtime.early_ranks import EarlyRanks
from solotune.runtime.rank_processes import RankProcess, RankProcesses


def seeing(rank: int, *found: RankProcess, size: int = 4) -> EarlyRanks:
    processes = RankProcesses(rank, size, ("127.0.0.1", 29511))
    processes._ranks = list(found)
    return EarlyRanks(processes)


def process(rank: int, state: str = "running", seconds: float = 0.0) -> RankProcess:
    return RankProcess(rank, 1000 + rank, 0, state, seconds)


def test_a_rank_that_is_gone_may_be_started_again_for_a_while() -> None:
    assert seeing(0, process(1, "gone", 14.9), process(2, "running", 500.0)).lost() is None
    lost = seeing(0, process(1, "gone", 15.0), process(2)).lost()
    assert lost is not None
    assert lost.problem.startswith("rank 1 (process 1001 on ")
    assert lost.problem.endswith("has ended before the ranks met: it was killed, crashed or refused to start")
    assert (lost.rank, lost.exit_code, lost.change) == (1, 137, "look at what rank 1 prints")


def test_a_rank_that_is_stopped_is_waited_for_as_after_the_meeting() -> None:
    assert seeing(0, process(1, "stopped", 19.9)).lost() is None
    lost = seeing(0, process(1, "stopped", 20.6)).lost()
    assert lost is not None
    assert lost.problem.endswith("has been stopped (SIGSTOP) for 21 s, before the ranks met")
    assert (lost.rank, lost.exit_code) == (1, 9)


def test_the_first_that_was_lost_is_the_reason() -> None:
    """Others have ended because of it."""
    lost = seeing(0, process(2, "gone", 16.0), process(1, "stopped", 45.0), process(3, "gone", 17.0)).lost()
    assert lost is not None and lost.rank == 1
    lost = seeing(0, process(2, "gone", 30.0), process(1, "stopped", 30.0)).lost()
    assert lost is not None and lost.rank == 2


@pytest.mark.parametrize(
    ("rank", "found", "said"),
    [
        (2, [process(1, "gone", 16), process(0)], True),
        (2, [process(1, "gone", 16), process(0, "gone", 1)], True),  # it has just said it
        (1, [process(0, "gone", 16), process(2)], False),
        (2, [process(0, "gone", 16), process(1)], True),
        (2, [process(0, "gone", 16)], False),
        (0, [process(1, "gone", 16), process(2)], False),
    ],
)
def test_the_first_rank_of_a_machine_says_it(rank: int, found: list[RankProcess], said: bool) -> None:
    early = seeing(rank, *found)
    lost = early.lost()
    assert lost is not None
    assert is_said(early.error(lost)) is said
    assert is_said(early.error(lost, is_said=True))
    assert early.error(lost).change == f"look at what rank {lost.rank} prints; then start all ranks again"


def test_a_rank_that_does_not_reach_rank_0_ends_if_that_is_lost_or_not_there_in_time() -> None:
    seeing(2, process(1, "gone", 15.0 + early_ranks.REACH_SECONDS)).check()
    with pytest.raises(RankError, match="rank 1 "):
        seeing(2, process(1, "gone", 15.1 + early_ranks.REACH_SECONDS)).check()
    with pytest.raises(RankError, match="rank 0 "):
        seeing(2, process(0, "gone", 15.0)).check()


def test_which_ranks_are_elsewhere_or_absent() -> None:
    early = seeing(1, process(0, "stopped"), process(3))
    assert early.ranks_elsewhere() == [2]
    assert [early.is_absent(rank) for rank in range(4)] == [True, False, False, False]


BLOCKED = """
import sys, time
from solotune.runtime import early_ranks, heartbeat, rank_processes
heartbeat.BLOCKED_SECONDS = heartbeat.SILENT_SECONDS = 1.0
heartbeat.STOPPED_SECONDS = 0.5
rank_processes.TICK_SECONDS = 0.05
with early_ranks.watched(1, 2, ("127.0.0.1", 29511), has_agent=False) as early:
    if pid := int(sys.argv[1]):
        started = rank_processes._stat(pid)[2]
        early._processes._ranks.append(rank_processes.RankProcess(0, pid, started))
    with early.asking():
        pass
    time.sleep(2.0)  # it may do other things for any time
    print("asks", flush=True)
    with early.asking():
        time.sleep(60)
"""


@pytest.mark.parametrize("is_here", [True, False])
def test_a_store_in_a_rank_0_that_is_stopped_keeps_nobody(is_here: bool) -> None:
    """The main thread is in a native call, which no signal interrupts."""
    with subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(90)"]) as rank_0:
        os.kill(rank_0.pid, 19)
        os.waitid(os.P_PID, rank_0.pid, os.WSTOPPED | os.WNOWAIT)
        begun = time.monotonic()
        pid = str(rank_0.pid * is_here)
        ended = subprocess.run([sys.executable, "-c", BLOCKED, pid], capture_output=True, text=True, check=False)
        rank_0.kill()
    assert time.monotonic() - begun < 50
    assert (ended.returncode, ended.stdout) == (9, "asks\n"), ended.stderr
    said = f"error: rank 0 (process {rank_0.pid} on " if is_here else "error: rank 0 has not answered for 1 s: "
    assert ended.stderr.startswith(said)
