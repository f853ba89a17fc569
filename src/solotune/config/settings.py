"""Parts of a config, for functions that need no more than these: `config.lora`, `config.optimizer`, ...

The YAML stays flat and is checked as a whole (`run_config`). A function that takes `LoraSettings` says by its type
what it reads, and can be called without a config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from solotune.config.metric_specs import MetricSpec

FOREIGN = "foreign"
"""Source of a value that the files of another trainer have."""
MICRO_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""Keys whose product is the rows of a step."""
EVAL_ROWS = "per_device_eval_batch_size"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all parts have: where each value came from."""

    sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def source_of(self, key: str) -> str:
        """Where the value of a config key came from: `default`, `run.yaml line 12`, `command line`, ..."""
        return self.sources.get(key, "default")


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Settings):
    """The adapter: W x + scale B A x, with A of (r, in) and B of (out, r)."""

    r: int
    alpha: float
    dropout: float
    target_modules: list[str] | Literal["all-linear"]
    use_rslora: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class PrecisionSettings(Settings):
    """How the frozen base is stored and multiplied. `base_precision` may be `auto` until the plan has chosen."""

    base_precision: Literal["nf4", "fp8", "bf16", "fp32", "auto"]
    double_quant: bool
    multiplies_in_fp8: bool
    base_residency: Literal["auto", "quantized", "dequantized"]
    base_offload: bool | int | Literal["auto"]  # a number: that many layers, spread evenly
    base_sharding: bool | Literal["auto"]
    bf16: bool


@dataclass(frozen=True, kw_only=True)
class MemorySettings(Settings):
    """What decides how much memory a run takes. `auto` is for the plan to choose."""

    memory_budget: float | str
    base_precision: Literal["nf4", "fp8", "bf16", "fp32", "auto"]
    matmul_precision: Literal["auto", "bf16", "fp8"]
    multiplies_in_fp8: bool
    double_quant: bool
    base_residency: Literal["auto", "quantized", "dequantized"]
    base_offload: bool | int | Literal["auto"]  # a number: that many layers, spread evenly
    base_sharding: bool | Literal["auto"]
    gradient_checkpointing: bool | int | Literal["auto"]  # a number: that many layers, from the first
    activation_offload: bool
    optim: str
    batch_size: int
    accumulation: int
    eval_batch_size: int
    max_length: int

    @property
    def offload_is_open(self) -> bool:
        """Whether the plan may choose `activation_offload`: it has no `auto`, so it may where nobody set it."""
        return self.source_of("activation_offload") == "default"

    @property
    def micro_batch_is_open(self) -> bool:
        """Whether the plan may choose the rows of a micro-batch, at the same rows a step: if nobody set either key."""
        return all(self.source_of(key) == "default" for key in MICRO_BATCH)

    @property
    def eval_rows_are_open(self) -> bool:
        """Whether the plan may choose fewer rows for an evaluation pass: if nobody set their number."""
        return self.source_of(EVAL_ROWS) == "default"


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings):
    """AdamW by its name in transformers, and its numbers."""

    name: Literal["paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch"]
    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    max_grad_norm: float


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings(Settings):
    """The learning rate of each step."""

    learning_rate: float
    type: Literal["cosine", "linear", "constant", "constant_with_warmup"]
    warmup_steps: int
    warmup_ratio: float


@dataclass(frozen=True, kw_only=True)
class BatchSettings(Settings):
    """Rows of a micro-batch and of a step, and how long a run is."""

    batch_size: int
    accumulation: int
    max_length: int
    packing: bool
    has_one_shape: bool  # packed and compiled: every micro-batch is padded to one shape
    takes_graphs: bool  # passes whose shapes repeat become CUDA graphs
    max_steps: int  # -1: by epochs
    num_epochs: float
    seed: int
    ranks: int = 1  # processes that share a step, each with `accumulation` micro-batches of it


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Settings):
    """When the held-out rows are evaluated, and how many answers are generated."""

    batch_size: int
    num_samples: int
    max_new_tokens: int
    metrics: tuple[MetricSpec, ...]
    metrics_rows: int
    load_best: bool
    patience: int | None  # evaluations without a new best after which the run ends; None: never
    steps: int | None
    strategy: Literal["epoch", "steps", "no"]

    @property
    def scores_answers(self) -> bool:
        """Whether a metric needs generated answers."""
        return any(spec.kind != "exact_match" for spec in self.metrics)

    @property
    def num_answers(self) -> int:
        """The most answers that a model generates after training."""
        return max(self.num_samples, self.metrics_rows if self.scores_answers else 0)

    @property
    def tracks_best(self) -> bool:
        """Whether evaluations during training are compared with the best one."""
        return self.load_best or self.patience is not None

    def every(self, steps_per_epoch: int) -> int | None:
        """Steps between two evaluations; None for never."""
        return steps_between(self.steps, self.strategy, steps_per_epoch)


@dataclass(frozen=True, kw_only=True)
class SourceSettings(Settings):
    """Where the rows come from."""

    dataset: str | list[str]
    config: str | None
    revision: str | None
    split: str
    eval_dataset: str | list[str] | None
    eval_split: str
    column_mapping: Mapping[str, str]
    on_bad_row: Literal["error", "drop"]
    exact_deduplication: bool


@dataclass(frozen=True, kw_only=True)
class SplitSettings(Settings):
    """Which rows are held out for validation, when there is no `eval_dataset`."""

    validation_size: float | int  # a fraction below 1, or a number of rows
    split_by: str | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class RenderSettings(Settings):
    """How rows become token ids with a loss mask."""

    max_length: int
    overflow: Literal["truncate", "drop", "split", "error"]
    assistant_only_loss: bool
    train_on_last_turn: bool
    on_bad_row: Literal["error", "drop"]


def steps_between(steps: int | None, strategy: str, steps_per_epoch: int) -> int | None:
    """Steps between two evaluations or saves; None for never."""
    return steps if steps is not None else {"epoch": steps_per_epoch, "no": None}[strategy]
