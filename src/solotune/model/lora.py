"""LoRA (Hu et al. 2021, arXiv 2106.09685): train a low-rank correction of a frozen layer.

    y = W x + s * B A dropout(x)        A (r, in)  B (out, r)  s = alpha / r   (rsLoRA: alpha / sqrt(r))

         x ---------> W (frozen) ---------+--> y
          \\-> dropout -> A -> B -> * s --/

Initial values and dtype
------------------------
A starts as PyTorch's linear init (Kaiming uniform, a = sqrt 5) and B as zero, so an untrained adapter changes nothing
and A's first gradient is exactly zero. Both are PEFT's conventions, like the file format and the key names, so stock
PEFT loads `adapter/`. A and B are float32 in every model (a bfloat16 parameter loses most of a 2e-5 update to rounding)
and are cast to the activations' dtype for their matmuls.

Dropout in compiled layers
--------------------------
The mask is a hash of (seed, layer, position), without a random generator. Backward computes the mask again instead of
keeping dropped copies (27 GiB for all linears of an 8B model at 8,192 tokens), and a recomputed layer has the same mask
by construction. The compiler fuses the hash into one kernel; uncompiled it would be ten, so there PyTorch's dropout is
used.

What it does not do: train biases, embeddings or the head; merge.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from solotune.config.settings import FOREIGN, LoraSettings
from solotune.errors import InputError
from solotune.hub.download import hub_id, loadable_name
from solotune.model import adapter
from solotune.model.frozen_linear import FrozenLinear

HEADS_AND_EMBEDDINGS = ("lm_head", "embed_out", "embed_tokens", "embed_in", "wte")
"""Targets of other tools that get no adapter here (F63)."""
USUAL_RANKS = tuple(2**k for k in range(10))  # 1 to 512

FIRST_FACTOR, SECOND_FACTOR = 0x7FEB352D, 0x846CA68B - (1 << 32)  # of `hashed`, as int32 values


def hashed(x: torch.Tensor) -> torch.Tensor:
    """Hash each int32 to an int32: `lowbias32` (C. Wellons 2018, "Prospecting for hash functions")."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * FIRST_FACTOR
    x = (x ^ ((x >> 15) & 0x1FFFF)) * SECOND_FACTOR
    return x ^ ((x >> 16) & 0xFFFF)


def seeded_dropout(x: torch.Tensor, p: float, seeds_2: torch.Tensor) -> torch.Tensor:
    """Zero each element of x with probability p and divide the others by 1 - p; the mask is a hash of the seeds.

    It is `hashed` of the element's index, with one seed added before the first line and another in the second, and
    without the last line, which changes only the low bits: a dropout kernel spends its time on the hash.

    Args:
        seeds_2: int32; on the device of x.
    """
    index = torch.arange(x.numel(), device=x.device, dtype=torch.int32).view(x.shape) + seeds_2[0]
    index = (index ^ ((index >> 16) & 0xFFFF)) * FIRST_FACTOR
    index = (index ^ ((index >> 15) & 0x1FFFF) ^ seeds_2[1]) * SECOND_FACTOR
    return torch.where(index >= int((p - 0.5) * (1 << 32)), x * (1 / (1 - p)), 0)


class LoraLinear(nn.Module):
    """A frozen linear with its adapter: `lora_A` (r, in_features) and `lora_B` (out_features, r), float32."""

    layer_seeds: torch.Tensor
    pass_seeds: torch.Tensor | None

    def __init__(
        self,
        base: FrozenLinear,
        r: int,
        scaling: float,
        dropout: float,
        device: torch.device,
        layer_seed: int = 0,
        pass_seeds: torch.Tensor | None = None,
    ) -> None:
        """Args:
        layer_seed: gives each layer a dropout mask of its own.
        pass_seeds: int32, two numbers, shared by all layers and new for each forward pass; None: dropout uses
            PyTorch's generator.
        """
        super().__init__()
        self.base = base
        self.scaling, self.dropout = scaling, dropout
        self.enabled = True
        seeds = torch.tensor([2 * layer_seed, 2 * layer_seed + 1], dtype=torch.int32, device=device)
        self.register_buffer("layer_seeds", hashed(seeds), persistent=False)
        self.register_buffer("pass_seeds", pass_seeds, persistent=False)
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if not self.enabled:
            return y
        if self.pass_seeds is None or not self.training or not self.dropout:
            h = F.dropout(x, self.dropout, self.training)
        else:
            h = seeded_dropout(x, self.dropout, self.layer_seeds ^ self.pass_seeds)
        # s is applied to A, where the cast to 16 bits absorbs it: after B, backward would write s * dy, as wide as y
        A, B = (self.lora_A * self.scaling).to(x.dtype), self.lora_B.to(x.dtype)
        return y + F.linear(F.linear(h, A), B)


