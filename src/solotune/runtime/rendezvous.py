"""The store where ranks meet: a small table of keys and texts, kept by torchrun or by rank 0, at MASTER_ADDR.

A client of torch's store waits for ever if another program listens at the port, or if the network is cut while it waits
for an answer. So a connection is made in a thread with a time limit, and the kernel ends one that has become silent.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from solotune.errors import InputError
from solotune.runtime import signals
from solotune.units import first_line

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
