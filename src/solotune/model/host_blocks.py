"""Stored weights of layers in pinned host memory, one block a layer; filled while the model is loaded.

A layer's weights are quantised on the GPU and wait there for the layer's last one. Then they go to its block in one
direction and are gone from the GPU. So the host never holds a weight twice, and copies run at the speed of the link. If
the files hold the tensors in another order, those of layers that stay incomplete wait on the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from solotune.hardware.pinned_memory import pinned_bytes
from solotune.model.frozen_linear import FrozenLinear

ALIGNMENT = 256  # bytes: each tensor in a block begins at a multiple of it, as those of CUDA's own allocations
MAX_INCOMPLETE = 2  # layers whose weights wait on the GPU


class HostBlock:
    """The stored tensors of a layer in one block of bytes on the host."""

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        """Move the tensors of the layer's `FrozenLinear`s there.

        Raises:
            DeviceError: the system does not pin so much memory.
        """
        self._places: list[tuple[nn.Module, str, int, torch.Tensor]] = []
        end = 0
        for linear in _frozen(layer):
            for part in linear.modules():
                for name, tensor in part._buffers.items():
                    if tensor is not None:
                        self._places.append((part, name, end, tensor.to("meta")))
                        end += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        self.host = pinned_bytes(end, device)
        for part, name, start, shape in self._places:
            tensor = part._buffers[name]
            assert tensor is not None
            view = _view(self.host, start, shape)
            part._buffers[name] = view.copy_(tensor)

    def point_to(self, slot: torch.Tensor) -> None:
        """Make the layer's tensors views of `slot`, which has at least the block's bytes."""
        for part, name, start, shape in self._places:
            # .data: copies into the slot must not count as changes of what autograd keeps
            part._buffers[name] = _view(slot.data, start, shape)


class HostBlocks:
    """The blocks of the layers that are loaded for host memory."""

    def __init__(self, layers: Sequence[nn.Module], frozen: Mapping[str, nn.Module], device: torch.device) -> None:
        """Args:
        frozen: the linears of the model by their dotted names, before they are replaced by `FrozenLinear`s.
        """
        self.device = device
        self.blocks: dict[nn.Module, HostBlock] = {}
        layer_of = {part: layer for layer in layers for part in layer.modules()}
        self._layer_of = {name: layer_of[linear] for name, linear in frozen.items() if linear in layer_of}
        self._left = dict.fromkeys(layers, 0)
        for name, layer in self._layer_of.items():
            self._left[layer] += sum(tensor is not None for tensor in frozen[name]._parameters.values())
        self._incomplete: set[nn.Module] = set()

    def loaded(self, name: str) -> None:
        """A tensor of this linear was stored; the last one of a layer moves the layer."""
        if (layer := self._layer_of.get(name)) is None:
            return
        self._left[layer] -= 1
        if not self._left[layer]:
            self._incomplete.discard(layer)
            self.blocks[layer] = HostBlock(layer, self.device)
            return
        self._incomplete.add(layer)
        if len(self._incomplete) > MAX_INCOMPLETE:
            for linear in _frozen(layer):
                linear.cpu()

    def of(self, layer: nn.Module) -> HostBlock:
        """The layer's block, filled now if its weights came from elsewhere."""
        return self.blocks.get(layer) or HostBlock(layer, self.device)


def _frozen(layer: nn.Module) -> list[FrozenLinear]:
    return [part for part in layer.modules() if isinstance(part, FrozenLinear)]


def _view(block: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    return block[start : start + like.numel() * like.element_size()].view(like.dtype).view(like.shape)
