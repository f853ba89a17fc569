"""Which meeting of the ranks is the current one: torchrun starts ranks again, and a program may train several times.

torchrun's store outlives the ranks, so each meeting has keys of its own there: the number of the training in this
program, and that of the meeting. Rank 0 counts the meetings, in the store. torchrun's count of restarts is no such
number: on each machine it has its own, and it does not count when ranks are started again because those of another
machine were.

A rank that is started again sooner than rank 0 finds the meeting before. It notices, and looks for the next one
(`Moved`): its place there is taken by itself, or the number changes while it waits. A meeting is good only if rank 0
says at its end that all are there (`confirm`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from solotune.errors import InputError
from solotune.runtime.exchange import wait_until
from solotune.runtime.rendezvous import Meeting

TRAININGS: list[int] = []
"""The numbers of the trainings in this process for which the ranks have met; all ranks begin the same ones."""
SERVERS: list[Any] = []
"""Stores in this process; others may still, or again, read in them when their training is over."""
COUNT = "meetings"
PAUSE_SECONDS = 0.05


class Moved(Exception):
    """The meeting is one of earlier; there is, or will be, another one."""


class Place:
    """The keys of one meeting, in a store of torchrun; used like a store."""

    def __init__(self, store: Any, number: int, rank: int) -> None:
        self.number, self._rank = number, rank
        self._all, self._own = store, self.of(store)

    def check(self, keys: Sequence[str]) -> bool:
        """Raises:
        Moved: the ranks meet elsewhere.
        """
        if self._all.add(COUNT, 0) != self.number:
            raise Moved
        return self._own.check(list(keys))

    def add(self, key: str, amount: int) -> int:
        """Raises:
        Moved: this rank has been here, in a process before.
        """
        total = self._own.add(key, amount)
        if total > amount:
            raise Moved
        return total

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def confirm(self) -> None:
        """Wait until rank 0 knows that all are there.

        Raises:
            Moved: it was an earlier meeting.
        """
        if self._rank == 0:
            self._own.set("all are there", "")
        wait_until(lambda: self.check(["all are there"]), lambda: PAUSE_SECONDS)

    def of(self, store: Any) -> Any:
        """The keys of this meeting in a connection to the same store."""
        import torch.distributed as dist

        return dist.PrefixStore(str(self.number), store)


def meet(meeting: Meeting, hello: list[Any], address: tuple[str, int]) -> tuple[Place, list[list[Any]]]:
    """Meet the other ranks in a store of torchrun: where, and what each rank says of itself.

    Raises:
        InputError: some ranks do not come, or they count differently.
    """
    after = 0
    while True:
        place = _current(meeting, after)
        try:
            found = replace(meeting, store=place).meet(hello, address)
            place.confirm()
            return place, found
        except Moved:
            after = place.number


def _current(meeting: Meeting, after: int) -> Place:
    """The meeting that follows number `after`; rank 0 begins it."""
    store, begun = meeting.store, time.monotonic()
    if meeting.rank == 0:
        return Place(store, store.add(COUNT, 1), 0)

    def is_begun() -> bool:
        if time.monotonic() > meeting.until:
            raise InputError(
                f"rank 0 did not start within {time.monotonic() - begun:.0f} s",
                change="look at what it prints, and start all ranks at the same time",
            )
        return store.add(COUNT, 0) > after

    wait_until(is_begun, lambda: PAUSE_SECONDS)
    return Place(store, store.add(COUNT, 0), meeting.rank)
