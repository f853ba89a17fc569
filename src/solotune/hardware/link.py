"""The link between host memory and the GPU (PCIe), measured: it decides what streaming the frozen base costs."""

from __future__ import annotations

import subprocess
import time
from functools import cache
from typing import Any, NamedTuple

SIZE, TRIES = 64 << 20, 5
ROUNDS, PAUSE_SECONDS, GAIN = 6, 0.05, 1.02
SLOW_BYTES_PER_SECOND = 10e9  # 16 lanes of the third generation reach 12; a x4 slot or a riser does not
LANE_BYTES = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
"""Bytes a second that one lane of a PCIe generation carries, encoding included."""
REACHED = 0.78
"""Share of it that copies from pinned memory reach at least: 0.78 to 0.87 where nothing else uses the link."""
EXPECTED = 0.75
"""A measured link below this share of what its lanes reach is busy, or held up elsewhere."""


@cache
def host_to_device_bytes_per_second() -> float:
    """Bytes a second of a copy from pinned memory to the current GPU: the best of some copies of 64 MiB.

    Other work on the link or the card makes copies slower, and a link that slept begins slowly. So copies are measured
    in rounds with pauses between them, until a round is not faster than those before it. Takes 0.1 to 0.4 s, and 64 MiB
    on both sides.

    Raises:
        RuntimeError: no GPU, or it has no room for the copy.
    """
    import torch

    host = torch.zeros(SIZE, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(SIZE, dtype=torch.uint8, device="cuda")

    def copy() -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    return SIZE / best_seconds(copy)


def best_seconds(copy: Any) -> float:
    """The least seconds of `copy()`, which returns its own: rounds of some tries, until one is no faster."""
    best = float("inf")
    for number in range(ROUNDS):
        if number:
            time.sleep(PAUSE_SECONDS)
        before, best = best, min(best, *(copy() for _ in range(TRIES)))
        if before < GAIN * best:
            break
    return best


class Lanes(NamedTuple):
    """How the card is connected now, and how card and system could be."""

    generation: int
    width: int
    max_generation: int
    max_width: int

    @property
    def possible(self) -> float:
        """Bytes a second that copies from pinned memory reach over all lanes; 0: not known."""
        return REACHED * self.max_width * LANE_BYTES.get(self.max_generation, 0.0)


def lanes() -> Lanes | None:
    """From nvidia-smi, of the first GPU; None where it does not say (virtual machines, no PCIe).

    A card that does nothing lowers its generation to save power, so a low one alone is no fault.
    """
    keys = ("pcie.link.gen.current", "pcie.link.width.current", "pcie.link.gen.max", "pcie.link.width.max")
    command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return Lanes(*(int(field) for field in done.stdout.splitlines()[0].split(",")))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError, TypeError):
        return None
