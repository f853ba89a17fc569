"""Access to the model in a probe: its adapters, switches for them, and a context that restores it bit for bit.

Works for any transformers model with adapters of PEFT, of solotune, or with parameters named `lora_A` and `lora_B`.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from solotune.diagnosis.facts.derived import initialisation
from solotune.diagnosis.run_facts import LiveModel, RunFacts
from solotune.model.frozen_linear import FrozenLinear

Batch = Mapping[str, Any]

_ADAPTER = re.compile(r"^(?P<layer>.*?)\.?lora_(?:embedding_)?(?P<part>[AB])(?:\.(?P<rest>.*))?$")
_SMALL = 1 << 20  # elements: smaller buffers are copied, larger ones only checked for writes


@dataclass(frozen=True)
class Adapter:
    """One adapted layer: y = W x + s B A x."""

    name: str
    A: nn.Parameter
    B: nn.Parameter


def adapters_of(model: nn.Module) -> list[Adapter]:
    """All adapters in model order; also several on one layer."""
    halves: dict[tuple[str, str], dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if found := _ADAPTER.match(name):
            halves.setdefault((found["layer"], found["rest"] or ""), {})[found["part"]] = parameter
    return [Adapter(layer, part["A"], part["B"]) for (layer, _), part in halves.items() if len(part) == 2]


def trainable_of(model: nn.Module) -> list[nn.Parameter]:
    """Parameters with requires_grad."""
    return [p for p in model.parameters() if p.requires_grad]


def device_of(model: nn.Module) -> torch.device:
    """The device of its first parameter, for inputs."""
    return next(model.parameters()).device


def is_untouched(model: nn.Module) -> bool | None:
    """Whether all B are zero, as before training; None without adapters."""
    adapters = adapters_of(model)
    return all(not adapter.B.detach().any() for adapter in adapters) if adapters else None


@contextmanager
def restore_model_state(live: LiveModel, seed: int = 0) -> Iterator[nn.Module]:
    """Seed all generators; at exit restore weights that can change, gradients, buffers, modes, flags and generators.

    Frozen weights are not copied (that would be the whole model); writes to them are detected.

    Raises:
        RuntimeError: a probe wrote to a frozen weight or a large buffer.
    """
    model = live.model
    touched = {id(p) for adapter in adapters_of(model) for p in (adapter.A, adapter.B)}
    parameters = list(model.named_parameters())
    flags = [(p, p.requires_grad) for _, p in parameters]
    kept = [(p, p.data, p.detach().clone()) for _, p in parameters if p.requires_grad or id(p) in touched]
    grads = [(p, p.grad, None if p.grad is None else p.grad.clone()) for _, p in parameters]
    known = {id(p) for p, _, _ in kept}
    watched = [(name, p, p._version) for name, p in parameters if id(p) not in known]
    # of frozen linears too: a copy of a streamed layer's would be written into the layer that has its place by then
    frozen = {id(b) for part in model.modules() if isinstance(part, FrozenLinear) for b in part.buffers()}
    buffers = [(b, b.clone()) for b in model.buffers() if b.numel() <= _SMALL and id(b) not in frozen]
    watched += [(name, b, b._version) for name, b in model.named_buffers() if b.numel() > _SMALL or id(b) in frozen]
    modes = [(module, module.training) for module in model.modules()]
    cpu, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        for _, p in parameters:
            p.grad = None
        yield model
    finally:
        with torch.no_grad():
            for p, data, values in kept:
                p.data = data
                p.data.copy_(values)
            for p, grad, values in grads:
                p.grad = grad
                if grad is not None and values is not None:
                    grad.copy_(values)
            for buffer, values in buffers:
                if not torch.equal(buffer, values):
                    buffer.copy_(values)
        for p, flag in flags:
            p.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
        torch.set_rng_state(cpu)
        random.setstate(python)
        np.random.set_state(numpy)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
    changed = [name for name, tensor, version in watched if tensor._version != version]
    if changed:
        raise RuntimeError(f"a probe wrote to {changed[0]}, which is frozen")


@contextmanager
def fresh_adapters(live: LiveModel, run_facts: RunFacts, seed: int = 0) -> Iterator[nn.Module]:
    """`restore_model_state`, with trained adapters reset to the start of the run: A uniform, B zero.

    Unusual initialisations stay unchanged, since they may have moved a part of the base into the adapter.
    """
    with restore_model_state(live, seed) as model:
        if is_untouched(model) is False and initialisation(run_facts) in (None, True, "gaussian"):
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for adapter in adapters_of(model):
                    bound = 1 / math.sqrt(adapter.A[0].numel())
                    adapter.A.copy_(torch.empty(adapter.A.shape).uniform_(-bound, bound, generator=generator))
                    adapter.B.zero_()
        yield model


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Disable the adapters, so that the model is its base: by the switches of PEFT and solotune, else by B = 0."""
    switched: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        for name, off in (("_disable_adapters", True), ("enabled", False)):
            if name == "enabled" and not hasattr(module, "lora_A"):
                continue
            if isinstance(getattr(module, name, None), bool):
                switched.append((module, name, getattr(module, name)))
                setattr(module, name, off)
    zeroed = []
    if not switched:
        zeroed = [(adapter.B, adapter.B.detach().clone()) for adapter in adapters_of(model)]
        for B, _ in zeroed:
            B.data.zero_()
    try:
        yield
    finally:
        for module, name, value in switched:
            setattr(module, name, value)
        for B, values in zeroed:
            B.data.copy_(values)


