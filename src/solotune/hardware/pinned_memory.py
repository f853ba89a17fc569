"""Host memory that is pinned, so that the GPU copies to and from it beside its work.

Memory is allocated first and then pinned: PyTorch's own allocator of pinned memory rounds each block up to a power of
two.

`cudaHostRegister` asks the driver to lock the pages. The limit of `ulimit -l` (RLIMIT_MEMLOCK) is one of `mlock`, and
the driver does not ask for it. What does limit it: free memory, the limit of the container (a cgroup's, see `ram`, in
which pinned pages count), and systems that pin little (WSL) or nothing.

A pinned page belongs to its process: the system frees it when the process ends, however it ends.
"""

from __future__ import annotations

import platform
import weakref
from typing import Any

import torch

from solotune.errors import DeviceError
from solotune.hardware.ram import ram
from solotune.units import mib

NAMES = {
    1: "cudaErrorInvalidValue",
    2: "cudaErrorMemoryAllocation",
    304: "cudaErrorOperatingSystem",
    712: "cudaErrorHostMemoryAlreadyRegistered",
    800: "cudaErrorNotPermitted",
    801: "cudaErrorNotSupported",
}
NO_MEMORY, UNSUPPORTED = (2, 304), (800, 801)


def pinned_bytes(num_bytes: int, device: torch.device) -> torch.Tensor:
    """So many bytes of host memory, pinned if `device` is a GPU; their values are not set.

    Raises:
        DeviceError: the system does not pin them.
    """
    host = torch.empty(num_bytes, dtype=torch.uint8)
    if device.type == "cuda" and num_bytes:
        pin(host)
    return host


def pin(host: torch.Tensor) -> None:
    """Pin the memory of `host` until it is freed.

    Raises:
        DeviceError: the system does not pin it.
        RuntimeError: the card failed before; `gpu_errors` explains it.
    """
    runtime: Any = torch.cuda.cudart()
    found = runtime.cudaHostRegister(host.data_ptr(), host.numel() * host.element_size(), 0)
    if (error := int(found)) and error not in NAMES:  # of a kernel or a copy before it: the card is lost
        raise RuntimeError(f"CUDA error: {runtime.cudaGetErrorString(found)} ({error})")
    if error:
        raise _refusal(error, host.numel() * host.element_size())
    weakref.finalize(host, runtime.cudaHostUnregister, host.data_ptr())


def _refusal(error: int, num_bytes: int) -> DeviceError:
    seen = f"cudaHostRegister of {mib(num_bytes, 0)} MiB gives {NAMES[error]} ({error}); "
    seen += ram().in_words()
    fewer = "stream fewer layers (base_offload: N), or none (base_offload: false)"
    if error in UNSUPPORTED:
        problem, change = "this system does not pin host memory for the GPU", "base_offload: false"
    elif "microsoft" in platform.release():
        problem = "WSL does not pin enough host memory"
        change = f"raise the memory of WSL (memory= in .wslconfig; it pins a part of it), or {fewer}"
    elif error in NO_MEMORY:
        problem = "the system does not pin enough host memory"
        change = f"free host memory, raise the memory limit of the container, or {fewer}"
    else:
        problem, change = "host memory cannot be pinned", fewer
    return DeviceError(f"base_offload, activation_offload: {problem}", seen=seen, change=change)