def attach(
    model: nn.Module, settings: LoraSettings, device: torch.device, *, is_compiled: bool = False, inside: str = ""
) -> dict[str, LoraLinear]:
    """Add an adapter to every frozen linear of the language model that `target_modules` names.

    A name matches a module as in PEFT: the whole dotted name, or its end after a dot. Initial values depend only on
    `seed` and the order of the layers.

    Args:
        is_compiled: dropout masks are hashed instead of drawn from PyTorch's generator.
        inside: dotted name of the language model, see `layers.language_model`; empty: the whole model.

    Returns: dotted module name -> its `LoraLinear`, in model order.
    Raises:
        InputError: a name that matches no linear layer, or a rank above a layer's size.
    """
    under = f"{inside}." if inside else ""
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FrozenLinear) and name.startswith(under)
    }
    targets = list(linears) if settings.target_modules == "all-linear" else _matching(linears, settings)
    scaling = settings.alpha / (math.sqrt(settings.r) if settings.use_rslora else settings.r)
    generator = torch.Generator().manual_seed(settings.seed)
    pass_seeds = torch.zeros(2, dtype=torch.int32, device=device) if is_compiled else None
    lora_layers: dict[str, LoraLinear] = {}
    for number, name in enumerate(targets, start=1):
        _check_rank(settings, name, linears[name])
        layer = LoraLinear(linears[name], settings.r, scaling, settings.dropout, device, number, pass_seeds)
        bound = 1 / math.sqrt(layer.lora_A.shape[1])  # kaiming_uniform with a = sqrt(5), for fan_in = in_features
        initial = torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator)
        layer.lora_A.data.copy_(initial)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
        lora_layers[name] = layer
    return lora_layers


def _check_rank(settings: LoraSettings, name: str, linear: FrozenLinear) -> None:
    """Refuse a rank above both sides of a layer; above one side it is useless, but usual for narrow k and v.

    An adapter that another trainer made is taken as it is, so that it can be diagnosed.
    """
    if settings.source_of("lora_r") != FOREIGN and settings.r > (most := max(linear.in_features, linear.out_features)):
        raise InputError(
            f"{settings.source_of('lora_r')}, lora_r: larger than the layer {name}",
            seen=f"lora_r: {settings.r}",
            allowed=f"at most {most}: the layer is {linear.out_features} x {linear.in_features}",
            change="use a smaller lora_r, or remove the layer from lora_target_modules",
        )


