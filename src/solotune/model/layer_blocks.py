"""Stored weights of streamed layers, each layer's as one block of bytes; taken away from the device while loading.

A layer's weights are quantised on the device and wait there for the layer's last one. Then they go where the layer's
block is (host memory in `host_blocks.py`, the cards of several ranks in `sharded_blocks.py`) and are gone from the
device. If the files hold the tensors in another order, those of layers that stay incomplete wait on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import nn

from solotune.model.frozen_linear import FrozenLinear

ALIGNMENT = 256  # bytes: each tensor in a block begins at a multiple of it, as those of CUDA's own allocations
MAX_INCOMPLETE = 2  # layers whose weights wait on the device


class LayerBlock(Protocol):
    """The stored weights of a layer, wherever they are."""

    num_bytes_on_host: int
    num_bytes_on_device: int

    @property
    def num_bytes(self) -> int: ...

    def point_to(self, slot: torch.Tensor) -> None:
        """Make the layer's tensors views of `slot`, which has at least the block's bytes."""
        ...

    def copy_into(self, slot: torch.Tensor) -> None:
        """Begin to copy the block into the first bytes of `slot`, on the current stream."""
        ...


class BlockLayout:
    """Where the tensors of a layer's `FrozenLinear`s are in its block."""

    def __init__(self, layer: nn.Module) -> None:
        self._places: list[tuple[nn.Module, str, int, torch.Tensor]] = []
        self.num_bytes = 0
        for linear in _frozen(layer):
            for part in linear.modules():
                for name, tensor in part._buffers.items():
                    if tensor is not None:
                        self._places.append((part, name, self.num_bytes, tensor.to("meta")))
                        self.num_bytes += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT

    def tensors(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The bytes of each tensor, and where they begin in the block."""
        for part, name, start, _ in self._places:
            tensor = part._buffers[name]
            assert tensor is not None
            yield start, tensor.contiguous().view(-1).view(torch.uint8)

    def point_to(self, block: torch.Tensor) -> None:
        """Make the layer's tensors views of `block`."""
        for part, name, start, like in self._places:
            # .data: copies into the block must not count as changes of what autograd keeps
            some = block.data[start : start + like.numel() * like.element_size()]
            part._buffers[name] = some.view(like.dtype).view(like.shape)

    def drop(self) -> None:
        """Free the layer's tensors; it computes again after `point_to`."""
        for part, name, _, like in self._places:
            part._buffers[name] = torch.empty(0, dtype=like.dtype)


Block = TypeVar("Block", bound=LayerBlock)


class LayerBlocks(Generic[Block]):
    """The blocks of the layers that will be streamed, made while they are loaded."""

    def __init__(
        self, layers: Sequence[nn.Module], frozen: Mapping[str, nn.Module], make: Callable[[nn.Module], Block]
    ) -> None:
        """Args:
        frozen: the linears of the model by their dotted names, before they are replaced by `FrozenLinear`s.
        make: moves the weights of a layer into its block.
        """
        self.make = make
        self.blocks: dict[nn.Module, Block] = {}
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
            self.blocks[layer] = self.make(layer)
            return
        self._incomplete.add(layer)
        if len(self._incomplete) > MAX_INCOMPLETE:
            for linear in _frozen(layer):
                linear.cpu()

    def of(self, layer: nn.Module) -> Block:
        """The layer's block, filled now if its weights came from elsewhere."""
        return self.blocks.get(layer) or self.make(layer)


def _frozen(layer: nn.Module) -> list[FrozenLinear]:
    return [part for part in layer.modules() if isinstance(part, FrozenLinear)]
