"""Bytes at the peak of a training step, by category.

    fixed      weights + quantization state + adapters + their gradients + optimizer state
    forward    what is kept for backward grows layer by layer; a checkpointed layer keeps only its input
    head       all of that, and a chunk of logits with its gradient
    backward   it shrinks again layer by layer; a checkpointed layer is first run forward again

What lies in host memory is not on the card: frozen layers, but for the two slots that they pass through, with them the
token embedding; the inputs of checkpointed layers, but for two (`layer_ring`, `host_embedding`, `host_activations`).
Where the base is sharded, a card has its part of each layer, and two slots too.

    evaluation  held-out losses, or generated answers, without gradients (`evaluation_memory`)

The peak is the largest of these moments, each summed from the costs of the layers, in order. It is what the allocator
has given out (`torch.cuda.max_memory_allocated`); `card_bytes` adds the memory outside the allocator.

Loading is not included: its peak is the base and one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from solotune.model.limits import MLP_CHUNK_TOKENS, RING_SLOTS, offloaded_layers
from solotune.planning import constants as known
from solotune.planning.evaluation_memory import Moment, answers_moment, evaluation_moment, evaluation_on_cpu
from solotune.planning.gpus import Card
from solotune.planning.layer_profile import (
    BaseWeights,
    LayerCost,
    Linear,
    MemoryStrategy,
    ModelShape,
    Precision,
    Workload,
)
from solotune.planning.peak_memory import CATEGORIES, HostMemory, PeakMemory, Peaks

NF4_BLOCK, NESTED_BLOCK, OPTIMIZER_BLOCK = 64, 256, 256
MIN_8BIT_WEIGHTS = 4096  # bitsandbytes keeps smaller tensors' moments in 32 bits
MIN_PAGED_WEIGHTS = 100_000  # and pages only the moments of larger ones


def footprint(shape: ModelShape, knobs: MemoryStrategy, work: Workload, card: Card) -> PeakMemory:
    """The peak of a run: of a training step of the largest micro-batch, of an evaluation, or of its answers."""
    is_cpu = card.is_cpu
    host = host_memory(shape, knobs, work)
    slots, elsewhere = ring_bytes(shape, knobs), sharded_bytes(shape, knobs)
    weights, scales = weight_bytes(shape, knobs) + slots.weights, quantisation_bytes(shape, knobs) + slots.scales
    if not is_cpu:  # a CPU's host memory is its memory
        their_weights = sum(stored_bytes(shape, number, knobs).weights for number in _streamed(shape, knobs))
        weights -= host.embedding + their_weights
        scales -= host.layers - their_weights
        weights -= elsewhere.weights
        scales -= elsewhere.scales
    optimizer, paged = optimizer_bytes(shape, knobs)
    fixed: dict[str, float] = {
        "weights": weights,
        "quantization_state": scales,
        "adapters": 4 * joined_weights(shape),
        "gradients": 4 * joined_weights(shape),
    }
    library = 0 if is_cpu else _library_bytes(card)
    of_cpu = host.activations if is_cpu else None
    phases = []
    for moment, has_optimizer in zip(_phases(shape, knobs, work), (True, True, False), strict=True):
        state = {"optimizer": optimizer if has_optimizer else 0}  # it is gone when answers are generated
        sizes, out = _sizes(fixed | state, moment, library, of_cpu), 0 if is_cpu or not has_optimizer else round(paged)
        phases.append(_Phase(moment, sizes, out, round(sum(sizes.values())) - out if moment.size else 0))
    most = max(phases, key=lambda phase: phase.peak_bytes)  # the first of equal ones: training
    used = sum(most.sizes.values())
    outside = 0 if is_cpu else known.CONTEXT_BYTES + (known.FRAGMENTATION - 1) * used
    if work.ranks > 1 and not is_cpu:
        outside += known.NCCL_BYTES
    by_category = {name: round(most.sizes[name]) for name in CATEGORIES}
    peaks = Peaks(*(phase.peak_bytes for phase in phases))
    name = most.moment.name
    return PeakMemory(by_category, name, most.paged_bytes, round(outside), host, peaks, sum(elsewhere))


class _Phase(NamedTuple):
    moment: Moment
    sizes: dict[str, float]
    paged_bytes: int
    peak_bytes: int


def _phases(shape: ModelShape, knobs: MemoryStrategy, work: Workload) -> list[Moment]:
    """The largest moment of each phase of `Peaks`."""
    a_weight = _bytes_unpacked(shape, knobs)
    training = max(_moments(shape, knobs, work), key=lambda moment: moment.size)
    unpacked = a_weight * max(linear.weights for linear in shape.linears)
    if knobs.device == "cpu":
        evaluation = evaluation_on_cpu(shape, work)._replace(unpacked=unpacked)
    else:
        evaluation = evaluation_moment(shape, work, a_weight)
    return [training._replace(unpacked=unpacked), evaluation, answers_moment(shape, work, a_weight)]


def _sizes(fixed: dict[str, float], moment: Moment, library_bytes: int, of_cpu: int | None) -> dict[str, float]:
    """Bytes by category at a moment.

    Args:
        library_bytes: workspaces of cuBLAS.
        of_cpu: on a CPU the inputs of layers that are offloaded, to the same memory; on a card None.
    """
    sizes = {**fixed, "activations": moment.activations, "logits": moment.logits}
    sizes["workspace"] = library_bytes + moment.unpacked
    if of_cpu is not None:
        sizes["activations"] += of_cpu
        alive = sum(sizes[name] for name in ("activations", "logits", "gradients", "optimizer"))
        sizes["workspace"] += known.CPU_PROCESS_BYTES + (known.CPU_HEAP_SLACK - 1) * alive
    return sizes


class StoredBytes(NamedTuple):
    """Bytes of frozen linears, as they are stored."""

    weights: int
    scales: int


def _streamed(shape: ModelShape, knobs: MemoryStrategy) -> list[int]:
    return offloaded_layers(knobs.num_streamed, len(shape.layers))


def passing_layers(shape: ModelShape, knobs: MemoryStrategy) -> list[int]:
    """The layers that are copied to the ring of this card: from host memory, or from other cards too."""
    return list(range(len(shape.layers))) if knobs.num_shards > 1 else _streamed(shape, knobs)


def sharded_bytes(shape: ModelShape, knobs: MemoryStrategy) -> StoredBytes:
    """Bytes of the layers that are on other cards."""
    if knobs.num_shards == 1:
        return StoredBytes(0, 0)
    whole = [stored_bytes(shape, number, knobs) for number in range(len(shape.layers))]
    elsewhere = 1 - 1 / knobs.num_shards
    return StoredBytes(round(elsewhere * sum(w for w, _ in whole)), round(elsewhere * sum(s for _, s in whole)))


def stored_bytes(shape: ModelShape, number: int, knobs: MemoryStrategy) -> StoredBytes:
    """Bytes of the frozen linears of one layer: one copy over the link."""
    return stored_linears(
        shape.layer_linears[number], shape.dtype_bytes, knobs.base_precision, knobs.is_double_quantised
    )


@lru_cache
def stored_linears(
    linears: tuple[Linear, ...], dtype_bytes: int, precision: Precision, is_double_quantised: bool
) -> StoredBytes:
    """Bytes of frozen linears, without an unpacked copy."""
    knobs = MemoryStrategy(precision, is_double_quantised, False, 0, False, "adamw_torch", "cpu")
    base = BaseWeights(linears, 0, dtype_bytes)
    return StoredBytes(weight_bytes(base, knobs), quantisation_bytes(base, knobs))


def ring_bytes(shape: ModelShape, knobs: MemoryStrategy) -> StoredBytes:
    """Bytes on the card of the slots that layers pass through."""
    return ring_of([stored_bytes(shape, number, knobs) for number in passing_layers(shape, knobs)])


def ring_of(layers: Sequence[StoredBytes]) -> StoredBytes:
    """Bytes on the card of the slots that these layers pass through: each holds the largest of them."""
    largest = max(layers, key=sum, default=StoredBytes(0, 0))
    slots = min(RING_SLOTS, len(layers))
    return StoredBytes(slots * largest.weights, slots * largest.scales)


def host_memory(shape: ModelShape, knobs: MemoryStrategy, work: Workload) -> HostMemory:
    """Pinned host memory of a run; its activations are those of the largest micro-batch."""
    numbers = _streamed(shape, knobs)
    inputs = shape.layers[: max(0, knobs.num_checkpointed - 1)] if knobs.is_offloaded else ()
    return HostMemory(
        layers=sum(sum(stored_bytes(shape, number, knobs)) for number in numbers),
        embedding=shape.dtype_bytes * shape.embedding_parameters if knobs.copies_base else 0,
        activations=round(sum(layer.output.at(work.rows, work.tokens) for layer in inputs)),
    )


def weight_bytes(shape: ModelShape | BaseWeights, knobs: MemoryStrategy) -> int:
    """Bytes of the base: its linears (codes, and the unpacked copy), and all other weights in the compute dtype."""
    a_weight = {"nf4": 0.5, "fp8": 2.0, "bf16": 2.0, "fp32": 4.0}[knobs.base_precision]
    if knobs.base_precision == "nf4" and knobs.has_dequantized_copy:
        a_weight += shape.dtype_bytes
    total = shape.dtype_bytes * shape.other_parameters
    for linear in shape.linears:
        total += linear.count * _rounded(a_weight * linear.weights)
        total += linear.count * shape.dtype_bytes * linear.out_features * linear.has_bias
    return round(total)


def quantisation_bytes(shape: ModelShape | BaseWeights, knobs: MemoryStrategy) -> int:
    """Bytes of scales: of NF4's blocks (in 8 bits with scales of their own if quantized twice), of fp8's rows."""
    total = 0
    for linear in shape.linears:
        if knobs.base_precision == "fp8":
            total += linear.count * 4 * (linear.out_features + linear.in_features)
        if knobs.base_precision != "nf4":
            continue
        blocks = math.ceil(linear.weights / NF4_BLOCK)
        one = _rounded(4 * blocks)
        if knobs.is_double_quantised:
            one = _rounded(blocks) + _rounded(4 * math.ceil(blocks / NESTED_BLOCK)) + _rounded(4 * 256) + _rounded(4)
        total += linear.count * (one + _rounded(4 * 16))
    return total


def joined_weights(shape: ModelShape) -> int:
    """Length of the flat vector of all adapters: each tensor starts at a multiple of 256 (`lora.join`)."""
    return sum(
        linear.count * math.ceil(shape.lora_r * width / OPTIMIZER_BLOCK) * OPTIMIZER_BLOCK
        for linear in shape.linears
        if linear.is_adapted
        for width in (linear.in_features, linear.out_features)
    )


def optimizer_bytes(shape: ModelShape, knobs: MemoryStrategy) -> tuple[int, int]:
    """Bytes of AdamW's two moments: (all, those that are paged)."""
    weights = joined_weights(shape)
    moments = scales = 0
    if "8bit" in knobs.optim and weights >= MIN_8BIT_WEIGHTS:
        moments, scales = 2 * weights, 2 * 4 * math.ceil(weights / OPTIMIZER_BLOCK)
    else:
        moments = 8 * weights
    is_paged = knobs.optim.startswith("paged") and weights >= MIN_PAGED_WEIGHTS
    return moments + scales, moments if is_paged else 0