def join(lora_layers: Mapping[str, LoraLinear], device: torch.device) -> nn.Parameter:
    """Make every `lora_A` and `lora_B` a view of one float32 vector, and their gradients views of its gradient.

    An optimizer's work for each tensor (a kernel launch, a page fetch) is then done once. Each view begins at a
    multiple of 256, the block size for the moments of 8-bit optimizers, so the result equals that of separate tensors.
    """
    parts = [getattr(layer, part) for layer in lora_layers.values() for part in ("lora_A", "lora_B")]
    starts = list(itertools.accumulate((-(-part.numel() // 256) * 256 for part in parts), initial=0))
    flat_params = nn.Parameter(torch.zeros(starts[-1], device=device))
    flat_params.grad = torch.zeros_like(flat_params)
    for part, start in zip(parts, starts, strict=False):
        values, gradient = (
            whole[start : start + part.numel()].view(part.shape) for whole in (flat_params.data, flat_params.grad)
        )
        part.data = values.copy_(part.data)
        part.grad = gradient
    return flat_params


def _matching(linears: Mapping[str, FrozenLinear], settings: LoraSettings) -> list[str]:
    wanted = settings.target_modules
    matches = {target: [n for n in linears if n == target or n.endswith(f".{target}")] for target in wanted}
    if missing := [target for target, names in matches.items() if not names]:
        raise InputError(
            f"{settings.source_of('lora_target_modules')}, lora_target_modules: "
            f"{', '.join(missing)} matches no linear layer of this model",
            seen=", ".join(wanted),
            allowed=f"{', '.join(leaf_names(linears))}, or all-linear",
            change=f"lora_target_modules: [{', '.join(leaf_names(linears))}]",
            fault="F63" if all(name in HEADS_AND_EMBEDDINGS for name in missing) else "F56",
        )
    chosen = set(itertools.chain.from_iterable(matches.values()))
    return [name for name in linears if name in chosen]


def leaf_names(names: Mapping[str, object]) -> list[str]:
    """The distinct last parts of dotted names, in model order: q_proj, k_proj, ..."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def seed_dropout(lora_layers: Mapping[str, LoraLinear], *numbers: int) -> None:
    """Give the next forward pass of compiled layers, and its recomputation in backward, new dropout masks.

    Args:
        numbers: identify this pass: seed of the run, step, micro-batch.
    """
    state = np.random.SeedSequence(numbers).generate_state(2).astype(np.int32)
    for layer in itertools.islice(lora_layers.values(), 1):  # all layers share one tensor
        if layer.pass_seeds is not None:
            layer.pass_seeds.copy_(torch.from_numpy(state), non_blocking=True)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Make the model its frozen base in the block, bit for bit; for DPO-like methods this is the reference model."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def parameters(lora_layers: Mapping[str, LoraLinear]) -> dict[str, nn.Parameter]:
    """PEFT's key name -> the parameter."""
    return {
        adapter.tensor_key(name, part): getattr(layer, part)
        for name, layer in lora_layers.items()
        for part in adapter.PARTS
    }


def state_dict(lora_layers: Mapping[str, LoraLinear]) -> dict[str, torch.Tensor]:
    """The adapter under PEFT's key names, float32 on the CPU."""
    return {key: part.detach().cpu().contiguous() for key, part in parameters(lora_layers).items()}


def load_state_dict(lora_layers: Mapping[str, LoraLinear], tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Copy tensors into the adapters; keys and shapes must match exactly.

    Raises:
        InputError: a missing or extra key, or another shape: the file belongs to another model or config.
    """
    expected = parameters(lora_layers)
    for key in sorted(expected.keys() ^ tensors.keys()):
        raise InputError(
            f"{where}: the adapter does not fit this model and config",
            seen=f"{key} is {'missing' if key in expected else 'unknown'}",
            allowed=f"{len(expected)} tensors such as {next(iter(expected), 'none')}",
        )
    for key, part in expected.items():
        if tensors[key].shape != part.shape:
            raise InputError(
                f"{where}: the adapter does not fit this model and config",
                seen=f"{key} has shape {tuple(tensors[key].shape)}",
                allowed=f"shape {tuple(part.shape)}",
            )
        part.data.copy_(tensors[key])


def peft_config(
    settings: LoraSettings, lora_layers: Mapping[str, LoraLinear], model: nn.Module, *, base: str, revision: str
) -> dict[str, Any]:
    """`adapter_config.json` for the adapters of a loaded model; `adapter.peft_config` needs only names.

    Args:
        base: `model_name_or_path`; of a folder its path is written, so that `AutoPeftModel` finds it from everywhere.
            An adapter to pass on is an exported one (`exporters.adapter_folder`).
        revision: `model_revision`.
    """
    kinds = (LoraLinear, FrozenLinear, nn.Linear, nn.Embedding)
    named = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    return adapter.peft_config(
        lora_layers,
        {name for name in named if not name.endswith(".base")},
        base=loadable_name(base),
        revision=revision if hub_id(base) else None,
        r=settings.r,
        alpha=settings.alpha,
        dropout=settings.dropout,
        use_rslora=settings.use_rslora,
        fan_in_fan_out=any(layer.base.transposed for layer in lora_layers.values()),
    )


def trainable_count(shapes: Mapping[str, tuple[int, int]], r: int) -> int:
    """Parameters of rank-r adapters on layers of these (out, in) shapes: r * (in + out) each."""
    return sum(r * (i + o) for o, i in shapes.values())


def matching_lora_shapes(
    count: int, shapes: Mapping[str, tuple[int, int]], ranks: Collection[int] = USUAL_RANKS
) -> list[tuple[int, list[str]]]:
    """All (r, target modules) that have exactly `count` trainable parameters on this model.

    A count printed in a tutorial or a log shows what was really trained: 20,971,520 on the Llama-3.1-8B shape is not
    r=16 on q,k,v,o (13,631,488) but r=8 on all seven linears. Candidates: all linears, the MLP's linears, and every
    combination of attention projections.

    Args:
        count: the printed number.
        shapes: dotted module name -> (out_features, in_features) of every linear layer.
        ranks: the ranks to consider.
    """
    leaves = leaf_names(shapes)
    attention = [leaf for leaf in leaves if any(leaf == n.rpartition(".")[2] and "att" in n for n in shapes)]
    groups = [leaves, [leaf for leaf in leaves if leaf not in attention]]
    groups += [list(some) for k in range(1, len(attention) + 1) for some in itertools.combinations(attention, k)]
    found = []
    for group in groups:
        chosen = {name: shape for name, shape in shapes.items() if name.rpartition(".")[2] in group}
        per_rank = trainable_count(chosen, 1)
        if per_rank and count % per_rank == 0 and count // per_rank in ranks:
            found.append((count // per_rank, group))
    return found
