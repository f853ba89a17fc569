"""Memory of a device: allocated bytes and peak bytes."""

from __future__ import annotations

import torch


def reset_peak_bytes(device: torch.device) -> None:
    """Reset the peak counter, if the device has one (CUDA)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def allocated_bytes(device: torch.device) -> int:
    """Bytes allocated by tensors on CUDA; 0 on other devices."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_bytes(device: torch.device) -> int:
    """Peak bytes so far: of the allocator on CUDA, of the process's resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
