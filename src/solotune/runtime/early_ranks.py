"""A rank of this machine has ended, or is stopped, before the ranks have met: the others end too, and say which.

Heartbeats begin when all ranks are there (`heartbeat.py`); until then most of the time goes into loading libraries.
Each rank sees the others' processes from its start on (`rank_processes.py`). What it makes of them:

    gone       lost after `GONE_SECONDS`: a script may start it again
    stopped    lost after as long as `heartbeat` waits for one
    not seen   waited for: it is started later, or on another machine

A rank that knows who is lost lets those on other machines know through the store (`rendezvous.Meeting`). Rank 0 says
it; if rank 0 is the one, the first of a machine.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator

from solotune.errors import SAID_BY_ANOTHER_RANK, RankError
from solotune.runtime import heartbeat, rank_processes
from solotune.runtime.heartbeat import Lost, rank_error
from solotune.runtime.rank_processes import RankProcess, RankProcesses

GONE_SECONDS = 15.0
REACH_SECONDS = 15.0  # to reach rank 0, for a rank that knows who is lost


class EarlyRanks:
    """What one rank makes of the others on its machine, before all have met."""

    def __init__(self, processes: RankProcesses) -> None:
        self.rank, self._processes = processes.rank, processes
        self._asked: list[float] | None = None  # seconds for which the main thread has asked the store
        processes.after_look = self._end_if_blocked

    def lost(self) -> Lost | None:
        """The rank that is lost; None as long as none is known to be."""
        found = [one for one in self._processes.latest().values() if _over(one) >= 0]
        first = max(found, key=_over, default=None)  # others may have ended because of it
        return _lost(first) if first is not None else None

    def is_absent(self, rank: int) -> bool:
        """Whether a rank was seen here, and does not run now."""
        found = self._processes.latest().get(rank)
        return found is not None and found.state != "running"

    def ranks_elsewhere(self) -> list[int]:
        """The ranks that were never seen here."""
        seen = {self.rank, *self._processes.latest()}
        return [rank for rank in range(self._processes.size) if rank not in seen]

    def check(self) -> None:
        """A stopping point of a rank that does not reach rank 0.

        Raises:
            RankError: rank 0 is lost; or another one is, and rank 0 is not there to be told.
        """
        lost = self.lost()
        if lost is not None and (lost.rank == 0 or _over(self._processes.latest()[lost.rank or 0]) > REACH_SECONDS):
            raise self.error(lost)

    def error(self, lost: Lost, *, is_said: bool = False) -> RankError:
        """What this rank ends with.

        Args:
            is_said: another rank is known to say it; else the first one of this machine does.
        """
        error = rank_error(lost, None, "start all ranks again")
        if is_said or self._is_said(lost):
            error.add_note(SAID_BY_ANOTHER_RANK)
        return error

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """The block asks the store. In a rank 0 that is stopped it never answers; a thread ends this process then."""
        self._asked = [0.0]
        try:
            yield
        finally:
            self._asked = None

    def _is_said(self, lost: Lost) -> bool:
        """Whether a rank before this one is on this machine, and sees the same."""
        return any(
            rank < self.rank and rank != lost.rank and _over(one) < 0 for rank, one in self._processes.latest().items()
        )

    def _end_if_blocked(self, passed: float) -> None:
        """End this process if its main thread waits for a store that does not answer; there is nothing to save yet."""
        asked = self._asked
        if asked is None:
            return
        asked[0] += passed
        lost = self.lost()
        if (lost is None or lost.rank != 0) and asked[0] > heartbeat.SILENT_SECONDS:
            what = f"rank 0 has not answered for {asked[0]:.0f} s: it is stopped, its machine or the network has failed"
            lost = Lost(what, heartbeat.HUNG, 0)
        if lost is not None and lost.rank == 0 and asked[0] > heartbeat.BLOCKED_SECONDS:
            if not self._is_said(lost):
                with contextlib.suppress(OSError):
                    os.write(2, f"error: {lost.problem}\n".encode())
            os._exit(lost.exit_code)


@contextlib.contextmanager
def watched(rank: int, size: int, address: tuple[str, int], *, has_agent: bool) -> Iterator[EarlyRanks]:
    """The other ranks, until the end of the block.

    Args:
        has_agent: torchrun has started the ranks, and ends all if one is lost.
    """
    with rank_processes.taken(rank, size, address, has_agent=has_agent) as processes:
        yield EarlyRanks(processes)


def _over(process: RankProcess) -> float:
    """Seconds beyond the limit of its state."""
    limits = {"gone": GONE_SECONDS, "stopped": heartbeat.STOPPED_SECONDS}
    return process.seconds - limits.get(process.state, float("inf"))


def _lost(process: RankProcess) -> Lost:
    who = f"rank {process.rank} (process {process.pid} on {platform.node()})"
    if process.state == "stopped":
        what = f"{who} has been stopped (SIGSTOP) for {process.seconds:.0f} s, before the ranks met"
        return Lost(what, heartbeat.HUNG, process.rank)
    what = f"{who} has ended before the ranks met: it was killed, crashed or refused to start"
    return Lost(what, heartbeat.KILLED, process.rank, change=f"look at what rank {process.rank} prints")
