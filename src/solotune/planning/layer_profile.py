"""What a plan is computed from: the costs of one layer, the shape of a model, the work of a step.

Plain numbers, without torch: `model_shape` makes them from a config, `memory` turns them into bytes, `throughput`
into seconds. Whatever grows with the batch is a `Polynomial`, so one look at a layer
serves any batch.

Shape legend: B rows, T tokens of the longest row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Polynomial(NamedTuple):
    """a + b B T + c B T^2: the last is there where an attention keeps its whole matrix."""

    constant: float = 0.0
    per_token: float = 0.0
    per_token_squared: float = 0.0

    def at(self, rows: int, tokens: int) -> float:
        return self.constant + rows * tokens * (self.per_token + tokens * self.per_token_squared)

    def __add__(self, other: tuple[float, ...]) -> Polynomial:  # type: ignore[override]
        return Polynomial(*(a + b for a, b in zip(self, other, strict=True)))


class Matmul(NamedTuple):
    """A product: its operations, and the bytes it reads and writes. `frozen`: it has a weight of the base in it."""

    flops: Polynomial
    bytes: Polynomial
    frozen: bool


@dataclass(frozen=True)
class Pass:
    """One forward or one backward of a layer."""

    matmuls: tuple[Matmul, ...]
    other_bytes: Polynomial  # read and written by everything that is no product of matrices
    num_kernels: int


@dataclass(frozen=True)
class LayerCost:
    """One kind of decoder layer: what it keeps, what it needs for a moment, what it computes.

    Bytes, x being the layer's input and y its output:
    - kept: what forward leaves behind for backward beside x; y is in it.
    - output: y alone, which is all that a checkpointed layer leaves behind.
    - forward_peak: the most that is there at once during forward beside x.
    - backward_extra: the most that is there during backward, less what is kept without y, plus x.
    """

    kept: Polynomial
    output: Polynomial
    forward_peak: Polynomial
    backward_extra: Polynomial
    forward: Pass
    backward: Pass
    how: Literal["compiled", "eager", "estimated"]


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
    """What the bytes of a base follow from; a `ModelShape` has the same and more."""

    linears: tuple[Linear, ...]
    other_parameters: int  # everything that is no frozen linear; tied ones once
    dtype_bytes: int


@dataclass(frozen=True)
class ModelShape:
    """A model as its config.json and the run's config describe it."""

    family: str
    linears: tuple[Linear, ...]
    other_parameters: int  # embeddings, head, norms, experts: everything that is no frozen linear; tied ones once
    hidden_size: int
    vocab_size: int
    num_heads: int
    head_dim: int
    max_positions: int | None
    layers: tuple[LayerCost, ...]  # in order, from the first to the last
    outside: LayerCost  # embedding and last norm
    logit_bytes: tuple[float, float]  # for each logit of a chunk in work: where it is the only one, where it is not
    max_chunk_logits: int
    lora_r: int
    dtype_bytes: int
    is_compiled: bool

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
    """What is trained on. `rows` and `tokens` are those of the largest micro-batch, `mean_tokens` the usual."""

    rows: int
    tokens: int
    mean_tokens: float  # of the longest row of a micro-batch, with padding
    real_share: float  # of the tokens of a micro-batch that are no padding
    supervised_share: float  # of the real ones
    accumulation: int
    steps: int | None  # None: unknown without the data
    eval_tokens: int = 0  # of all held-out rows
    num_evals: int = 0
    eval_batch: tuple[int, int] = (0, 0)  # rows and tokens of the largest evaluation pass
    generated_tokens: int = 0
    has_one_shape: bool = False  # its micro-batches: compiled passes then become CUDA graphs
    is_measured: bool = False  # from the rows of the run, and not full rows by assumption

    @property
    def tokens_per_step(self) -> float:
        """Real tokens."""
        return self.rows * self.mean_tokens * self.real_share * self.accumulation


Precision = Literal["nf4", "fp8", "bf16", "fp32"]


@dataclass(frozen=True)
class MemoryStrategy:
    """One way to run it."""

    base_precision: Precision
    is_double_quantised: bool
    has_dequantized_copy: bool  # NF4 kept expanded beside its codes
    num_checkpointed: int
    is_offloaded: bool
    optim: str
    device: Literal["cuda", "cpu"]
