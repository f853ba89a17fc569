"""How many layers of a base are streamed from host memory when a run is read, and whether the host has room for them.

A training run has `base_offload` from its plan. Whatever reads a run later (chat, evaluate, export, diagnose) needs no
gradients and no optimizer, and may run on another card, so there the number is chosen again: as few layers as the free
memory of this card requires. The numbers that the model computes are the same (`model.layer_ring`).

Host memory is checked before anything is read. Linux gives more memory than it has and ends a process that uses it, so
there would be no error to catch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from solotune.config.run_config import Choice, RunConfig
from solotune.errors import CheckError
from solotune.hardware.machine import Machine, dtype_of
from solotune.hardware.ram import ram
from solotune.hub.model_files import ModelFiles
from solotune.model.empty_model import empty_model
from solotune.model.frozen_linear import frozen_linears
from solotune.model.host_embedding import own_embedding
from solotune.model.layers import decoder_layers
from solotune.model.limits import offloaded_layers
from solotune.planning.layer_profile import Linear
from solotune.planning.memory import StoredBytes, ring_of, stored_linears
from solotune.planning.plan import SHARE_OF_HOST
from solotune.units import gib

READING_BYTES = 3 << 29
"""Memory that reading needs beside the base: the logits of an evaluation, the cache of a chat, an unpacked weight."""


class BaseSize(NamedTuple):
    """Bytes of a base as it is stored."""

    layers: tuple[StoredBytes, ...]  # frozen linears of each decoder layer
    rest: int  # head, norms and everything else that stays on the card
    embedding: int = 0  # in host memory where layers are streamed; 0: tied to the head, so it stays too

    @classmethod
    def of(cls, config: RunConfig, model_files: ModelFiles) -> BaseSize:
        """The sizes that the base of a resolved config will have, from its config.json."""
        dtype = getattr(torch, dtype_of(config.bf16))
        module, _ = empty_model(model_files, config.attn_implementation, config.batches, dtype, torch.device("cpu"))
        frozen = set(frozen_linears(module).values())
        precision = "fp8" if config.multiplies_in_fp8 else config.base_precision
        assert precision != "auto", "the plan chooses it before a base is loaded"

        def stored(part: nn.Module) -> StoredBytes:
            found = [linear for linear in part.modules() if linear in frozen]
            linears = [Linear(*linear.weight.shape, 1, linear.bias is not None, False) for linear in found]  # type: ignore[misc]
            return stored_linears(tuple(linears), dtype.itemsize, precision, config.bnb_4bit_use_double_quant)

        layers = tuple(map(stored, decoder_layers(module)))
        own = sum(p.numel() for linear in frozen for p in linear.parameters(recurse=False))
        others = dtype.itemsize * (sum(p.numel() for p in module.parameters()) - own)
        table = own_embedding(module)
        embedding = 0 if table is None else table.weight.numel() * dtype.itemsize
        rest = others + sum(stored(module)) - _sum(layers) - embedding
        return cls(layers, rest, embedding)

    def _streamed(self, base_offload: bool | int) -> list[StoredBytes]:
        return [self.layers[number] for number in offloaded_layers(base_offload, len(self.layers))]

    def on_card(self, base_offload: bool | int) -> int:
        """Bytes on the card with so many layers streamed, the ring included."""
        streamed = self._streamed(base_offload)
        resident = _sum(self.layers) - _sum(streamed) + self.embedding * (not streamed)
        return self.rest + resident + sum(ring_of(streamed))

    def on_host(self, base_offload: bool | int) -> int:
        """Bytes of the streamed layers and of the embedding in host memory."""
        streamed = self._streamed(base_offload)
        return _sum(streamed) + self.embedding * bool(streamed)


def _sum(layers: Sequence[StoredBytes]) -> int:
    return sum(map(sum, layers))


def settle_offload(config: RunConfig, machine: Machine, model_files: ModelFiles) -> tuple[RunConfig, list[Choice]]:
    """Resolve `base_offload: auto` for a model that is read, and check that the host has room for streamed layers.

    Raises:
        CheckError: it has not.
    """
    if config.use_cpu or not machine.has_cuda:
        if config.base_offload in ("auto", False):
            return config, []
        return config, [Choice("base_offload", config.base_offload, "it saves nothing: on a CPU there is one memory")]
    if config.base_offload is False or config.base_sharding is True or config.base_precision == "auto":
        return config, []
    size, choices = BaseSize.of(config, model_files), list[Choice]()
    depth, wanted = len(size.layers), config.base_offload
    if wanted == "auto":
        free = machine.gpu_free_bytes or 0
        counts = range(depth + 1)
        count = next((n for n in counts if size.on_card(n) + READING_BYTES <= free), depth)
        wanted = bool(count) if count in (0, depth) else count
        config = config.replaced("machine", base_offload=wanted)
        if count:
            why = f"{gib(size.on_card(False))} GiB of weights, {gib(free)} GiB of the card are free; "
            why += f"{count} of {depth} layers stream from host memory ({gib(size.on_host(wanted))} GiB)"
            choices.append(Choice("base_offload", wanted, why))
    if wanted is not False:
        _require_host(size, wanted)
    return config, choices


def _require_host(size: BaseSize, base_offload: bool | int) -> None:
    """Raises:
    CheckError: the streamed layers do not fit in host memory.
    """
    host = ram()
    room = SHARE_OF_HOST * host.free
    if (needed := size.on_host(base_offload)) <= room:
        return
    depth = len(size.layers)
    most = max(count for count in range(depth + 1) if size.on_host(count) <= room)
    fewer = f"base_offload: {most}" if most else "base_offload: false"
    raise CheckError(
        "base_offload: the streamed layers do not fit in host memory",
        seen=f"{gib(needed)} GiB of layers and embedding; {host.in_words()}",
        allowed=f"{gib(room)} GiB, {SHARE_OF_HOST:.0%} of what is free",
        change=f"free host memory, or {fewer} (then {gib(size.on_card(most))} GiB of the base are on the card)",
    )
