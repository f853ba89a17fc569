"""The store where ranks meet: a small table of keys and texts, kept by torchrun or by rank 0, at MASTER_ADDR."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from solotune.errors import InputError
from solotune.runtime import signals
from solotune.units import first_line

ATTEMPT_SECONDS = 5.0


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
    until = time.monotonic() + seconds
    while True:
        signals.check_stop()
        try:  # in short attempts: a waiting call would not let a signal through
            attempt = timedelta(seconds=ATTEMPT_SECONDS)
            store = dist.TCPStore(host, port, size, is_server, attempt, wait_for_workers=False, multi_tenant=True)
            store.set_timeout(timedelta(seconds=seconds))
            return dist.PrefixStore(f"solotune/{restarts}", store)
        except (RuntimeError, ValueError) as error:
            if "EADDRINUSE" in str(error) or "ddress already in use" in str(error):
                change = "export MASTER_PORT with another number for all ranks (torchrun: --master-port, --standalone)"
                raise InputError(
                    f"MASTER_PORT: another process uses port {port} of {host}", seen=f"{port}", change=change
                ) from None
            if isinstance(error, ValueError) or time.monotonic() > until:
                raise InputError(
                    f"MASTER_ADDR, MASTER_PORT: rank 0 does not answer at {host}:{port}",
                    seen=first_line(error),
                    change="give the address of the machine of rank 0, and a port that its firewall lets through",
                ) from None
