"""The run's configuration: every key with its type, default, help and limits, and the rules between keys.

Names are the ones the ecosystem already uses (TRL's and Hugging Face's). The defaults are those of QLoRA: NF4 with
double quantisation, r=16 on q, k, v and o. `load.load_config` reads a config and explains mistakes, `describe` gives
help and limits in words, `write` saves a config as YAML, `settings` has typed parts for functions that need few keys.

What it does not do: look at the machine. Values that depend on it (`optim` without CUDA, bf16 on an old CPU) are set
in `hardware.machine.resolve_for_machine`, each with its reason.

(Longer than 400 lines: it is one table, and a key's type, default, help and limits belong together.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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

from solotune.config.settings import (
    BatchSettings,
    LoraSettings,
    OptimizerSettings,
    PrecisionSettings,
    ScheduleSettings,
    SourceSettings,
)

PositiveInt = Annotated[int, Field(ge=1, le=1_000_000_000)]  # beyond it is a slip of the finger, or an attack


def _short(text: str) -> str:
    """Not `max_length`, which refuses names that are not UTF-8 before they can be told what is wrong with them."""
    if len(text) > 4096:  # no path of a system is longer
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
    "id",
    "conversation_id",
    "parent_id",
    "weight",
    "ignore",
)
"""What a column of a data file can be called to be understood; `ignore` is not read."""

SECTIONS = ("model", "adapter", "data", "training", "evaluation", "run")


class Choice(NamedTuple):
    """A value that was chosen for the user, and why: printed at the start of a run and saved with it."""

    key: str
    value: object
    because: str


def _in(section: str, **limits: Any) -> Any:
    return Field(json_schema_extra={"section": section}, **limits)


class RunConfig(BaseModel):
    """One run, fully described. Frozen: what was validated is what runs."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    # --- model
    model_name_or_path: Text = _in("model", min_length=1)
    """Model id on the hub, or a local folder with config.json, safetensors and tokenizer."""
    model_revision: Text = _in("model", default="main", min_length=1)
    """Branch, tag or commit of a hub model."""
    base_precision: Literal["nf4", "fp8", "bf16", "fp32", "auto"] = _in("model", default="nf4")
    """How the frozen base is stored: nf4 (4 bits, QLoRA), fp8 (and multiplied in fp8), bf16, fp32; auto: the plan's."""
    matmul_precision: Literal["auto", "bf16", "fp8"] = _in("model", default="auto")
    """Matmuls of the base: bf16 (float32 with `bf16: false`), fp8, or auto (fp8 for an fp8 base, else bf16)."""
    bnb_4bit_quant_type: Literal["nf4"] = _in("model", default="nf4")
    """The 4-bit data type."""
    bnb_4bit_use_double_quant: bool = _in("model", default=True)
    """Quantise the quantisation constants too: 4.13 instead of 4.5 bits a weight."""
    bnb_4bit_compute_dtype: Literal["bfloat16", "float32"] | None = _in("model", default=None)
    """What 4-bit weights are expanded to for a matmul; empty: bfloat16 with `bf16: true`, else float32."""
    base_residency: Literal["auto", "quantized", "dequantized"] = _in("model", default="auto")
    """Expand 4-bit weights at each use (quantized), or once, beside them, for speed (dequantized): the same numbers."""
    attn_implementation: Literal["sdpa", "eager"] = _in("model", default="sdpa")
    """Attention code of transformers: sdpa (flash where it can) or eager (plain)."""

    # --- adapter
    lora_r: PositiveInt = _in("adapter", default=16, le=65_536)
    """Rank of the LoRA update."""
    lora_alpha: float = _in("adapter", default=32.0, gt=0, le=1e6)
    """LoRA scale: the update is multiplied by alpha / r."""
    lora_dropout: Fraction = _in("adapter", default=0.05)
    """Dropout on the input of the adapter path, training only."""
    lora_target_modules: list[Text] | Literal["all-linear"] = _in(
        "adapter", default=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    """Names of the linear layers that get an adapter, or all-linear."""
    use_rslora: bool = _in("adapter", default=False)
    """Scale by alpha / sqrt(r) instead (rank-stabilised LoRA)."""

    # --- data
    dataset: Text | list[Text] = _in("data")
    """Hub id, or local file(s): jsonl, json, csv, parquet."""
    dataset_config: Text | None = _in("data", default=None)
    """Configuration (subset) name of a hub dataset."""
    dataset_revision: Text | None = _in("data", default=None)
    """Branch, tag or commit of a hub dataset."""
    dataset_split: Text = _in("data", default="train", min_length=1)
    """Split, slices as in datasets: `train_sft[:5000]`, `train[10%:20%]`."""
    eval_dataset: Text | list[Text] | None = _in("data", default=None)
    """Your own validation rows, hub id or files; empty: a part of `dataset` is held out."""
    eval_dataset_split: Text = _in("data", default="train", min_length=1)
    """Split of `eval_dataset`, with slices."""
    validation_size: float | int = _in("data", default=0.05)
    """Held out for validation: a share below 1, or a number of rows; 0 for none."""
    split_by: Text | None = _in("data", default=None)
    """Key of a row; rows that share its value stay on one side of the split."""
    column_mapping: dict[Text, Text] = _in("data", default={})
    """Names of your columns that are not ours: `{question: prompt, answer: completion}`; `ignore` leaves one out."""
    on_bad_row: Literal["error", "drop"] = _in("data", default="error")
    """A row that cannot be used: stop and name it (error), or leave it out and count it under its reason (drop)."""
    chat_template_path: Text | None = _in("data", default=None)
    """A Jinja chat template file, for a tokenizer that has none or to replace its own."""
    max_length: int = _in("data", default=2048, ge=8, le=10_000_000)
    """Longest row in tokens."""
    overflow: Literal["truncate", "drop", "split", "error"] = _in("data", default="truncate")
    """A row longer than `max_length`: cut its end, drop it, make several rows of it, or stop; each is counted."""
    packing: bool = _in("data", default=False)
    """Fill sequences of `max_length` with several rows, each as if it were alone: no padding."""
    assistant_only_loss: bool = _in("data", default=True)
    """Learn only assistant turns with their end-of-turn token; false: every token."""
    train_on_last_turn: bool = _in("data", default=False)
    """Learn only the last assistant turn of each row."""

    # --- training
    num_train_epochs: float = _in("training", default=3.0, gt=0, le=1e6)
    """Passes over the training rows."""
    max_steps: int = _in("training", default=-1, le=1_000_000_000)
    """Optimizer steps; overrides `num_train_epochs` where it is above 0."""
    per_device_train_batch_size: PositiveInt = _in("training", default=4, le=65_536)
    """Rows in one forward pass."""
    gradient_accumulation_steps: PositiveInt = _in("training", default=8, le=65_536)
    """Forward passes summed into one optimizer step."""
    gradient_checkpointing: Literal["auto"] | bool | PositiveInt = _in("training", default="auto")
    """Layers that recompute themselves in backward to save memory: true (all), false, the first N, or as few as fit."""
    activation_offload: bool = _in("training", default=False)
    """Keep the inputs of checkpointed layers in the host's memory: for very long rows."""
    preflight: Literal["auto"] | bool = _in("training", default="auto")
    """Try the largest step, an evaluation and a save before the run begins (auto: on a GPU)."""
    torch_compile: bool = _in("training", default=True)
    """Compile the decoder layers: the first step takes longer, all others less time and memory (CUDA only)."""
    cuda_graphs: bool = _in("training", default=True)
    """Replay compiled passes of one shape (packed rows) as one launch: 135M parameters train 2 to 4 times as fast."""
    optim: Literal["paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch"] = _in(
        "training", default="paged_adamw_8bit"
    )
    """Optimizer; the 8-bit and paged ones are bitsandbytes' and need CUDA."""
    learning_rate: float = _in("training", default=2e-4, gt=0, le=1)
    """Peak learning rate."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = _in(
        "training", default="cosine"
    )
    """Shape of the learning rate after warm-up."""
    warmup_ratio: Fraction = _in("training", default=0.0)
    """Share of all steps in which the rate rises from 0."""
    warmup_steps: int = _in("training", default=0, ge=0, le=1_000_000_000)
    """The same as a number of steps; overrides `warmup_ratio` where it is above 0."""
    weight_decay: float = _in("training", default=0.0, ge=0, le=10)
    """AdamW's decoupled weight decay on the adapter."""
    adam_beta1: Fraction = _in("training", default=0.9)
    """Decay of AdamW's first moment."""
    adam_beta2: Fraction = _in("training", default=0.999)
    """Decay of AdamW's second moment."""
    adam_epsilon: float = _in("training", default=1e-8, gt=0, le=1)
    """Term added to AdamW's denominator."""
    max_grad_norm: float = _in("training", default=1.0, gt=0, le=1e12)
    """Gradients are scaled down to this norm."""
    bf16: bool = _in("training", default=True)
    """Compute in bfloat16; false: float32."""
    seed: int = _in("training", default=42, ge=0, lt=1 << 32)
    """Seed of adapter initialisation, row order, dropout and the held-out split."""

    # --- evaluation
    eval_strategy: Literal["epoch", "steps", "no"] = _in("evaluation", default="epoch")
    """When the held-out loss is measured during training (it always is at the end)."""
    eval_steps: PositiveInt | None = _in("evaluation", default=None)
    """Steps between two evaluations; setting it means `eval_strategy: steps`."""
    per_device_eval_batch_size: PositiveInt = _in("evaluation", default=8, le=65_536)
    """Rows in one evaluation pass."""
    num_samples: int = _in("evaluation", default=3, ge=0, le=65_536)
    """Held-out prompts answered by base and tuned model for a person to read."""
    max_new_tokens: PositiveInt = _in("evaluation", default=128, le=10_000_000)
    """Longest answer generated for a sample or in chat."""

    # --- run
    memory_budget: float | Text = _in("run", default="auto")
    """Memory that the run may use: a size (24GiB), a share of the card (0.9), or auto, what is free."""
    output_dir: Text | None = _in("run", default=None, min_length=1)
    """The run directory; empty: runs/<config name>-<date>-<time>."""
    logging_steps: PositiveInt = _in("run", default=25)
    """Steps between two printed lines (metrics.jsonl has every step)."""
    save_strategy: Literal["epoch", "steps", "no"] = _in("run", default="epoch")
    """When a checkpoint is saved (the adapter always is at the end)."""
    save_steps: PositiveInt | None = _in("run", default=None)
    """Steps between two checkpoints; setting it means `save_strategy: steps`."""
    save_total_limit: PositiveInt | None = _in("run", default=None)
    """Checkpoints to keep, newest first; empty: all."""
    resume_from_checkpoint: Text | None = _in("run", default=None, min_length=1)
    """A checkpoint folder to continue from (`--resume` finds the newest by itself)."""
    use_cpu: bool = _in("run", default=False)
    """Run on the CPU even where there is a GPU."""

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)
    _name: str = PrivateAttr(default="run")

    @property
    def name(self) -> str:
        """The config file's name without its ending; `run` where the config did not come from a file."""
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
        return RunConfig.validated({**self.model_dump(), **values}, sources, self._name)

    @field_validator("validation_size")
    @classmethod
    def _size(cls, size: float | int) -> float | int:
        if isinstance(size, float) and not 0 <= size < 1:
            raise ValueError("a share from 0 up to but not including 1 (0.05), or a whole number of rows (200)")
        if not 0 <= size <= 1_000_000_000:
            raise ValueError("0 or more")
        return size

    @field_validator("memory_budget")
    @classmethod
    def _budget(cls, budget: float | str) -> float | str:
        is_share = isinstance(budget, float) and 0 < budget < 1
        if not is_share and budget != "auto" and not re.fullmatch(BUDGET_SIZE, str(budget)):
            raise ValueError("auto, a share of the card (0.9), or a size (24GiB)")
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

    @field_validator("column_mapping")
    @classmethod
    def _columns(cls, mapping: dict[str, str]) -> dict[str, str]:
        named = [ours for ours in mapping.values() if ours != "ignore"]
        if not set(mapping.values()) <= set(COLUMNS) or len(set(named)) < len(named) or "" in mapping:
            raise ValueError("each of our names once")
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
                f"bnb_4bit_compute_dtype is {self.bnb_4bit_compute_dtype}; make them agree or remove one"
            )
        if 0 < self.max_steps < self.warmup_steps:
            words = f"max_steps: {self.max_steps} would end before warmup_steps: {self.warmup_steps} are over"
            raise ValueError(f"max_steps and warmup_steps: {words}")
        if self.train_on_last_turn and not self.assistant_only_loss:
            raise ValueError(
                "train_on_last_turn and assistant_only_loss: train_on_last_turn: true learns one turn, but "
                "assistant_only_loss: false learns every token; remove one"
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
        return self

    def _against_matmuls(self) -> str | None:
        """What to change where storage and matmuls contradict each other."""
        if self.matmul_precision == "bf16":
            stored = (
                "an fp8 base is stored to be multiplied in fp8; leave matmul_precision out, or use base_precision: bf16"
            )
            return stored if self.base_precision == "fp8" else None
        if self.base_precision in ("bf16", "fp32"):
            return "weights multiplied in fp8 are stored in fp8 as well: base_precision: fp8"
        if self.base_precision == "nf4" and self.base_residency != "auto":
            return f"fp8 matmuls keep the weights in fp8 alone; remove base_residency: {self.base_residency}"
        return None

    @property
    def multiplies_in_fp8(self) -> bool:
        """Whether the frozen linears are `Fp8Weight`s: 16 bits a weight, whatever precision their values come from."""
        return "fp8" in (self.base_precision, self.matmul_precision)

    @property
    def takes_graphs(self) -> bool:
        """Whether passes whose shapes repeat become CUDA graphs, where there is CUDA."""
        return self.cuda_graphs and self.torch_compile and not self.activation_offload

    # --- parts, for functions that need no more

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
            bf16=self.bf16,
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
            max_steps=self.max_steps,
            num_epochs=self.num_train_epochs,
            seed=self.seed,
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
            sources=self._sources,
        )

    def every(self, what: Literal["eval", "save"], steps_per_epoch: int) -> int | None:
        """Steps between two evaluations or saves; None for never."""
        steps, strategy = getattr(self, f"{what}_steps"), getattr(self, f"{what}_strategy")
        return steps if steps is not None else {"epoch": steps_per_epoch, "no": None}[strategy]
