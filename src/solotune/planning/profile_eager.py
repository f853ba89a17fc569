"""Profile an uncompiled layer: run it on fake tensors and track their allocations."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from solotune.planning.curve_fit import MATMULS, IsFrozen, LayerProfile, PassCounts, first


class Trace(NamedTuple):
    """What is known after one operation."""

    size: float  # bytes of all tensors that are alive
    weights: int  # of the base matrix that it has multiplied
    is_attention: bool


class _Meter(TorchDispatchMode):
    """Counts the bytes of all tensors created within it until they are freed, and the work of each operation."""

    def __init__(self, is_frozen: IsFrozen) -> None:
        super().__init__()
        self.now = self.most = 0.0
        self.is_frozen = is_frozen
        self.work = PassCounts()
        self.moments: list[Trace] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self._known:
                self._known.add(key)  # created before: not counted
                weakref.finalize(tensor.untyped_storage(), self._known.discard, key)
        result = func(*args, **(kwargs or {}))
        fresh = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor) and self._is_new(t)]
        if fresh:
            self._count(func.overloadpacket.__name__, args, fresh)
        return result

    def _is_new(self, tensor: torch.Tensor) -> bool:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return False
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)
        return True

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def _count(self, name: str, args: Any, fresh: Sequence[torch.Tensor]) -> None:
        inputs = [t for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
        size = sum(t.numel() * t.element_size() for t in (*inputs, *fresh))
        self.work.num_kernels += 1
        shapes = [tuple(t.shape) for t in inputs if t.dim() > 1][-2:]
        is_matmul = name in MATMULS and len(shapes) == 2
        is_frozen = is_matmul and self.is_frozen(*shapes[1][-2:])
        self.moments.append(Trace(self.now, math.prod(shapes[1]) if is_frozen else 0, "attention" in name))
        if is_matmul:
            flops = 2.0 * math.prod(shapes[0]) * shapes[1][-1]
            self.work.matmuls.append((flops, size, is_frozen))
        elif "attention" not in name:
            self.work.other_bytes += size


@contextmanager
def metered(is_frozen: IsFrozen = lambda o, i: False) -> Iterator[_Meter]:
    """Count the tensors created within the block; see `_Meter`."""
    meter = _Meter(is_frozen)
    with meter:
        yield meter


def look_eager(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], is_frozen: IsFrozen) -> LayerProfile:
    """Profile the layer as autograd runs it, counting each tensor while it lives. Call it within the fake mode."""
    x = args[0].detach().requires_grad_()
    with metered(is_frozen) as meter:
        y = first(layer(x, *args[1:], **kwargs))
        kept, forward_peak, forward_work = meter.now, meter.most, meter.work
        output = y.numel() * y.element_size()
        meter.work = PassCounts()
        dy = torch.ones_like(y)
        meter.most = meter.now
        torch.autograd.backward(y, dy)
    return LayerProfile(kept, output, forward_peak, meter.most - kept, [forward_work, meter.work])
