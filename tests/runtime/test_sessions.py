"""Ranks that are started again meet again, in whichever order they come; and a program that trains twice."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import Ranks

from solotune.errors import InputError
from solotune.runtime import sessions, signals
from solotune.runtime.early_ranks import EarlyRanks
from solotune.runtime.rank_processes import RankProcesses
from solotune.runtime.rendezvous import Meeting
from solotune.runtime.world import World, joined

ADDRESS = ("node", 29500)


def meet(store: Any, rank: int, who: str, seconds: float = 10.0) -> tuple[int, list[str]]:
    early = EarlyRanks(RankProcesses(rank, 2, ADDRESS))
    meeting = Meeting(store, rank, 2, time.monotonic() + seconds, early)
    place, found = sessions.meet(meeting, [who], ADDRESS)
    assert place.of(store).check([f"claim/{rank}"])
    return place.number, [one[0] for one in found]


@pytest.mark.parametrize("first", ["all", "rank 0 alone"])
def test_a_rank_that_is_started_again_before_rank_0_waits_for_it(first: str) -> None:
    """On each machine torchrun counts restarts of its own: a count in the environment could not tell.

    first: who was in the meeting before; a rank may have died before it came.
    """
    store = dist.HashStore()
    with ThreadPoolExecutor(4) as pool:
        before: list[Future[Any]] = [pool.submit(meet, store, 0, "old 0", 1.0)]
        if first == "all":
            before.append(pool.submit(meet, store, 1, "old 1"))
            assert [one.result(10) for one in before] == [(1, ["old 0", "old 1"])] * 2
        else:
            with pytest.raises(InputError, match="rank 1 did not start"):
                before[0].result(10)
        early = pool.submit(meet, store, 1, "new 1")
        time.sleep(0.3)
        assert not early.done()
        assert meet(store, 0, "new 0") == early.result(10) == (2, ["new 0", "new 1"])


def test_rank_0_that_does_not_come_again_is_named() -> None:
    with pytest.raises(InputError, match="rank 0 did not start within 0 s"):
        meet(dist.HashStore(), 1, "alone", 0.2)


def test_a_program_trains_twice_on_the_same_ranks(tmp_path: Path) -> None:
    """Rank 1 begins the second training while rank 0 still works on the end of the first, with the store in it."""

    def work(rank: int) -> int:
        import os

        for number in range(2):
            world = World.of_environment(os.environ)
            with signals.handle_signals(), joined(world, lambda error: {"how": "failed"}, seconds=20):
                found = world.all_gather([number, rank])
                if rank == 0:
                    world.leave({"how": "finished"})
            if rank == 0 and number == 0:
                time.sleep(0.5)
            print(found, flush=True)
        return 0

    ranks = Ranks(2, work, tmp_path)
    assert ranks.ends(60) == [0, 0], ranks.said(0) + ranks.said(1)
    assert ranks.said(0) == ranks.said(1) == "[[0, 0], [0, 1]]\n[[1, 0], [1, 1]]\n"