def on_device(live: LiveModel, batch: Batch) -> dict[str, Any]:
    """The batch on the device of the model."""
    device = device_of(live.model)
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def training_loss(live: LiveModel, batch: Batch) -> torch.Tensor:
    """The loss as the training computes it, differentiable."""
    inputs = on_device(live, batch)
    if live.loss_of is not None:
        return live.loss_of(live.model, inputs)
    return live.model(**{"use_cache": False, **inputs}).loss


def logits_of(model: nn.Module, inputs: Batch) -> torch.Tensor:
    """Logits (B, T, V). Without a cache: with one, transformers does not separate packed rows."""
    given = {key: value for key, value in inputs.items() if key not in ("labels", "use_cache", "num_items_in_batch")}
    return model(**given, use_cache=False).logits


@torch.no_grad()
def token_losses(model: nn.Module, ids: Sequence[int] | np.ndarray, places: Sequence[int] | np.ndarray) -> np.ndarray:
    """float64 (N,): loss of the tokens at these positions (each at least 1) of one text alone."""
    device = device_of(model)
    ids_T = torch.as_tensor(np.asarray(ids, np.int64), device=device)
    label_positions_N = torch.as_tensor(np.asarray(places, np.int64), device=device)
    logits_TV = logits_of(model, {"input_ids": ids_T[None], "attention_mask": torch.ones_like(ids_T)[None]})[0]
    losses = nn.functional.cross_entropy(
        logits_TV[label_positions_N - 1].float(), ids_T[label_positions_N], reduction="none"
    )
    return losses.double().cpu().numpy()


def optimizer_of(live: LiveModel, parameters: Sequence[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer of the training (else AdamW) at this learning rate."""
    optimizer = (
        live.make_optimizer(parameters) if live.make_optimizer else torch.optim.AdamW(parameters, weight_decay=0)
    )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    return optimizer


def sequences_of(batch: Batch, count: int) -> dict[str, Any]:
    """The first sequences of a batch, without padding on the right that only the other sequences needed."""
    size = batch["input_ids"].shape[0]
    if size <= count or any(key.startswith("cu_seq") for key in batch):
        return dict(batch)
    cut = {k: v[:count] if isinstance(v, torch.Tensor) and v.dim() and v.shape[0] == size else v
           for k, v in batch.items()}  # fmt: skip
    mask = cut.get("attention_mask")
    if mask is not None and mask.dim() == 2 and mask[:, 0].all():
        longest = int(mask.ne(0).sum(1).max())
        length = cut["input_ids"].shape[1]
        cut = {k: v[:, :longest] if isinstance(v, torch.Tensor) and v.dim() == 2 and v.shape[1] == length else v
               for k, v in cut.items()}  # fmt: skip
    return cut


def has_labels(batch: Batch) -> bool:
    """Whether any token has a label."""
    labels = batch.get("labels")
    return labels is None or bool((labels[..., 1:] != -100).any())


@contextmanager
def extra_adapters(model: nn.Module, rank: int = 32, scale: float = 2.0) -> Iterator[list[nn.Parameter]]:
    """Add adapters of this rank to every linear layer but the head, to test the effect of capacity; yield A, B, A, ...

    Hooks add `scale * B A x` to the output of each layer; they are removed at exit.
    """
    generator = torch.Generator().manual_seed(0)
    output_of: Any = getattr(model, "get_output_embeddings", None)
    head = output_of() if output_of else None
    parameters: list[nn.Parameter] = []
    handles = []
    for name, module in model.named_modules():
        size = _size_of_linear(module)
        if size is None or module is head or _ADAPTER.match(name):
            continue
        inside, outside = size
        A = torch.empty(rank, inside).uniform_(-1 / math.sqrt(inside), 1 / math.sqrt(inside), generator=generator)
        pair = (nn.Parameter(A.to(device_of(model))), nn.Parameter(torch.zeros(outside, rank, device=device_of(model))))
        parameters += pair
        handles.append(module.register_forward_hook(_adding(*pair, scale)))
    try:
        yield parameters
    finally:
        for handle in handles:
            handle.remove()


def _adding(A: nn.Parameter, B: nn.Parameter, scale: float):
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return output + scale * nn.functional.linear(nn.functional.linear(inputs[0].to(A.dtype), A), B).to(output.dtype)

    return hook


def _size_of_linear(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer: of torch, quantized, GPT-2's transposed one, or of solotune; None for others."""
    if hasattr(module, "lora_A") or any(_size_of_linear(child) for child in module.children()):
        return None  # it wraps a linear layer
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return int(module.nx), int(module.nf)  # type: ignore[arg-type]
    return None
