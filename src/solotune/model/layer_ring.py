"""Stream the frozen weights of decoder layers through a small ring of buffers on the GPU.

    elsewhere       layer 0 | layer 1 | layer 2 | ... | layer n-1        one block of bytes a layer
                        |         |
    GPU             slot 0    slot 1                                     layer p is always in slot p mod S

Elsewhere is pinned host memory (`host_blocks.py`), or the cards of several ranks (`sharded_blocks.py`).

A frozen layer is read twice a step, in forward and in backward, and never written. While one layer computes, a stream
of its own copies the next one that is needed: upwards in forward, downwards in backward. So the GPU holds S layers
instead of n.

Why each layer has a fixed slot
-------------------------------
The buffers of a layer's `FrozenLinear`s are views of its slot for as long as the model lives. No tensor is exchanged:
compiled code sees the same tensors as before, and a CUDA graph the same addresses. After forward the ring holds the
last S layers, with which backward begins; after backward the first S, with which the next forward begins. So every
pass begins and ends in the same state, and its copies can be recorded with it.

Order between the two streams
-----------------------------
- A copy into a slot waits for the last kernel that read the slot's former layer (`free`).
- The first kernel of a layer waits for its copy (`arrived`).

The same kernels run in the same order on the same numbers, so losses and gradients are bit-equal to those of a base on
the GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from solotune.model.layer_blocks import LayerBlock
from solotune.model.limits import RING_SLOTS


class LayerRing:
    """The streamed layers, in model order, and the ring that they pass through.

    Each layer's `forward` is replaced by one that has its weights; `streamed` does the same for a compiled form of it.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        blocks: Sequence[LayerBlock],
        device: torch.device,
        slots: int = RING_SLOTS,
    ) -> None:
        """Args:
        layers: loaded, in the order in which they run.
        blocks: their frozen weights.
        device: where they compute. On the CPU the ring works the same, without saving anything.
        slots: S, the number of layers on the device at a time; from 2 on, copies run beside compute.
        """
        self.device, self.slots = device, min(slots, len(layers))
        self._position = {layer: position for position, layer in enumerate(layers)}
        self._forwards = [layer.forward for layer in layers]
        self._blocks = blocks
        size = max(block.num_bytes for block in blocks)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(self.slots)]
        for position, block in enumerate(blocks):
            block.point_to(self._slots[position % self.slots])
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.forget()
        for layer in layers:
            layer.forward = self.streamed(layer, layer.forward)

    def __contains__(self, layer: nn.Module) -> bool:
        return layer in self._position

    @property
    def layers(self) -> list[nn.Module]:
        """The streamed layers, in model order."""
        return list(self._position)

    def own_forward(self, layer: nn.Module) -> Callable[..., Any]:
        """The layer's `forward` before it was in the ring."""
        return self._forwards[self._position[layer]]

    def streamed(self, layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` of a layer of the ring with its weights there; its first argument and result are hidden states."""
        position = self._position[layer]

        @functools.wraps(forward)
        def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                y = forward(_Enter.apply(x, self, position), *args, **kwargs)
                if isinstance(y, tuple):
                    return (_Leave.apply(y[0], self, position), *y[1:])
                return _Leave.apply(y, self, position)
            self.enter(position)
            y = forward(x, *args, **kwargs)
            self.leave(position, 1, wraps=True)
            return y

        return run

    @property
    def num_bytes_on_host(self) -> int:
        return sum(block.num_bytes_on_host for block in self._blocks)

    @property
    def num_bytes_on_device(self) -> int:
        parts = sum(block.num_bytes_on_device for block in self._blocks)
        return parts + sum(slot.numel() for slot in self._slots)

    def enter(self, position: int) -> None:
        """Layer `position` computes next: wait for its weights, which are copied now if nothing has done so."""
        slot = position % self.slots
        if self._holds[slot] != position:
            self._copy(position)
        if (arrived := self._arrived[slot]) is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)

    def leave(self, position: int, direction: int, wraps: bool = False) -> None:
        """Layer `position` is done: copy the layer S further up (1) or down (-1) into its slot.

        Args:
            wraps: after the last layers come the first ones, with which the next pass begins.
        """
        if self._copies is not None:
            self._free[position % self.slots] = torch.cuda.current_stream(self.device).record_event()
        further = position + direction * self.slots
        if wraps and further >= len(self._blocks):
            further = position % self.slots
        if 0 <= further < len(self._blocks) and self._holds[further % self.slots] != further:
            self._copy(further)

    def visit(self) -> Iterator[nn.Module]:
        """Each layer in turn, with its weights on the device until the next one is asked for.

        Outside of a layer's own pass its buffers show whichever layer is in its slot, so other readers go through this.
        """
        for layer, position in self._position.items():
            self.enter(position)
            yield layer
            self.leave(position, 1)

    def finish_pass(self) -> None:
        """Bring the ring into the state in which every pass begins, and let the device wait for it."""
        for position in range(self.slots):
            self.enter(position)
        self._free = [None] * self.slots
        self._arrived = [None] * self.slots

    def forget(self) -> None:
        """Treat all slots as empty: each layer is copied when it is needed next."""
        self._holds: list[int | None] = [None] * self.slots
        self._free: list[Any] = [None] * self.slots  # after the last kernel that read the slot
        self._arrived: list[Any] = [None] * self.slots  # after the copy into it; None: long ago

    def _copy(self, position: int) -> None:
        slot, block = position % self.slots, self._blocks[position]
        if self._copies is None:
            block.copy_into(self._slots[slot])
        else:
            self._copies.wait_event(self._free[slot] or torch.cuda.current_stream(self.device).record_event())
            with torch.cuda.stream(self._copies):
                block.copy_into(self._slots[slot])
                self._arrived[slot] = self._copies.record_event()
        self._holds[slot] = position


class _Enter(torch.autograd.Function):
    """Identity before a layer. Backward ends there: all that reads the layer's weights has run."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ring: LayerRing, position: int) -> torch.Tensor:
        ctx.ring, ctx.position = ring, position
        ring.enter(position)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        ctx.ring.leave(ctx.position, -1)
        return grad_outputs[0], None, None


class _Leave(torch.autograd.Function):
    """Identity after a layer. Backward begins there."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, ring: LayerRing, position: int) -> torch.Tensor:
        ctx.ring, ctx.position = ring, position
        if torch._C._current_graph_task_id() == -1:  # not where backward runs a checkpointed layer again
            ring.leave(position, 1)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        ctx.ring.enter(ctx.position)
        return grad_outputs[0], None, None
