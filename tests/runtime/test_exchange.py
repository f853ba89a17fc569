"""Small things between ranks, at a real store, each rank in a thread."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from solotune.runtime.exchange import Exchange


class Counted:
    """A store that notes the keys of each question."""

    def __init__(self, store: Any) -> None:
        self.store, self.asked = store, list[list[str]]()

    def check(self, keys: list[str]) -> bool:
        self.asked.append(keys)
        return self.store.check(keys)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def test_each_rank_gets_what_the_others_give() -> None:
    store = dist.HashStore()

    def work(rank: int) -> list[Any]:
        exchange = Exchange(store, rank, 3)
        gathered = [exchange.all_gather({"rank": rank}), exchange.all_gather(None)]
        told = exchange.tell("folder") if rank == 0 else exchange.hear()
        exchange.let_pass(0) if rank == 0 else exchange.wait_for(0)
        return [*gathered, told, exchange.all_gather(rank)]

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(work, range(3)))
    everything = [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert found == [[everything, [None] * 3, told, [0, 1, 2]] for told in (None, "folder", "folder")]


def test_who_waits_asks_for_one_key_and_ever_more_rarely() -> None:
    """512 ranks that asked 200 times a second for 512 keys each kept the store busy."""
    asks = Counted(dist.HashStore())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(Exchange(asks, 0, 2).all_gather, "early")
        time.sleep(1.0)
        Exchange(asks.store, 1, 2).all_gather("late")
        assert waiting.result(5) == ["early", "late"]
    assert all(len(keys) == 1 for keys in asks.asked)
    assert 10 < len(asks.asked) < 90