def _moments(shape: ModelShape, knobs: MemoryStrategy, work: Workload) -> list[Moment]:
    """All candidates for the peak of a micro-batch: each layer while it runs, and the head."""
    b, t = work.rows, work.tokens
    first = shape.layers[0].output.at(b, t)  # output of the embedding; every layer's input has this size
    last = knobs.num_checkpointed - 1
    kept = first
    moments, below = [], []  # below: what is allocated when a layer starts
    kinds: dict[tuple[int, bool], _LayerBytes] = {}
    sizes = [
        kinds.get(kind) or kinds.setdefault(kind, _layer_bytes(layer, work, kind[1]))
        for number, layer in enumerate(shape.layers)
        for kind in [(id(layer), number <= last)]
    ]
    for number, one in enumerate(sizes):
        below.append(kept)
        moments.append(Moment("forward", kept + one.forward, 0.0))
        if number > last:
            kept += one.kept
        elif not knobs.is_offloaded or number in (0, last):
            # offloaded: beside a layer's input, the one before it leaves (or arrives); the last one's stays
            kept += one.output
    outside = shape.outside
    with_norm = kept + outside.kept.at(b, t) - first
    moments += [
        Moment("head", kept + outside.forward_peak.at(b, t) - first, 0.0),
        Moment("head", with_norm + _head_states(shape, work), logit_bytes(shape, work)),
        Moment("backward", with_norm + outside.backward_extra.at(b, t), 0.0),
        Moment("step", 4.0 * joined_weights(shape) if knobs.optim == "adamw_torch" else 0.0, 0.0),
    ]
    moments += [Moment("backward", kept + one.backward, 0.0) for kept, one in zip(below, sizes, strict=True)]
    return moments


