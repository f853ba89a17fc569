"""Seconds of a training step, of the first one, and of the whole run.

    step = sum over micro-batches of (forward + backward + recomputed forward + head) + optimizer + communication

Where layers are streamed, sharded, or their inputs offloaded, forward and backward are followed layer by layer
(`streaming`): a layer starts when the one before it is done and what it needs has arrived.

Communication of N ranks is one all-reduce of the flat gradient: in a ring each card sends 2 (N - 1) / N of its bytes.

The time of a matrix product is its operations divided by (the card's rate times the share that products of this size
reach), or the time to read and write its operands, whichever is longer. Everything else is limited by memory bandwidth:
its bytes divided by the bandwidth. The time to launch the kernels is a lower limit; it dominates in small models, and
is shorter with CUDA graphs. Rates are the card's (`gpus`), shares were measured (`constants`).

Shape legend: B rows, T tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from solotune.model.limits import RING_SLOTS
from solotune.planning import constants as known
from solotune.planning.gpus import Card
from solotune.planning.layer_profile import LayerCost, Matmul, MemoryStrategy, ModelShape, Pass, Workload
from solotune.planning.memory import joined_weights, passing_layers, stored_bytes


@dataclass(frozen=True)
class Seconds:
    """Predicted times; `total` is None if the data is not known."""

    load: float
    first_step: float
    step: float
    total: float | None
    tokens_per_second: float  # of all ranks
    communication: float = 0.0  # part of `step`

    def to_json(self) -> dict[str, float | None]:
        return {"load": self.load, "first_step": self.first_step, "step": self.step, "total": self.total}


def seconds(shape: ModelShape, knobs: MemoryStrategy, work: Workload, card: Card) -> Seconds:
    """Predict the times on `card`."""
    pace = _CpuPace(card) if card.is_cpu else _GpuPace(card, knobs, shape.is_compiled)
    tokens = max(1.0, work.mean_tokens)
    supervised = work.real_share * work.supervised_share
    micro_batch = _micro_batch(shape, knobs, work.rows, tokens, supervised, work.has_one_shape, pace)
    communication = all_reduce(4 * joined_weights(shape), work.ranks, pace.all_reduce_bytes)
    step = work.accumulation * micro_batch + pace.optimizer(shape) + communication
    load = pace.load(shape, knobs)
    first = step + pace.compile(shape, knobs)
    total = None
    if work.steps is not None:
        total = load + first + step * max(0, work.steps - 1) + _evaluations(shape, knobs, work, pace)
    return Seconds(load, first, step, total, work.tokens_per_step / step, communication)


def all_reduce(size: int, ranks: int, bytes_per_second: float) -> float:
    """Seconds until each of so many ranks has the sum of all ranks' vectors of `size` bytes, in a ring."""
    if ranks == 1:
        return 0.0
    sends = 2 * (ranks - 1)  # each of 1/N of the bytes
    return known.ALL_REDUCE_SECONDS + sends * (known.HOP_SECONDS + size / ranks / bytes_per_second)


def _micro_batch(
    shape: ModelShape, knobs: MemoryStrategy, rows: int, tokens: float, supervised: float, has_graphs: bool, pace: _Pace
) -> float:
    forwards, backwards = [], []
    expansion = pace.expansion(shape, knobs) / max(1, len(shape.layers))
    known_kinds: dict[tuple[int, bool], tuple[float, float]] = {}
    for number, layer in enumerate(shape.layers):
        is_checkpointed = number < knobs.num_checkpointed
        kind = (id(layer), is_checkpointed)
        if kind not in known_kinds:
            known_kinds[kind] = _layer(shape, layer, rows, tokens, is_checkpointed, has_graphs, pace)
        forward, backward = known_kinds[kind]
        forwards.append(forward + expansion)
        backwards.append(backward + (1 + is_checkpointed) * expansion)
    total = _passes(shape, knobs, rows * tokens, forwards, backwards, pace)
    outside = shape.outside
    total += _passing(outside.forward, rows, tokens, pace) + _passing(outside.backward, rows, tokens, pace)
    positions = rows * tokens * supervised
    total += 2 * pace.product(2 * positions * shape.hidden_size * shape.vocab_size, 0.0, False)
    return total + pace.reading(positions * shape.vocab_size * shape.logit_bytes[0] * 2)


