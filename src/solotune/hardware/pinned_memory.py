"""Host memory that the GPU reads and writes by itself: pinned blocks, and host tensors that kernels read in place.

Blocks are allocated unpinned and then pinned (`cudaHostRegister`): PyTorch's own allocator of pinned memory rounds each
block up to a power of two.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from solotune.errors import DeviceError
from solotune.units import mib


def pinned(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Pin a tensor of the host until it is freed; on the CPU nothing is done.

    Raises:
        DeviceError: the system does not pin so much memory.
    """
    if device.type != "cuda" or not host.numel():
        return host
    runtime: Any = torch.cuda.cudart()
    size = host.numel() * host.element_size()
    if error := int(runtime.cudaHostRegister(host.data_ptr(), size, 0)):
        raise DeviceError(
            "base_offload, activation_offload: the system does not pin enough host memory",
            seen=f"cudaHostRegister of {mib(size, 0)} MiB gives error {error}",
            change="raise the limit of locked memory (ulimit -l), or offload fewer layers (base_offload: N)",
        )
    weakref.finalize(host, runtime.cudaHostUnregister, host.data_ptr())
    return host


def on_device_in_place(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of `device` whose values stay in host memory: kernels read them over the link, each time.

    Args:
        host: contiguous and pinned. It must live as long as the result, which keeps it.

    Raises:
        RuntimeError: the driver gives pinned memory another address on the device.
    """
    if device.type != "cuda":
        return host
    there = torch.as_tensor(_HostBytes(host), device=device)
    return there.view(host.dtype).view(host.shape)


class _HostBytes:
    """The bytes of a pinned tensor as memory that CUDA reads (CUDA array interface, version 3).

    With unified addressing, pinned memory has one address on host and device. PyTorch asks the driver which device an
    address belongs to, and keeps this object, so the tensor, alive.
    """

    def __init__(self, host: torch.Tensor) -> None:
        self.host = host

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.host.numel() * self.host.element_size(),),
            "typestr": "|u1",
            "data": (self.host.data_ptr(), False),
            "version": 3,
        }
