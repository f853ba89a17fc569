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
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from solotune.errors import SAID_BY_ANOTHER_RANK, InputError
from solotune.runtime import signals
from solotune.units import first_line

QUIET_SECONDS = 10.0  # until rank 0 says for whom it waits
ATTEMPT_SECONDS = 5.0
ANSWER_SECONDS = 20.0  # for the first answer of what listens at the port
OWN_SECONDS = 30.0  # until rank 0 reaches its own store
CUT_SECONDS = 45  # without an answer of the other machine's kernel


def store_at(address: tuple[str, int], size: int, restarts: int, seconds: float, *, is_server: bool) -> Any:
    """A connection to the store; with `is_server` it is in this process.

    Args:
        restarts: how often the ranks were started again; each time they have keys of their own.
        seconds: to wait for rank 0.

    Raises:
        InputError: the port is taken, or nobody answers there.
    """
    import torch.distributed as dist

    host, port = address
    until = time.monotonic() + (min(seconds, OWN_SECONDS) if is_server else seconds)
    while True:
        signals.check_stop()
        try:
            _reach(host, port, listens=not is_server)
            store = _connect(host, port, size, is_server)
            store.set_timeout(timedelta(seconds=seconds))
            return dist.PrefixStore(f"solotune/{restarts}", store)
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


def _connect(host: str, port: int, size: int, is_server: bool) -> Any:
    """One attempt.

    Raises:
        RuntimeError, ValueError: torch's reason.
        InputError: what listens there is no store.
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
    while time.monotonic() < until:
        signals.check_stop()
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
        note: told once for whom this rank waits, if that takes long.
    """

    store: Any
    rank: int
    size: int
    until: float
    note: Callable[[str], None] | None = None

    def meet(self, hello: list[Any], address: tuple[str, int]) -> list[list[Any]]:
        """What each rank says of itself.

        Raises:
            InputError: some ranks do not come, two have one number, or they count differently.
        """
        self._claim(address)
        self.store.set(f"hello/{self.rank}", json.dumps([*hello, self.size]))
        self._require_size([0], self.wait_for("hello", [0]))  # one that waits for more ranks than there are must end
        found = self.wait_for("hello", range(self.size))
        self._require_size(range(self.size), found)
        return [one[:-1] for one in found]

    def _claim(self, address: tuple[str, int]) -> None:
        """Take this rank's number, before anything is written.

        Raises:
            InputError: another process has it, perhaps one of another run, which this one must not disturb.
        """
        if self.store.add(f"claim/{self.rank}", 1) > 1:
            raise InputError(
                f"RANK, MASTER_PORT: rank {self.rank} is there already at {address[0]}:{address[1]}",
                seen="another process with this rank, of this run or of another run at this port",
                change="give each process a RANK of its own, and each run a MASTER_PORT of its own",
            )

    def wait_for(self, what: str, ranks: Sequence[int]) -> list[Any]:
        """What these ranks have written under `what`.

        Raises:
            InputError: some have not; rank 0 is the first to say so.
        """
        keys, begun, told = [f"{what}/{rank}" for rank in ranks], time.monotonic(), False
        until = self.until if self.rank == 0 else self.until + QUIET_SECONDS
        while not self.store.check(keys):
            signals.check_stop()
            waited, is_over = time.monotonic() - begun, time.monotonic() > until
            if is_over or (self.note and not told and waited > QUIET_SECONDS):
                missing = [str(rank) for rank in ranks if not self.store.check([f"{what}/{rank}"])]
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
        return [json.loads(text) for text in self.store.multi_get(keys)]

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
