"""The run's configuration: every key with its type, default, help and limits, and the rules between keys.

Names are the ones the ecosystem already uses (TRL's and Hugging Face's). The defaults are those of QLoRA: NF4 with
double quantisation, r=16 on q, k, v and o. `load.load_config` reads a config and explains mistakes, `describe` gives
help and limits in words, `write` saves a config as YAML, `settings` has typed parts for functions that need few keys.

What it does not do: look at the machine. Values that depend on it (`optim` without CUDA, bf16 on an old CPU) are set
in `hardware.machine.resolve_for_machine`, each with its reason.

(This file is long because it is one table: a key's type, default, help and limits belong together.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    field_validator,
    model_validator,
)

from solotune.config.metric_specs import metric_specs
from solotune.config.settings import (
    BatchSettings,
    EvaluationSettings,
    LoraSettings,
    MemorySettings,
    OptimizerSettings,
    PrecisionSettings,
    RenderSettings,
    ScheduleSettings,
    SourceSettings,
    SplitSettings,
    steps_between,
)
from solotune.result_repr import Table, as_html

PositiveInt = Annotated[int, Field(ge=1, le=1_000_000_000)]  # more is a typing error, or an attack
SmallPositiveInt = Annotated[int, Field(ge=1, le=65_536)]


def _short(text: str) -> str:
    """Limit the length; pydantic's `max_length` would refuse names that are not UTF-8 without saying why."""
    if len(text) > 4096:  # no operating system has longer paths
        raise ValueError("at most 4,096 characters")
    return text


