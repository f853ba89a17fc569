"""The link between host memory and the GPU (PCIe), measured: it decides what streaming the frozen base costs."""

from __future__ import annotations

import time
from functools import cache

SIZE, TRIES = 64 << 20, 5
SLOW_BYTES_PER_SECOND = 10e9  # 16 lanes of the third generation reach 12; a x4 slot or a riser does not


@cache
def host_to_device_bytes_per_second() -> float:
    """Bytes a second of a copy from pinned memory to the current GPU: the best of some copies of 64 MiB.

    Takes 0.1 s and 64 MiB on both sides. Other work on the link or the card makes it slower.

    Raises:
        RuntimeError: no GPU, or it has no room for the copy.
    """
    import torch

    host = torch.zeros(SIZE, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(SIZE, dtype=torch.uint8, device="cuda")
    best = float("inf")
    for _ in range(TRIES):
        torch.cuda.synchronize()
        started = time.perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return SIZE / best