def _layer(
    shape: ModelShape,
    layer: LayerCost,
    rows: int,
    tokens: float,
    is_checkpointed: bool,
    has_graphs: bool,
    pace: _Pace,
) -> tuple[float, float]:
    """Seconds of a layer's forward and backward, if what they need is there."""
    forward = _forward(shape, layer, rows, tokens, pace)
    backward = _passing(layer.backward, rows, tokens, pace) + _attention(shape, rows, tokens, pace, True)
    backward += forward * is_checkpointed
    floor = pace.layer_floor(layer, is_checkpointed, has_graphs)
    slower = max(1.0, floor / (forward + backward)) if forward + backward else 1.0
    return slower * forward, slower * backward


def _passes(
    shape: ModelShape,
    knobs: MemoryStrategy,
    positions: float,
    forwards: list[float],
    backwards: list[float],
    pace: _Pace,
) -> float:
    """Seconds of all layers' forward and backward with the copies beside them."""
    is_sharded = knobs.num_shards > 1
    weights = [0.0] * len(shape.layers)
    for number in passing_layers(shape, knobs):
        size = sum(stored_bytes(shape, number, knobs))
        weights[number] = pace.gathering(size, knobs.num_shards) if is_sharded else size / pace.link
    if is_sharded:
        forwards, backwards = (_beside_peer_copies(one, weights) for one in (forwards, backwards))
    inputs = [0.0] * len(shape.layers)
    if knobs.is_offloaded:  # all but the last one's
        for number in range(knobs.num_checkpointed - 1):
            inputs[number] = shape.layers[number].output.per_token * positions / pace.link
    share = known.DUPLEX_SHARE if any(weights) and any(inputs) and not is_sharded else 1.0
    leaving = [copy / share for copy in inputs]
    total = streaming(forwards, [copy / share for copy in weights], leaving=leaving, one_link=not is_sharded)
    total += streaming(backwards[::-1], weights[::-1], arriving=inputs[::-1], one_link=not is_sharded)
    if knobs.copies_base:  # looked up in host memory before the first layer
        rows_read = shape.hidden_size * positions if shape.embedding_parameters else 0.0
        total += shape.dtype_bytes * rows_read / pace.link
    return total


def _beside_peer_copies(compute: list[float], copies: list[float]) -> list[float]:
    """Seconds of the layers that compute while another one's weights are copied from other cards."""
    slower = 1 / known.SHARE_BESIDE_PEER_COPIES - 1
    return [own + slower * min(own, copy) for own, copy in zip(compute, copies, strict=True)]


def streaming(
    compute: Sequence[float],
    weights: Sequence[float],
    leaving: Sequence[float] = (),
    arriving: Sequence[float] = (),
    slots: int = RING_SLOTS,
    one_link: bool = True,
) -> float:
    """Seconds of layers that run one after the other beside their copies (`layer_ring`, `host_activations`).

    Copies of one direction of a link come one after the other:
    - of weights: begins when the layer that had the slot has run; the first `slots` streamed layers are there.
    - of an input to the host: begins with its layer, and must end before the next one.
    - of an input from the host: begins with the layer before; the first one's when it is needed.

    Args:
        compute: seconds of each layer, in the order in which they run.
        weights: seconds of the copy of its frozen weights; 0: they are on the card.
        leaving: seconds of the copy of its input to the host.
        arriving: seconds of the copy of its input from the host.
        one_link: weights arrive over the same link as inputs; False: from other cards.
    """
    streamed = [number for number, copy in enumerate(weights) if copy]
    follower = dict(zip(streamed, streamed[slots:], strict=False))
    ready = [0.0] * len(compute)  # when what a layer waits for has arrived
    now = to_host = 0.0  # when compute, and the link to the host are free
    to_card, of_weights = [0.0, 0.0], 0 if one_link else 1  # when the links from the host and from other cards are free
    for number, its_seconds in enumerate(compute):
        asked = [number + 1] if number < len(arriving) and arriving[number] else []
        if asked and not (number and arriving[number - 1]):
            asked.insert(0, number)
        for wanted in asked:
            if wanted < len(compute) and arriving[wanted]:
                to_card[0] = max(to_card[0], now) + arriving[wanted]
                ready[wanted] = max(ready[wanted], to_card[0])
        now = max(now, ready[number])
        if number < len(leaving) and leaving[number]:
            now = max(now, to_host)
            to_host = now + leaving[number]
        now += its_seconds
        if number in follower:
            to_card[of_weights] = max(to_card[of_weights], now) + weights[follower[number]]
            ready[follower[number]] = max(ready[follower[number]], to_card[of_weights])
    return now


