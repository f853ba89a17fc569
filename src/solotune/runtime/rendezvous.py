"""The store where ranks meet: a small table of keys and texts, kept by torchrun or by rank 0, at MASTER_ADDR.

A client of torch's store waits for ever if another program listens at the port, or if the network is cut while it waits
for an answer. So a connection is made in a thread with a time limit, and the kernel ends one that has become silent.

    store = store_at(address, ...)
    Meeting(store, rank, size, ...).meet(hello)     what each rank says of itself, when all are there
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from solotune.errors import SAID_BY_ANOTHER_RANK, InputError, RankError, is_said
from solotune.runtime import signals
from solotune.runtime.early_ranks import EarlyRanks
from solotune.runtime.heartbeat import Lost
from solotune.units import first_line

T = TypeVar("T")

QUIET_SECONDS = 10.0  # until rank 0 says for whom it waits
ATTEMPT_SECONDS = 5.0
ANSWER_SECONDS = 20.0  # for the first answer of what listens at the port
OWN_SECONDS = 30.0  # until rank 0 reaches its own store
CUT_SECONDS = 45  # without an answer of the other machine's kernel
STAY_SECONDS = 15.0  # how long rank 0 stays for ranks that have yet to come to read which one is lost
READ_SECONDS = 3.0  # until rank 0 has read it
LOOK_SECONDS = 0.3  # between two looks whether another rank knows of one that is lost


def store_at(
    address: tuple[str, int], size: int, training: int, seconds: float, early: EarlyRanks, *, is_server: bool
) -> Any:
    """A connection to the store; with `is_server` it is in this process.

    Args:
        training: how many this process has begun before; each has keys of its own.
        seconds: to wait for rank 0.

    Raises:
        InputError: the port is taken, or nobody answers there.
        RankError: rank 0 is lost, or another rank and rank 0 is not there.
    """
    import torch.distributed as dist

    host, port = address
    until = time.monotonic() + (min(seconds, OWN_SECONDS) if is_server else seconds)
    while True:
        signals.check_stop()
        try:
            early.check()
            _reach(host, port, listens=not is_server)
            store = _connect(host, port, size, is_server, early)
            store.set_timeout(timedelta(seconds=seconds))
            return dist.PrefixStore(f"solotune/{training}", store)
        except RankError as error:
            if error.rank == 0 and (elsewhere := early.ranks_elsewhere()) and not is_said(error):
                _tell(host, port, size, training, early, elsewhere)
            raise
        except (RuntimeError, ValueError, OSError) as error:
            if "EADDRINUSE" in str(error) or "ddress already in use" in str(error):
                raise _taken(f"another process uses port {port} of {host}", str(port)) from None
            if isinstance(error, ValueError) or time.monotonic() > until:
                itself = "; rank 0 is started on the machine with this address" if is_server else ""
                raise InputError(
                    f"MASTER_ADDR, MASTER_PORT: rank 0 does not answer at {host}:{port}{itself}",
                    seen=first_line(error),
                    change="give the address of the machine of rank 0, and a port that its firewall lets through",
                ) from None
            time.sleep(0.2)


def _tell(host: str, port: int, size: int, training: int, early: EarlyRanks, ranks: Sequence[int]) -> None:
    """Keep a store in place of rank 0, which was on this machine, until these ranks have read that it is lost."""
    import torch.distributed as dist

    lost, until = early.lost(), time.monotonic() + STAY_SECONDS
    if lost is None:
        return
    with contextlib.suppress(RuntimeError, ValueError, InputError):  # the port is rank 0's still, which is stopped
        store = dist.PrefixStore(f"solotune/{training}", _connect(host, port, size, True, None))
        store.set("lost", json.dumps(asdict(lost)))
        while not store.check([f"lost/{rank}" for rank in ranks]) and time.monotonic() < until:
            signals.check_stop()
            time.sleep(0.02)


def _taken(what: str, seen: str) -> InputError:
    change = "export MASTER_PORT with another number for all ranks (torchrun: --master-port, --standalone)"
    return InputError(f"MASTER_PORT: {what}", seen=seen, change=change)


def _reach(host: str, port: int, *, listens: bool) -> None:
    """Find the machine, and what listens there: torch's client would write a line about each attempt.

    Raises:
        OSError: there is none (yet).
    """
    if not listens:
        socket.getaddrinfo(host, port)
        return
    with socket.create_connection((host, port), ATTEMPT_SECONDS):
        pass


def _connect(host: str, port: int, size: int, is_server: bool, early: EarlyRanks | None) -> Any:
    """One attempt.

    Raises:
        RuntimeError, ValueError: torch's reason.
        InputError: what listens there is no store.
        RankError: see `store_at`.
    """
    import torch.distributed as dist

    ends: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def attempt() -> None:
        try:
            limit = timedelta(seconds=ATTEMPT_SECONDS)
            ends.put(dist.TCPStore(host, port, size, is_server, limit, wait_for_workers=False, multi_tenant=True))
        except Exception as error:
            ends.put(error)

    threading.Thread(target=attempt, name="rendezvous", daemon=True).start()
    until = time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < until or (early is not None and early.is_absent(0)):
        signals.check_stop()
        if early is not None:
            early.check()
        with contextlib.suppress(queue.Empty):
            found = ends.get(timeout=0.05)
            if isinstance(found, Exception):
                raise found
            _end_when_cut(port)
            return found
    raise _taken(f"what listens at {host}:{port} is not rank 0", "another program")


def _end_when_cut(port: int) -> None:
    """Let the kernel end this process's connections to `port` if the other machine's kernel does not answer.

    The store's client gives no access to its socket, so it is found by the port that it leads to.
    """
    if not hasattr(socket, "TCP_USER_TIMEOUT"):  # not Linux
        return
    options = [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, CUT_SECONDS // 3),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, CUT_SECONDS // 3),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, CUT_SECONDS * 1000),
    ]
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if not os.readlink(path).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(path.name))) as one:
                if one.family in (socket.AF_INET, socket.AF_INET6) and one.getpeername()[1] == port:
                    for level, option, value in options:
                        one.setsockopt(level, option, value)


@dataclass
class Meeting:
    """The ranks of a run find each other in the store, or say who is missing.

    Args:
        until: when those that are there give up (`time.monotonic`).
        early: what is seen of the ranks of this machine.
        note: told once for whom this rank waits, if that takes long.
    """

    store: Any
    rank: int
    size: int
    until: float
    early: EarlyRanks
    note: Callable[[str], None] | None = None

    def meet(self, hello: list[Any], address: tuple[str, int]) -> list[list[Any]]:
        """What each rank says of itself.

        Raises:
            InputError: some ranks do not come, two have one number, or they count differently.
            RankError: one has ended or is stopped.
        """
        self._claim(address)
        self._ask(lambda: self.store.set(f"hello/{self.rank}", json.dumps([*hello, self.size])))
        self._require_size([0], self.wait_for("hello", [0]))  # one that waits for more ranks than there are must end
        found = self.wait_for("hello", range(self.size))
        self._require_size(range(self.size), found)
        return [one[:-1] for one in found]

    def _claim(self, address: tuple[str, int]) -> None:
        """Take this rank's number, before anything is written.

        Raises:
            InputError: another process has it, perhaps one of another run, which this one must not disturb.
        """
        if self._ask(lambda: self.store.add(f"claim/{self.rank}", 1)) > 1:
            raise InputError(
                f"RANK, MASTER_PORT: rank {self.rank} is there already at {address[0]}:{address[1]}",
                seen="another process with this rank, of this run or of another run at this port",
                change="give each process a RANK of its own, and each run a MASTER_PORT of its own",
            )

    def wait_for(self, what: str, ranks: Sequence[int]) -> list[Any]:
        """What these ranks have written under `what`.

        Raises:
            InputError: some have not; rank 0 is the first to say so.
            RankError: one has ended or is stopped.
        """
        keys, begun, told = [f"{what}/{rank}" for rank in ranks], time.monotonic(), False
        until, looked = self.until if self.rank == 0 else self.until + QUIET_SECONDS, begun
        while not self._has(keys):
            signals.check_stop()
            if time.monotonic() > looked + LOOK_SECONDS:
                looked = self._end_if_one_is_lost()
            waited, is_over = time.monotonic() - begun, time.monotonic() > until
            if is_over or (self.note and not told and waited > QUIET_SECONDS):
                missing = [str(rank) for rank in ranks if not self._has([f"{what}/{rank}"])]
                if is_over and missing:
                    raise InputError(
                        f"rank {', '.join(missing)} did not start within {waited:.0f} s",
                        seen=f"{self.size - len(missing)} of {self.size} ranks are there",
                        change="look at what these ranks print, and start all of them at the same time",
                    )
                if self.note:
                    self.note(f"waiting for rank {', '.join(missing)} of {self.size} ranks ...")
                told = True
            time.sleep(0.02)
        return [json.loads(text) for text in self._ask(lambda: self.store.multi_get(keys))]

    def _ask(self, question: Callable[[], T]) -> T:
        """What the store answers; it may be in a rank that is stopped, and then `early` ends this one."""
        with self.early.asking():
            return question()

    def _has(self, keys: Sequence[str]) -> bool:
        return self._ask(lambda: self.store.check(list(keys)))

    def _end_if_one_is_lost(self) -> float:
        """End if this rank sees that one is lost, or another one has; when it was asked.

        Raises:
            RankError: one is lost; all others know it.
        """
        lost = self.early.lost()
        if lost is None and self._has(["lost"]):
            lost = Lost(**json.loads(self._ask(lambda: self.store.get("lost"))))
            self._ask(lambda: self.store.set(f"lost/{self.rank}", "read"))
        if lost is None:
            return time.monotonic()
        raise self.early.error(lost, is_said=lost.rank != 0 and self._rank_0_says(lost))

    def _rank_0_says(self, lost: Lost) -> bool:
        """Let all others know who is lost; whether rank 0 is another one, and knows it.

        Rank 0, which keeps the store, stays until all have read it: those that load libraries come later.
        """
        others = [rank for rank in range(self.size) if rank != lost.rank] if self.rank == 0 else [0]
        until = time.monotonic() + (STAY_SECONDS if self.rank == 0 else READ_SECONDS)
        try:
            self._ask(lambda: self.store.set("lost", json.dumps(asdict(lost))))
            self._ask(lambda: self.store.set(f"lost/{self.rank}", "read"))
            while not (has_read := self._has([f"lost/{rank}" for rank in others])) and time.monotonic() < until:
                signals.check_stop()
                time.sleep(0.02)
        except RuntimeError:  # rank 0 has ended: it has read it
            has_read = True
        return has_read and self.rank != 0

    def _require_size(self, ranks: Sequence[int], found: Sequence[list[Any]]) -> None:
        for rank, (*_, size) in zip(ranks, found, strict=True):
            if size != self.size:
                raise InputError(
                    f"WORLD_SIZE: rank {rank} has another number than rank {self.rank}",
                    seen=f"{size} and {self.size}",
                    allowed="the number of all ranks, the same for each of them",
                )

    @contextlib.contextmanager
    def errors(self, *, is_first_here: bool) -> Iterator[None]:
        """Turn an error of the store into its reason.

        Args:
            is_first_here: whether no rank before this one is on its machine: one of each says it.

        Raises:
            InputError: rank 0 has gone.
        """
        try:
            yield
        except RuntimeError as failed:
            error = InputError(
                "rank 0 has ended before all ranks were there",
                seen=first_line(failed),
                change="look at what rank 0 prints, and start all ranks again",
            )
            if self.rank != 1 and not is_first_here:
                error.add_note(SAID_BY_ANOTHER_RANK)
            raise error from None