class _LayerBytes(NamedTuple):
    kept: float
    output: float
    forward: float  # allocated while it runs forward
    backward: float


def _layer_bytes(layer: LayerCost, work: Workload, is_checkpointed: bool) -> _LayerBytes:
    b, t = work.rows, work.tokens
    kept, output, forward = layer.kept.at(b, t), layer.output.at(b, t), layer.forward_peak.at(b, t)
    backward = kept - output + layer.backward_extra.at(b, t)
    if is_checkpointed:
        backward = max(backward, forward + output)
    parts = [_in_parts(size, layer, work, is_checkpointed) for size in (forward, backward)]
    return _LayerBytes(kept, output, *parts)


def _in_parts(at_work: float, layer: LayerCost, work: Workload, is_checkpointed: bool) -> float:
    """Bytes that a layer needs while it runs, minus what running a long row's MLP in parts saves."""
    parts = math.ceil(work.tokens / MLP_CHUNK_TOKENS)
    if not is_checkpointed or parts < 2:
        return at_work
    out = layer.output.at(work.rows, work.tokens)
    # x, q, k, v, attention's output, gradients of all of them, and the joined parts (one row of 102,400 tokens)
    rest = min(at_work, 9.3 * out)
    return rest + (at_work - rest) / parts


def _head_states(shape: ModelShape, work: Workload) -> float:
    """Bytes of the supervised hidden states, their gradients in parts, and the joined gradients."""
    return 3 * _supervised(work) * shape.hidden_size * shape.dtype_bytes