def _forward(shape: ModelShape, layer: LayerCost, rows: int, tokens: float, pace: _Pace) -> float:
    return _passing(layer.forward, rows, tokens, pace) + _attention(shape, rows, tokens, pace, False)


def _passing(part: Pass, rows: int, tokens: float, pace: _Pace) -> float:
    def at(growth: tuple[float, float, float]) -> float:
        return growth[0] + rows * tokens * (growth[1] + tokens * growth[2])

    def one(matmul: Matmul) -> float:
        return pace.product(at(matmul.flops), at(matmul.bytes), matmul.frozen)

    return sum(one(matmul) for matmul in part.matmuls) + pace.reading(at(part.other_bytes)) + pace.calls(part)


def _attention(shape: ModelShape, rows: int, tokens: float, pace: _Pace, is_backward: bool) -> float:
    """Seconds of attention: two products of T x T/2 (causal) per head in forward, five in backward."""
    flops = rows * tokens * tokens * shape.num_heads * shape.head_dim * (5 if is_backward else 2)
    return pace.attention(flops, tokens, is_backward)


def _evaluations(shape: ModelShape, knobs: MemoryStrategy, work: Workload, pace: _Pace) -> float:
    """Seconds of all evaluations: during the run, base and tuned at its end, and generated answers."""
    if not work.eval_tokens:
        return 0.0
    tokens = max(1, work.eval_batch[1])
    batches = work.eval_tokens / max(1, work.eval_batch[0] * tokens)
    kinds = {
        id(layer): _forward(shape, layer, work.eval_batch[0], tokens, pace)
        for layer in {id(one): one for one in shape.layers}.values()
    }
    forward = sum(kinds[id(layer)] for layer in shape.layers)
    forward += pace.expansion(shape, knobs)
    positions = work.eval_batch[0] * tokens * work.supervised_share
    forward += pace.product(2 * positions * shape.hidden_size * shape.vocab_size, 0.0, False)
    passes = work.num_evals / work.ranks + 1  # the base's at the end is computed by one rank alone
    return batches * forward * passes + work.generated_tokens * pace.generated(shape)


