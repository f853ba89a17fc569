"""Inputs of a plan: the costs of one layer, the shape of a model, the work of a step.

Plain numbers, without torch. `model_shape` makes them from a config, `memory` computes bytes from them, `throughput`
computes seconds. Whatever grows with the batch is a `Polynomial`, so profiling a layer once is enough for any batch.

Shape legend: B rows, T tokens of the longest row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from solotune.model.adapter_coverage import AdapterCoverage


class Polynomial(NamedTuple):
    """a + b B T + c B T^2; c is not 0 only if the attention keeps its whole matrix."""

    constant: float = 0.0
    per_token: float = 0.0
    per_token_squared: float = 0.0

    def at(self, rows: int, tokens: int) -> float:
        return self.constant + rows * tokens * (self.per_token + tokens * self.per_token_squared)

    def __add__(self, other: tuple[float, ...]) -> Polynomial:  # type: ignore[override]
        return Polynomial(*(a + b for a, b in zip(self, other, strict=True)))


class Matmul(NamedTuple):
    """A matrix product: its operations, and the bytes it reads and writes. `frozen`: one factor is a base weight."""

    flops: Polynomial
    bytes: Polynomial
    frozen: bool


@dataclass(frozen=True)
class Pass:
    """The forward or the backward of one layer."""

    matmuls: tuple[Matmul, ...]
    other_bytes: Polynomial  # read and written by everything that is not a matrix product
    num_kernels: int


class EvaluationMoment(NamedTuple):
    """One moment of a pass without gradients: what it has allocated by then."""

    allocated: Polynomial
    weights: int = 0  # of the base matrix that is multiplied then; 4-bit ones are unpacked beside what is allocated
    is_attention: bool = False  # with a mask, keys and values are repeated for all query heads then


@dataclass(frozen=True)
class EvaluationPass:
    """A pass without gradients, beside its layers: bytes around the layers, at the last norm, in the head and cache.

    - given: alive when a layer starts: its input, the embedding's output, positions, masks.
    - norm: the moments after the last layer.
    - logit_bytes: the most allocated for each logit of a chunk, from the head to the argmax.
    - cache: keys and values of one token in all layers, when answers are generated.
    - layer_cache: those of one layer.
    - repeated: the same, once more for each query head where query heads share keys; else 0.
    """

    given: Polynomial
    norm: tuple[EvaluationMoment, ...]
    logit_bytes: float
    cache: int
    layer_cache: int
    repeated: int


@dataclass(frozen=True)
class LayerCost:
    """One kind of decoder layer: the memory it keeps and needs, and the work it does.

    Bytes, x being the layer's input and y its output:
    - kept: saved by forward for backward, without x; y is included.
    - output: y alone, which is all that a checkpointed layer keeps.
    - forward_peak: the most allocated at one time during forward, without x.
    - backward_extra: the most allocated during backward, minus what is kept without y, plus x.
    - evaluation: the moments of a pass without gradients that may be its peak, without x; none: not known.
    """

    kept: Polynomial
    output: Polynomial
    forward_peak: Polynomial
    backward_extra: Polynomial
    forward: Pass
    backward: Pass
    how: Literal["compiled", "eager", "estimated"]
    evaluation: tuple[EvaluationMoment, ...] = ()


class Linear(NamedTuple):
    """`count` equal frozen linears."""

    out_features: int
    in_features: int
    count: int
    has_bias: bool
    is_adapted: bool

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class BaseWeights:
    """What determines the bytes of a base; a `ModelShape` has the same and more."""

    linears: tuple[Linear, ...]
    other_parameters: int  # everything that is not a frozen linear; tied ones once
    dtype_bytes: int


@dataclass(frozen=True)
class ModelShape:
    """A model as described by its config.json and the run's config."""

    family: str
    linears: tuple[Linear, ...]
    other_parameters: int  # embeddings, head, norms, experts: everything that is not a frozen linear; tied ones once
    hidden_size: int
    vocab_size: int
    num_heads: int
    head_dim: int
    max_positions: int | None
    layers: tuple[LayerCost, ...]  # in order, from the first to the last
    outside: LayerCost  # embedding and last norm
    logit_bytes: tuple[float, float]  # per logit of the current chunk: if it is the only one, if there are others
    max_chunk_logits: int
    lora_r: int
    dtype_bytes: int
    is_compiled: bool
    layer_linears: tuple[tuple[Linear, ...], ...]  # those of `linears` that are in each layer
    evaluation: EvaluationPass
    embedding_parameters: int  # of the token embedding, as part of `other_parameters`; 0 if it is the head too
    coverage: AdapterCoverage | None = None  # which parts have adapters

    @property
    def num_frozen(self) -> int:
        return sum(linear.weights * linear.count for linear in self.linears)

    @property
    def num_trainable(self) -> int:
        return sum(
            self.lora_r * (linear.out_features + linear.in_features) * linear.count
            for linear in self.linears
            if linear.is_adapted
        )


