"""Small things that ranks give each other through their store: JSON values, under keys of their own.

    exchange.all_gather(value)      one of each rank, in their order
    exchange.tell(value)            rank 0: for all others
    exchange.hear()                 the others: what it was
    exchange.let_pass(first)        the first rank of a machine: the others may go on
    exchange.wait_for(first)        the others

All ranks make the same calls in the same order; a counter makes the keys. Hundreds of ranks may wait for one: each
asks for a single key, and the longer it takes, the rarer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from solotune.runtime import signals

ASK_SECONDS, ASK_PART = (0.005, 0.1), 0.05  # the least and the most between two times; the part of the time so far


@dataclass
class Exchange:
    """The values of this rank and of the others. Errors of the store are RuntimeErrors.

    Args:
        store: a connection to the store of the ranks, which has a key prefix of this run.
    """

    store: Any
    rank: int
    size: int
    _round: int = 0

    def all_gather(self, value: Any) -> list[Any]:
        """A JSON value of each rank, in their order.

        Raises:
            StopRequested: a signal has come, or another rank is lost; so do all that wait here.
        """
        name = self._next("gather")
        keys, is_whole = [f"{name}/{rank}" for rank in range(self.size)], f"{name}/is_whole"
        self.store.set(keys[self.rank], json.dumps(value))
        if self.store.add(f"{name}/count", 1) == self.size:
            self.store.set(is_whole, "")
        self._wait_for(is_whole)
        return [json.loads(text) for text in self.store.multi_get(keys)]

    def tell(self, value: Any) -> None:
        """Rank 0: give the others a JSON value."""
        self.store.set(self._next("broadcast"), json.dumps(value))

    def hear(self) -> Any:
        """The other ranks: the value that rank 0 tells."""
        key = self._next("broadcast")
        self._wait_for(key)
        return json.loads(self.store.get(key))

    def let_pass(self, first: int) -> None:
        """The rank `first`: let those go on that wait for it."""
        self.store.set(f"{self._next('first')}/{first}", "done")

    def wait_for(self, first: int) -> None:
        """The others of its machine."""
        self._wait_for(f"{self._next('first')}/{first}")

    def _next(self, kind: str) -> str:
        self._round += 1
        return f"{kind}/{self._round}"

    def _wait_for(self, key: str) -> None:
        begun, (least, most) = time.monotonic(), ASK_SECONDS
        wait_until(
            lambda: self.store.check([key]), lambda: min(max(least, ASK_PART * (time.monotonic() - begun)), most)
        )


def wait_until(is_done: Callable[[], bool], pause: Callable[[], float]) -> None:
    """Ask until it is done.

    Args:
        pause: seconds until the next time.

    Raises:
        StopRequested: a signal has come, or another rank is lost (`RankLost`).
    """
    while not is_done():
        signals.check_stop()
        time.sleep(pause())