class _GpuPace:
    """Times on a GPU."""

    def __init__(self, card: Card, knobs: MemoryStrategy, is_compiled: bool) -> None:
        self.card, self.is_compiled = card, is_compiled
        self.flops = card.bf16_tflops * 1e12
        self.frozen_flops = self.flops
        self.frozen_share = known.GEMM_SHARE
        if knobs.base_precision == "fp8" and card.fp8_tflops:
            self.frozen_flops, self.frozen_share = card.fp8_tflops * 1e12, known.FP8_GEMM_SHARE
        self.bandwidth, self.link, self.all_reduce_bytes = card.bandwidth_bytes, card.link_bytes, card.all_reduce_bytes

    def gathering(self, size: float, shards: int) -> float:
        """Seconds of copying a sharded layer to the ring: the others' parts over the link, the own part on the card."""
        return size * (1 - 1 / shards) / self.card.peer_bytes + self.reading(2 * size / shards)

    def product(self, flops: float, size: float, frozen: bool) -> float:
        rate, share = (self.frozen_flops, self.frozen_share) if frozen else (self.flops, known.GEMM_SHARE)
        ramp = known.GEMM_HALF_FLOPS * self.card.bf16_tflops / 989
        multiplying = (flops + ramp) / (rate * share) if flops else 0.0
        return max(multiplying, size / (self.bandwidth * known.SMALL_GEMM_SHARE_OF_BANDWIDTH))

    def reading(self, size: float) -> float:
        return size / (self.bandwidth * known.BANDWIDTH_SHARE)

    def calls(self, part: Pass) -> float:
        return 0.0  # overlaps with the work; counted in `layer_floor`

    def layer_floor(self, layer: LayerCost, is_checkpointed: bool, has_graphs: bool) -> float:
        kernels = layer.forward.num_kernels * (1 + is_checkpointed) + layer.backward.num_kernels
        if not self.is_compiled:
            return kernels * known.EAGER_KERNEL_SECONDS
        if has_graphs:
            return kernels * known.GRAPH_KERNEL_SECONDS
        return known.LAYER_SECONDS * (1 + 0.5 * is_checkpointed) + kernels * known.KERNEL_SECONDS

    def attention(self, flops: float, tokens: float, is_backward: bool) -> float:
        share, half = known.ATTENTION_BACKWARD if is_backward else known.ATTENTION_FORWARD
        return flops / (self.flops * share * tokens / (tokens + half))

    def expansion(self, shape: ModelShape, knobs: MemoryStrategy) -> float:
        if knobs.base_precision != "nf4" or knobs.has_dequantized_copy:
            return 0.0
        return shape.num_frozen * (0.5 + shape.dtype_bytes) / (self.bandwidth * known.NF4_EXPANSION_SHARE)

    def optimizer(self, shape: ModelShape) -> float:
        return known.STEP_SECONDS + shape.num_trainable * 40 / self.bandwidth

    def load(self, shape: ModelShape, knobs: MemoryStrategy) -> float:
        return known.CUDA_IMPORT_SECONDS + 2 * (shape.num_frozen + shape.other_parameters) / known.READ_BYTES_PER_SECOND

    def compile(self, shape: ModelShape, knobs: MemoryStrategy) -> float:
        if not shape.is_compiled:
            return 1.0
        kinds = len({id(layer) for layer in shape.layers})
        extra = known.COMPILE_SECONDS_CHECKPOINTED if knobs.num_checkpointed else 0.0
        return kinds * known.COMPILE_SECONDS + extra

    def generated(self, shape: ModelShape) -> float:
        return len(shape.layers) * 1.2e-3


class _CpuPace:
    """Times on this machine's CPU; `card` has its measured speed."""

    def __init__(self, card: Card) -> None:
        self.flops = card.bf16_tflops * 1e12 * known.CPU_GEMM_SHARE
        self.bandwidth = self.link = card.bandwidth_bytes
        self.all_reduce_bytes = known.GLOO_BYTES_PER_SECOND

    def gathering(self, size: float, shards: int) -> float:
        return self.reading(2 * size)

    def product(self, flops: float, size: float, frozen: bool) -> float:
        return flops / self.flops

    def reading(self, size: float) -> float:
        return size / self.bandwidth

    def calls(self, part: Pass) -> float:
        return part.num_kernels * known.CPU_OPERATION_SECONDS

    def layer_floor(self, layer: LayerCost, is_checkpointed: bool, has_graphs: bool) -> float:
        return 0.0

    def attention(self, flops: float, tokens: float, is_backward: bool) -> float:
        return 2 * flops / self.flops

    def expansion(self, shape: ModelShape, knobs: MemoryStrategy) -> float:
        if knobs.base_precision != "nf4" or knobs.has_dequantized_copy:
            return 0.0
        return shape.num_frozen / known.CPU_EXPANDED_WEIGHTS_PER_SECOND

    def optimizer(self, shape: ModelShape) -> float:
        return shape.num_trainable * 64 / self.bandwidth

    def load(self, shape: ModelShape, knobs: MemoryStrategy) -> float:
        return known.CPU_IMPORT_SECONDS + shape.num_frozen / known.CPU_QUANTISED_WEIGHTS_PER_SECOND

    def compile(self, shape: ModelShape, knobs: MemoryStrategy) -> float:
        return 0.0

    def generated(self, shape: ModelShape) -> float:
        weights = shape.num_frozen + shape.hidden_size * shape.vocab_size
        return weights * shape.dtype_bytes / self.bandwidth + len(shape.layers) * known.CPU_GENERATED_LAYER_SECONDS


_Pace = _GpuPace | _CpuPace
