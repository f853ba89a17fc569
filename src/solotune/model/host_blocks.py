"""Stored weights of layers in pinned host memory, one block a layer.

They go there from the device in one direction (`layer_blocks.py`), so the host never holds a weight twice, and copies
run at the speed of the link.
"""

from __future__ import annotations

import torch
from torch import nn

from solotune.hardware.pinned_memory import pinned_bytes
from solotune.model.layer_blocks import BlockLayout


class HostBlock:
    """The stored tensors of a layer in one block of bytes on the host."""

    num_bytes_on_device = 0

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        """Move the tensors of the layer's `FrozenLinear`s there.

        Raises:
            DeviceError: the system does not pin so much memory.
        """
        layout = BlockLayout(layer)
        self.host = pinned_bytes(layout.num_bytes, device)
        for start, tensor in layout.tensors():
            self.host[start : start + tensor.numel()].copy_(tensor)
        layout.point_to(self.host)
        self.point_to = layout.point_to

    @property
    def num_bytes(self) -> int:
        return self.host.numel()

    @property
    def num_bytes_on_host(self) -> int:
        return self.host.numel()

    def copy_into(self, slot: torch.Tensor) -> None:
        """Begin to copy the block into the first bytes of `slot`, on the current stream."""
        slot[: self.host.numel()].copy_(self.host, non_blocking=True)
