"""Memory of a device: what tensors take now, and the peak."""

from __future__ import annotations

import torch


def reset_peak_bytes(device: torch.device) -> None:
    """Begins to look for the largest memory anew, where the device can (CUDA)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def allocated_bytes(device: torch.device) -> int:
    """What tensors take now, where the device can say (CUDA); else 0."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_bytes(device: torch.device) -> int:
    """The largest memory so far: the allocator's on CUDA, the process's resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