Text = Annotated[str, AfterValidator(_short)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
BUDGET_SIZE = r"\s*(?=.*[1-9])([0-9]*\.?[0-9]+)\s*(GiB|GB|MiB|MB)\s*"  # 24GiB, 9.5 GiB, 24GB

COLUMNS = (
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
    "text",
    "system",
    "tools",
    "history",
    "reasoning_content",
    "id",
    "conversation_id",
    "parent_id",
    "weight",
    "train",
    "ignore",
)
"""Column names that solotune reads; a column mapped to `ignore` is skipped."""

SECTIONS = ("model", "adapter", "data", "training", "evaluation", "run")


class Choice(NamedTuple):
    """A value that solotune chose, and why: printed at the start of a run and saved with it."""

    key: str
    value: object
    because: str


def _in(section: str, **limits: Any) -> Any:
    return Field(json_schema_extra={"section": section}, **limits)


class RunConfig(BaseModel):
    """Configuration of one run. Frozen: what was validated is what runs."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    # --- model
    model_name_or_path: Text = _in("model", min_length=1)
    """Model id on the hub, or a local folder with config.json, safetensors and tokenizer."""
    model_revision: Text = _in("model", default="main", min_length=1)
    """Branch, tag or commit of a hub model."""
    base_precision: Literal["nf4", "fp8", "bf16", "fp32", "auto"] = _in("model", default="nf4")
    """Precision of the frozen base: nf4 (4 bits, QLoRA), fp8 (with fp8 matmuls), bf16, fp32; auto: the plan decides."""
    matmul_precision: Literal["auto", "bf16", "fp8"] = _in("model", default="auto")
    """Precision of base matmuls: bf16 (float32 with `bf16: false`), fp8, or auto (fp8 for an fp8 base, else bf16)."""
    bnb_4bit_quant_type: Literal["nf4"] = _in("model", default="nf4")
    """4-bit data type."""
    bnb_4bit_use_double_quant: bool = _in("model", default=True)
    """Quantise the quantisation constants too: 4.13 instead of 4.5 bits per weight."""
    bnb_4bit_compute_dtype: Literal["bfloat16", "float32"] | None = _in("model", default=None)
    """Data type of matmuls with 4-bit weights; empty: bfloat16 with `bf16: true`, else float32."""
    base_residency: Literal["auto", "quantized", "dequantized"] = _in("model", default="auto")
    """quantized: unpack 4-bit weights at each use (saves memory). dequantized: keep a copy (faster). Same results."""
    base_offload: Literal["auto"] | bool | PositiveInt = _in("model", default="auto")
    """Keep frozen layers in host memory (RAM) and stream them: true (all), false, N of them, or auto (if needed)."""
    base_sharding: Literal["auto"] | bool = _in("model", default="auto")
    """Split the frozen layers over the GPUs of one machine (torchrun): true, false, or auto (the plan decides)."""
    attn_implementation: Literal["sdpa", "eager"] = _in("model", default="sdpa")
    """Attention implementation of transformers: sdpa (flash attention where possible) or eager (plain)."""

    # --- adapter
    lora_r: SmallPositiveInt = _in("adapter", default=16)
    """Rank of the LoRA update."""
    lora_alpha: float = _in("adapter", default=32.0, gt=0, le=1e6)
    """LoRA scaling: the update is multiplied by alpha / r."""
    lora_dropout: Fraction = _in("adapter", default=0.05)
    """Dropout on the adapter's input, during training only."""
    lora_target_modules: list[Text] | Literal["all-linear"] = _in(
        "adapter", default=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    """Names of the linear layers that get an adapter, or all-linear."""
    use_rslora: bool = _in("adapter", default=False)
    """Rank-stabilised LoRA: multiply by alpha / sqrt(r) instead of alpha / r."""

    # --- data
    dataset: Text | list[Text] = _in("data")
    """Training data: a hub id, or one or more local files (jsonl, json, csv, parquet)."""
    dataset_config: Text | None = _in("data", default=None)
    """Configuration (subset) name of a hub dataset."""
    dataset_revision: Text | None = _in("data", default=None)
    """Branch, tag or commit of a hub dataset."""
    dataset_split: Text = _in("data", default="train", min_length=1)
    """Split to train on; slices work as in datasets: `train_sft[:5000]`, `train[10%:20%]`."""
    eval_dataset: Text | list[Text] | None = _in("data", default=None)
    """Your own evaluation data, a hub id or files; empty: some rows of `dataset` are held out."""
    eval_dataset_split: Text = _in("data", default="train", min_length=1)
    """Split of `eval_dataset`; slices work too."""
    validation_size: float | int = _in("data", default=0.05)
    """Rows kept for evaluation: a fraction (0.05 = 5 %) or a number of rows; 0: no evaluation."""
    split_by: Text | None = _in("data", default=None)
    """Name of a column: rows with the same value are all in training or all held out."""
    column_mapping: dict[Text, Text] = _in("data", default={})
    """Rename your columns: `{question: prompt, answer: completion}`. Use `ignore` to skip a column."""
    on_bad_row: Literal["error", "drop"] = _in("data", default="error")
    """Rows that cannot be used: stop and say which row (error), or skip them and count them by reason (drop)."""
    dataset_exact_deduplication: bool = _in("data", default=True)
    """Remove exact copies of a row; false: keep them, if rows are repeated on purpose (like a higher `weight`)."""
    chat_template_path: Text | None = _in("data", default=None)
    """Jinja chat template file, for a tokenizer without a template or to replace its template."""
    max_length: int = _in("data", default=2048, ge=8, le=10_000_000)
    """Maximum length of a row, in tokens."""
    overflow: Literal["truncate", "drop", "split", "error"] = _in("data", default="truncate")
    """Rows longer than `max_length`: truncate the end, drop the row, split it into several, or stop with an error."""
    packing: bool = _in("data", default=False)
    """Put several rows in one sequence of `max_length` instead of padding; rows do not see each other."""
    assistant_only_loss: bool = _in("data", default=True)
    """Compute the loss only on assistant turns and their end-of-turn token; false: on every token."""
    train_on_last_turn: bool = _in("data", default=False)
    """Compute the loss only on the last assistant turn of each row."""

    # --- training
    num_train_epochs: float = _in("training", default=3.0, gt=0, le=1e6)
    """Number of passes over the training rows."""
    max_steps: int = _in("training", default=-1, le=1_000_000_000)
    """Number of optimizer steps; if set, `num_train_epochs` is ignored. -1: not set."""
    per_device_train_batch_size: SmallPositiveInt = _in("training", default=4)
    """Rows per forward pass (micro-batch). If neither it nor accumulation is set, a plan that streams may raise it."""
    gradient_accumulation_steps: SmallPositiveInt = _in("training", default=8)
    """Forward passes per optimizer step; their gradients are added."""
    gradient_checkpointing: Literal["auto"] | bool | PositiveInt = _in("training", default="auto")
    """Recompute layers in backward to save memory: true (all), false, N (the first N), or auto (as few as needed)."""
    activation_offload: bool = _in("training", default=False)
    """Keep the inputs of checkpointed layers in host memory (RAM), for very long rows."""
    preflight: Literal["auto"] | bool = _in("training", default="auto")
    """Before training, try the largest step, an evaluation and a save; auto: only on a GPU."""
    torch_compile: bool = _in("training", default=True)
    """Compile the decoder layers (CUDA only): the first step is slower; later steps are faster and need less memory."""
    cuda_graphs: bool = _in("training", default=True)
    """Use CUDA graphs when all batches have the same shape (packing). Small models (135M) train 2 to 4 times faster."""
    optim: Literal["paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch"] = _in(
        "training", default="paged_adamw_8bit"
    )
    """Optimizer; the 8-bit and paged ones come from bitsandbytes and need CUDA."""
    learning_rate: float = _in("training", default=2e-4, gt=0, le=1)
    """Peak learning rate."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = _in(
        "training", default="cosine"
    )
    """Learning rate schedule after warmup."""
    warmup_ratio: Fraction = _in("training", default=0.0)
    """Fraction of all steps in which the learning rate rises from 0 (warmup)."""
    warmup_steps: int = _in("training", default=0, ge=0, le=1_000_000_000)
    """Number of warmup steps; if above 0, `warmup_ratio` is ignored."""
    weight_decay: float = _in("training", default=0.0, ge=0, le=10)
    """Weight decay of AdamW, applied to the adapter."""
    adam_beta1: Fraction = _in("training", default=0.9)
    """Beta 1 of AdamW: decay of the first moment."""
    adam_beta2: Fraction = _in("training", default=0.999)
    """Beta 2 of AdamW: decay of the second moment."""
    adam_epsilon: float = _in("training", default=1e-8, gt=0, le=1)
    """Epsilon of AdamW, added to the denominator."""
    max_grad_norm: float = _in("training", default=1.0, gt=0, le=1e12)
    """Gradient clipping: larger gradients are scaled down to this norm."""
    bf16: bool = _in("training", default=True)
    """Compute in bfloat16; false: in float32."""
    seed: int = _in("training", default=42, ge=0, lt=1 << 32)
    """Random seed for adapter initialisation, row order, dropout and the held-out split."""

    # --- evaluation
    eval_strategy: Literal["epoch", "steps", "no"] = _in("evaluation", default="epoch")
    """When to evaluate on the held-out rows during training (there is always an evaluation at the end)."""
    eval_steps: PositiveInt | None = _in("evaluation", default=None)
    """Evaluate every N steps; implies `eval_strategy: steps`."""
    per_device_eval_batch_size: SmallPositiveInt = _in("evaluation", default=8)
    """Rows per evaluation pass. If you leave it out, the plan takes fewer where 8 do not fit; losses are the same."""
    num_samples: int = _in("evaluation", default=3, ge=0, le=65_536)
    """Number of held-out prompts that the base and the tuned model answer, for you to read."""
    max_new_tokens: int = _in("evaluation", default=128, ge=1, le=10_000_000)
    """Maximum length of a generated answer (samples, metrics and chat), in tokens."""
    metrics: list[Text | dict[Text, Text | list[Text]]] = _in("evaluation", default=[])
    """Scores of generated answers, base against tuned; exact_match is always measured, without generating."""
    metrics_rows: PositiveInt = _in("evaluation", default=200)
    """Held-out rows that `metrics` are measured on: at most this many, spread evenly."""
    load_best_model_at_end: bool = _in("evaluation", default=False)
    """Keep the adapter with the lowest held-out loss; the earlier one, unless a later one is better beyond noise."""
    early_stopping_patience: PositiveInt | None = _in("evaluation", default=None)
    """Stop after this many evaluations in a row without a held-out loss that is lower beyond noise; empty: never."""
    metric_for_best_model: Literal["eval_loss"] = _in("evaluation", default="eval_loss")
    """What decides which adapter is best: the held-out loss."""

    # --- run
    memory_budget: float | Text = _in("run", default="auto")
    """GPU memory the run may use: a size (24GiB), a fraction of the GPU (0.9), or auto (what is free)."""
    output_dir: Text | None = _in("run", default=None, min_length=1)
    """Run directory; empty: runs/<config name>-<date>-<time>."""
    logging_steps: PositiveInt = _in("run", default=25)
    """Print a line every N steps (metrics.jsonl has every step)."""
    save_strategy: Literal["epoch", "steps", "no"] = _in("run", default="epoch")
    """When to save a checkpoint (the adapter is always saved at the end)."""
    save_steps: PositiveInt | None = _in("run", default=None)
    """Save a checkpoint every N steps; implies `save_strategy: steps`."""
    save_total_limit: PositiveInt | None = _in("run", default=None)
    """Number of newest checkpoints to keep; empty: all."""
    resume_from_checkpoint: Text | None = _in("run", default=None, min_length=1)
    """Checkpoint folder to continue from (`--resume` finds the newest by itself)."""
    use_cpu: bool = _in("run", default=False)
    """Use the CPU even if there is a GPU."""
    report_to: (
        Literal["none", "tensorboard", "wandb", "mlflow", "trackio"]
        | list[Literal["tensorboard", "wandb", "mlflow", "trackio"]]
    ) = _in("run", default="none")
    """Trackers that get the run's steps and evaluations: one, or a list. They never stop or slow a run."""
    allow_faults: Text | list[Text] = _in("run", default=[])
    """Faults to train with, though they are certain before step 1 and stop a run: `[F67]` or `[rate-too-high]`."""

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)
    _name: str = PrivateAttr(default="run")
    _ranks: int = PrivateAttr(default=1)

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """For pydantic's repr: the keys that are set, or chosen for this machine."""
        known = self._sources or self.model_fields_set
        return ((key, getattr(self, key)) for key in RunConfig.model_fields if key in known)

    def _repr_html_(self) -> str:
        rows = [(key, str(value), self.source_of(key)) for key, value in self.__repr_args__()]
        return as_html([Table(f"Config {self.name}; other keys have their defaults", ("key", "value", "from"), rows)])

    @property
    def name(self) -> str:
        """Name of the config file without its extension; `run` if the config did not come from a file."""
        return self._name

    def source_of(self, key: str) -> str:
        """Where a value came from: `default`, `demo.yaml line 12`, `command line`, `python` or `machine`."""
        return self._sources.get(key, "default")

    @property
    def sources(self) -> Mapping[str, str]:
        """Where each value came from that is not a default."""
        return self._sources

    @classmethod
    def validated(cls, values: Mapping[str, Any], sources: Mapping[str, str], name: str) -> RunConfig:
        """Check `values` and record where each came from.

        Raises:
            ValidationError: pydantic's, with every mistake; `load.load_config` explains them.
        """
        config = cls.model_validate(values)
        config._sources, config._name = dict(sources), name
        return config

    def replaced(self, source: str, **values: Any) -> RunConfig:
        """Copy with some values changed, and check it; `source` is recorded for each changed key."""
        sources = {**self._sources, **dict.fromkeys(values, source)}
        return RunConfig.validated({**self.model_dump(), **values}, sources, self._name).on_ranks(self._ranks)

    @property
    def ranks(self) -> int:
        """Processes that share each step: no key of a file, but how the run was started."""
        return self._ranks

    def on_ranks(self, ranks: int) -> RunConfig:
        """The config for a run of so many processes: a step has the rows of all of them."""
        config = self.model_copy()
        config._ranks = ranks
        return config

    @field_validator("validation_size")
    @classmethod
    def _size(cls, size: float | int) -> float | int:
        if isinstance(size, float) and not 0 <= size < 1:
            raise ValueError("a fraction, at least 0 and below 1 (0.05), or a whole number of rows (200)")
        if not 0 <= size <= 1_000_000_000:
            raise ValueError("0 or more")
        return size

    @field_validator("memory_budget")
    @classmethod
    def _budget(cls, budget: float | str) -> float | str:
        is_fraction = isinstance(budget, float) and 0 < budget < 1
        if not is_fraction and budget != "auto" and not re.fullmatch(BUDGET_SIZE, str(budget)):
            raise ValueError("auto, a fraction of the GPU's memory (0.9), or a size (24GiB)")
        return budget

    @field_validator("max_steps")
    @classmethod
    def _steps(cls, steps: int) -> int:
        if steps != -1 and steps < 1:
            raise ValueError("-1 (use num_train_epochs) or at least 1")
        return steps

    @field_validator("dataset", "eval_dataset", "lora_target_modules")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value is not None and (not value or any(not item for item in value)):
            raise ValueError("at least one name, and no empty ones")
        return value

    @field_validator("metrics")
    @classmethod
    def _metrics(cls, entries: list[Any]) -> list[Any]:
        metric_specs(entries)
        return entries

    @field_validator("column_mapping")
    @classmethod
    def _columns(cls, mapping: dict[str, str]) -> dict[str, str]:
        targets = [target for target in mapping.values() if target != "ignore"]
        if not set(mapping.values()) <= set(COLUMNS) or len(set(targets)) < len(targets) or "" in mapping:
            raise ValueError("each target name once")
        return mapping

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        given = self.model_fields_set
        if self.eval_dataset is not None and "validation_size" in given and self.validation_size:
            raise ValueError("eval_dataset and validation_size: both are set; remove one")
        dtype = "bfloat16" if self.bf16 else "float32"
        if self.bnb_4bit_compute_dtype not in (None, dtype):
            raise ValueError(
                f"bf16 and bnb_4bit_compute_dtype: bf16: {str(self.bf16).lower()} computes in {dtype}, but "
                f"bnb_4bit_compute_dtype is {self.bnb_4bit_compute_dtype}; use the same type for both, or remove one"
            )
        if 0 < self.max_steps < self.warmup_steps:
            words = f"max_steps: {self.max_steps} is less than warmup_steps: {self.warmup_steps}"
            raise ValueError(f"max_steps and warmup_steps: {words}")
        if self.train_on_last_turn and not self.assistant_only_loss:
            raise ValueError(
                "train_on_last_turn and assistant_only_loss: train_on_last_turn: true trains on one turn, "
                "but assistant_only_loss: false trains on every token; remove one"
            )
        if self.base_residency == "dequantized" and self.base_offload not in ("auto", False):
            raise ValueError(
                "base_residency and base_offload: an unpacked copy is kept on the GPU, which offloading saves; "
                "use base_residency: quantized, or base_offload: false"
            )
        if self.base_sharding is True and self.base_offload not in ("auto", False):
            raise ValueError(
                "base_sharding and base_offload: frozen layers lie on the GPUs, or in host memory; "
                "use base_offload: false, or base_sharding: false"
            )
        if self.base_sharding is True and self.base_residency == "dequantized":
            raise ValueError(
                "base_residency and base_sharding: an unpacked copy of all layers is kept on each GPU, which sharding "
                "saves; use base_residency: quantized, or base_sharding: false"
            )
        if self.matmul_precision != "auto" and (change := self._against_matmuls()):
            base, matmuls = f"base_precision: {self.base_precision}", f"matmul_precision: {self.matmul_precision}"
            raise ValueError(f"base_precision and matmul_precision: {base} with {matmuls}; {change}")
        for what in ("eval", "save"):
            steps, strategy = getattr(self, f"{what}_steps"), getattr(self, f"{what}_strategy")
            if steps is not None and f"{what}_strategy" in given and strategy != "steps":
                words = f"{what}_steps: {steps} needs {what}_strategy: steps, not {strategy}"
                raise ValueError(f"{what}_strategy and {what}_steps: {words}")
            if steps is None and strategy == "steps":
                raise ValueError(f"{what}_strategy: steps needs {what}_steps")
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise ValueError("early_stopping_patience and eval_strategy: early_stopping_patience needs evaluations "
                             "during training; use eval_strategy: epoch, or eval_steps")  # fmt: skip
        return self

    def _against_matmuls(self) -> str | None:
        """What to change if `base_precision` and `matmul_precision` contradict each other; None if they agree."""
        if self.matmul_precision == "bf16":
            stored = "an fp8 base is always multiplied in fp8; remove matmul_precision, or use base_precision: bf16"
            return stored if self.base_precision == "fp8" else None
        if self.base_precision in ("bf16", "fp32"):
            return "fp8 matmuls need weights stored in fp8; use base_precision: fp8"
        if self.base_precision == "nf4" and self.base_residency != "auto":
            return f"fp8 matmuls keep only the fp8 weights; remove base_residency: {self.base_residency}"
        return None

    @property
    def multiplies_in_fp8(self) -> bool:
        """Whether the frozen linears are `Fp8Weight`s: 16 bits per weight, for every `base_precision`."""
        return "fp8" in (self.base_precision, self.matmul_precision)

    @property
    def takes_graphs(self) -> bool:
        """Whether passes with a repeated shape become CUDA graphs, if there is CUDA."""
        return self.cuda_graphs and self.torch_compile

    @property
    def trackers(self) -> list[str]:
        """The trackers of `report_to`, each once."""
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        return [name for name in dict.fromkeys(names) if name != "none"]

    # --- typed parts, for functions that need only these

    @property
    def lora(self) -> LoraSettings:
        return LoraSettings(
            r=self.lora_r,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            target_modules=self.lora_target_modules,
            use_rslora=self.use_rslora,
            seed=self.seed,
            sources=self._sources,
        )

    @property
    def precision(self) -> PrecisionSettings:
        return PrecisionSettings(
            base_precision=self.base_precision,
            double_quant=self.bnb_4bit_use_double_quant,
            multiplies_in_fp8=self.multiplies_in_fp8,
            base_residency=self.base_residency,
            base_offload=self.base_offload,
            base_sharding=self.base_sharding,
            bf16=self.bf16,
            sources=self._sources,
        )

    @property
    def memory(self) -> MemorySettings:
        is_shared = self.base_sharding is True
        return MemorySettings(
            memory_budget=self.memory_budget,
            base_precision=self.base_precision,
            matmul_precision=self.matmul_precision,
            multiplies_in_fp8=self.multiplies_in_fp8,
            double_quant=self.bnb_4bit_use_double_quant,
            base_residency="quantized" if is_shared else self.base_residency,  # `auto` has no choice then
            base_offload=False if is_shared else self.base_offload,
            base_sharding=self.base_sharding,
            gradient_checkpointing=self.gradient_checkpointing,
            activation_offload=self.activation_offload,
            optim=self.optim,
            batch_size=self.per_device_train_batch_size,
            accumulation=self.gradient_accumulation_steps,
            eval_batch_size=self.per_device_eval_batch_size,
            max_length=self.max_length,
            sources=self._sources,
        )

    @property
    def optimizer(self) -> OptimizerSettings:
        return OptimizerSettings(
            name=self.optim,
            learning_rate=self.learning_rate,
            beta1=self.adam_beta1,
            beta2=self.adam_beta2,
            epsilon=self.adam_epsilon,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            sources=self._sources,
        )

    @property
    def schedule(self) -> ScheduleSettings:
        return ScheduleSettings(
            learning_rate=self.learning_rate,
            type=self.lr_scheduler_type,
            warmup_steps=self.warmup_steps,
            warmup_ratio=self.warmup_ratio,
            sources=self._sources,
        )

    @property
    def batches(self) -> BatchSettings:
        return BatchSettings(
            batch_size=self.per_device_train_batch_size,
            accumulation=self.gradient_accumulation_steps,
            max_length=self.max_length,
            packing=self.packing,
            has_one_shape=self.packing and self.torch_compile,
            takes_graphs=self.takes_graphs,
            max_steps=self.max_steps,
            num_epochs=self.num_train_epochs,
            seed=self.seed,
            ranks=self._ranks,
            sources=self._sources,
        )

    @property
    def evaluation(self) -> EvaluationSettings:
        return EvaluationSettings(
            batch_size=self.per_device_eval_batch_size,
            num_samples=self.num_samples,
            max_new_tokens=self.max_new_tokens,
            metrics=tuple(metric_specs(self.metrics)),
            metrics_rows=self.metrics_rows,
            load_best=self.load_best_model_at_end,
            patience=self.early_stopping_patience,
            steps=self.eval_steps,
            strategy=self.eval_strategy,
            sources=self._sources,
        )

    @property
    def source(self) -> SourceSettings:
        return SourceSettings(
            dataset=self.dataset,
            config=self.dataset_config,
            revision=self.dataset_revision,
            split=self.dataset_split,
            eval_dataset=self.eval_dataset,
            eval_split=self.eval_dataset_split,
            column_mapping=self.column_mapping,
            on_bad_row=self.on_bad_row,
            exact_deduplication=self.dataset_exact_deduplication,
            sources=self._sources,
        )

    @property
    def split(self) -> SplitSettings:
        return SplitSettings(
            validation_size=self.validation_size, split_by=self.split_by, seed=self.seed, sources=self._sources
        )

    @property
    def rendering(self) -> RenderSettings:
        return RenderSettings(
            max_length=self.max_length,
            overflow=self.overflow,
            assistant_only_loss=self.assistant_only_loss,
            train_on_last_turn=self.train_on_last_turn,
            on_bad_row=self.on_bad_row,
            sources=self._sources,
        )

    def every(self, what: Literal["eval", "save"], steps_per_epoch: int) -> int | None:
        """Steps between two evaluations or saves; None for never."""
        return steps_between(getattr(self, f"{what}_steps"), getattr(self, f"{what}_strategy"), steps_per_epoch)
