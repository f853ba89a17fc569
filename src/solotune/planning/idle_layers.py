"""Run a model with layers that do nothing: what is around them, and what they are called with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


@contextmanager
def idle_layers(
    layers: nn.ModuleList, gives_tuple: bool, seen: Any = None, returns_copies: bool = False
) -> Iterator[None]:
    """Within the block the layers return their input unchanged; `seen` gets the arguments of each call.

    Without `seen`, the output of the first layer requires a gradient, as it would with adapters.

    Args:
        gives_tuple: of `returns_tuple`.
        returns_copies: return a copy of the input, as large as a layer's own output.
    """

    def stub(layer: nn.Module) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            if seen is not None:
                seen(args, dict(kwargs))
            elif layer is layers[0]:
                x = x.detach().requires_grad_()
            y = x.clone() if returns_copies else x
            return (y,) if gives_tuple else y

        return run

    for layer in layers:
        layer.forward = stub(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class _Enough(Exception):
    """Stops the model after its first layer."""


def returns_tuple(module: PreTrainedModel, layers: nn.ModuleList) -> bool:
    """Whether a layer of this architecture returns more than its hidden states."""
    found: list[bool] = []

    def look(_: nn.Module, __: Any, result: Any) -> None:
        found.append(isinstance(result, tuple))
        raise _Enough

    handle = layers[0].register_forward_hook(look)
    with torch.no_grad(), contextlib.suppress(_Enough, RuntimeError):
        module.base_model(input_ids=torch.zeros(1, 8, dtype=torch.int64), use_cache=False)
    handle.remove()
    return bool(found and found[0])