def _supervised(work: Workload) -> float:
    return min(1.0, work.supervised_share) * work.rows * work.tokens


def logit_bytes(shape: ModelShape, work: Workload) -> float:
    """Bytes of the current chunk of logits; if there are several, the one before is still allocated.

    The uncompiled loss needs more for a chunk than it keeps of the one before, so a short second chunk adds nothing.
    """
    chunk = max(1, shape.max_chunk_logits // shape.vocab_size)
    alone, among_others = shape.logit_bytes
    first = min(_supervised(work), chunk)
    second = min(_supervised(work) - first, chunk)
    if shape.is_compiled:
        return first * (among_others if second else alone) * shape.vocab_size
    return max(first * alone, first * (among_others - alone) + second * alone) * shape.vocab_size


def _bytes_unpacked(shape: ModelShape, knobs: MemoryStrategy) -> float:
    """Bytes of a weight that is unpacked for a product, with its part of the scales in float32; 0: none is."""
    if knobs.base_precision != "nf4" or knobs.has_dequantized_copy:
        return 0.0
    return shape.dtype_bytes + 4 / NF4_BLOCK


def _library_bytes(card: Card) -> int:
    """Bytes of cuBLAS's workspaces: for the forward and the backward thread; recorded passes have them instead."""
    major = (card.compute_capability or (0, 0))[0]
    return 2 * known.WORKSPACE_BYTES.get(major, known.WORKSPACE_BYTES_OLDER)


def _rounded(size: float) -> int:
    return math.ceil(size / known.ALLOCATOR_ROUNDING) * known.ALLOCATOR_ROUNDING