@dataclass(frozen=True)
class Workload:
    """The work of a step. `rows` and `tokens` are those of the largest micro-batch, `mean_tokens` is the mean."""

    rows: int
    tokens: int
    mean_tokens: float  # of the longest row of a micro-batch, with padding
    real_share: float  # share of a micro-batch's tokens that are not padding
    supervised_share: float  # share of the real tokens
    accumulation: int
    steps: int | None  # None: not known without the data
    eval_tokens: int = 0  # of all held-out rows
    num_evals: int = 0
    eval_batch: tuple[int, int] = (0, 0)  # rows and tokens of the largest evaluation pass
    eval_labels: int | None = None  # the most supervised tokens of one of its rows; None: not known
    answers: tuple[int, int, int] = (0, 0, 0)  # generated together, tokens of the longest prompt, most new tokens
    generated_tokens: int = 0
    has_one_shape: bool = False  # all micro-batches have one shape: compiled passes become CUDA graphs
    is_measured: bool = False  # counted on the rows of the run; False: full rows are assumed
    ranks: int = 1  # each with `accumulation` micro-batches of every step
    local_ranks: int = 1  # those on one machine

    @property
    def tokens_per_step(self) -> float:
        """Tokens of all ranks, without padding."""
        return self.rows * self.mean_tokens * self.real_share * self.accumulation * self.ranks

    def with_eval_rows(self, rows: int) -> Workload:
        """The same work with at most so many rows in an evaluation pass, and prompts answered together."""
        now, tokens = self.eval_batch
        return replace(self, eval_batch=(min(rows, now), tokens)).with_answers(rows)

    def with_answers(self, rows: int) -> Workload:
        """The same work with at most so many prompts answered together."""
        together, *lengths = self.answers
        return replace(self, answers=(min(rows, together), *lengths))

    def with_eval_tokens(self, tokens: int) -> Workload:
        """The same work with rows and prompts of at most so many tokens in evaluations."""
        (rows, longest), (together, prompt, new) = self.eval_batch, self.answers
        labels = None if self.eval_labels is None else min(tokens, self.eval_labels)
        answers = (together, min(tokens, prompt), new)
        return replace(self, eval_batch=(rows, min(tokens, longest)), eval_labels=labels, answers=answers)

    @property
    def rows_per_step(self) -> int:
        return self.rows * self.accumulation * self.ranks


Precision = Literal["nf4", "fp8", "bf16", "fp32"]


@dataclass(frozen=True)
class MemoryStrategy:
    """One combination of memory settings."""

    base_precision: Precision
    is_double_quantised: bool
    has_dequantized_copy: bool  # an unpacked copy is kept beside the NF4 codes
    num_checkpointed: int
    is_offloaded: bool
    optim: str
    device: Literal["cuda", "cpu"]
    num_streamed: int = 0  # layers whose frozen weights are in host memory
    num_shards: int = 1  # cards that the frozen weights of all layers are split over

    @property
    def copies_base(self) -> bool:
        """Whether frozen layers are copied to this card in each pass."""
        return self.num_streamed > 0 or self.num_shards > 1
