"""Keep the inputs of checkpointed layers in host memory between forward and backward.

    forward    layer k runs            its input goes to the host
    backward   layer k is recomputed   the input of layer k - 1 arrives

Copies run on a stream of their own beside compute, in both directions through one pinned block a layer. So the GPU
holds the inputs of two layers instead of all. The last checkpointed layer keeps its input on the GPU (`layers.py`):
backward needs it at once.

Order between the streams
-------------------------
- A copy to the host waits for the kernels that wrote the input. The input is freed when the next layer starts, which
  waits for the copy.
- A copy back goes into memory that was free when it was asked for. Recomputing waits for it.

Blocks have fixed addresses, so the copies can be recorded in a CUDA graph. A block belongs to one pass at a time: a
second forward before the first one's backward would overwrite it, which is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from solotune.hardware.pinned_memory import pinned_bytes


class _OnHost(NamedTuple):
    """What autograd keeps of an input that is in a block."""

    number: int
    passes: int  # the pass that wrote it
    dtype: torch.dtype
    shape: torch.Size


class HostActivations:
    """Inputs of the layers of one model, by the layers' numbers."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._blocks: dict[int, torch.Tensor] = {}
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._passes = 0
        self.forget()

    @property
    def num_bytes_on_host(self) -> int:
        return sum(block.numel() for block in self._blocks.values())

    def forget(self) -> None:
        """Drop what an interrupted pass left."""
        self._leaving: tuple[torch.Tensor, Any] | None = None  # an input and the event after its copy
        self._arriving: dict[int, tuple[torch.Tensor, Any]] = {}
        self._sent: dict[int, _OnHost] = {}

    def keeping(self, number: int, checkpointed: Callable[..., Any]) -> Callable[..., Any]:
        """A checkpointed layer whose first argument goes to the host; what else it keeps is shared by all layers."""

        def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            address, shape = x.data_ptr(), x.shape  # not x: autograd keeps `pack`

            def pack(kept: torch.Tensor) -> Any:
                is_input = kept.data_ptr() == address and kept.shape == shape
                return self._send(number, kept.detach()) if is_input else kept

            def unpack(kept: Any) -> torch.Tensor:
                return self._bring_back(kept) if isinstance(kept, _OnHost) else kept

            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                return checkpointed(x, *args, **kwargs)

        return run

    def _send(self, number: int, x: torch.Tensor) -> _OnHost:
        if number == 0:  # a pass begins
            self.forget()
            self._passes += 1
        self._let_go()
        x = x.contiguous()
        block, what = self._block(number, x), _OnHost(number, self._passes, x.dtype, x.shape)
        if self._copies is None:
            block.copy_(_bytes(x))
        else:
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._copies):
                block.copy_(_bytes(x), non_blocking=True)
                self._leaving = x, self._copies.record_event()
        self._sent[number] = what
        return what

    def _bring_back(self, what: _OnHost) -> torch.Tensor:
        if what.passes != self._passes:
            raise RuntimeError("activation_offload: backward of a pass after the forward of another one")
        self._let_go()
        found, arrived = self._arriving.pop(what.number, None) or self._fetch(what)
        self._sent.pop(what.number, None)
        if (before := self._sent.get(what.number - 1)) is not None:
            self._arriving[before.number] = self._fetch(before)
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)
        return found.view(what.dtype).view(what.shape)

    def _fetch(self, what: _OnHost) -> tuple[torch.Tensor, Any]:
        """Begin the copy of an input to the device; (its bytes, the event after the copy)."""
        size = what.shape.numel() * what.dtype.itemsize
        into = torch.empty(size, dtype=torch.uint8, device=self.device)
        host = self._blocks[what.number][:size]
        if self._copies is None:
            into.copy_(host)
            return into, None
        self._copies.wait_stream(torch.cuda.current_stream(self.device))  # kernels that used this memory before
        with torch.cuda.stream(self._copies):
            into.copy_(host, non_blocking=True)
            return into, self._copies.record_event()

    def _let_go(self) -> None:
        """Free the input that was copied last; its memory is used again after the copy."""
        if self._leaving is not None:
            torch.cuda.current_stream(self.device).wait_event(self._leaving[1])
            self._leaving = None

    def _block(self, number: int, x: torch.Tensor) -> torch.Tensor:
        size = x.numel() * x.element_size()
        if number not in self._blocks or self._blocks[number].numel() < size:
            if self._copies is not None:
                self._copies.synchronize()  # the old block may still be read
            self._blocks.pop(number, None)
            self._blocks[number] = pinned_bytes(size, self.device)
        return self._blocks[number][:size]


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1).view(torch.uint8)
