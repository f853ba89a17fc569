"""What is diagnosed: whatever is known of a training, by whomever it was run.

A `RunFacts` is filled from a config before a run (`of_config`), from a run directory of ours (`from_run`), from a
folder that Hugging Face's Trainer wrote (`foreign`), or by the caller, who hands over the very objects of a training
loop. Every part may be missing; a rule asks only for what it needs, and a rule that cannot ask is listed as such in the
diagnosis, since it leaves something open.

Nothing here trusts the code that made the parts: batches are looked at as the model gets them.

Shape legend: B sequences, T tokens, S optimizer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedTokenizerBase

    from solotune.dataset.example import Example
    from solotune.diagnosis.evidence import Signal
    from solotune.diagnosis.findings import Finding

    Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """What a training was told, under our names; None where nobody knows. Foreign names are translated (`foreign`).

    Names that `RunConfig` lacks are those of the library that has them: `optim` and `lr_scheduler_type` of any kind,
    `fp16`, `model_dtype` and `adapter_dtype` (float32, bfloat16, float16), `load_in_8bit`, `bnb_4bit_compute_dtype`,
    `llm_int8_skip_modules`, `init_lora_weights`, `modules_to_save`, `trainable_token_indices`, `inference_mode`,
    `use_reentrant`, `logging_nan_inf_filter`, `ignore_data_skip`, `neftune_noise_alpha`, `dataloader_num_workers`,
    `shuffle` (whether the sampler shuffles), `truncation_side` (right keeps the start), `add_generation_prompt` (as
    deployed), `chat_template` (as trained), `serving_template` and `serving_stop_ids` (as deployed), `serving_alpha`
    and `serving_r`, `merged_into` (dtype or quantisation of the base that was merged into), `memory_bytes` (of the
    card).
    """

    values: Mapping[str, Any]
    asked: Mapping[str, Any] = field(default_factory=dict)  # what the user wrote, where that differs from what held
    sources: Mapping[str, str] = field(default_factory=dict)  # key -> file and line, for the fix

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)


@dataclass(frozen=True)
class Trace:
    """What a training recorded, one place a logged step; NaN where a value is not there. S logged steps."""

    step_S: np.ndarray  # int64
    loss_S: np.ndarray
    learning_rate_S: np.ndarray
    grad_norm_S: np.ndarray
    epoch_S: np.ndarray
    eval_step_E: np.ndarray  # E evaluations
    eval_loss_E: np.ndarray
    total_steps: int | None  # planned
    is_finished: bool
    errors: tuple[str, ...] = ()  # exceptions and warnings that stand in its logs
    seams: tuple[int, ...] = ()  # steps after which it was resumed


@dataclass(frozen=True)
class Saved:
    """What lies on disk after a training: tensors by their names in the file, and the configs beside them."""

    adapter: Tensors
    adapter_config: Mapping[str, Any]
    optimizer_present: bool | None = None
    scheduler_present: bool | None = None
    merged: Callable[[], torch.nn.Module] | None = None
    in_checkpoint: Tensors | None = None
    """The adapter that a checkpoint of the same training holds, where this one changes nothing."""


@dataclass(frozen=True)
class LiveModel:
    """A model that can be run on this machine, with the batches that its training saw.

    `model` takes transformers' arguments (input_ids, attention_mask, position_ids, labels, use_cache) and has its
    adapters on it; probes put it back as it was. `batches` are dicts of tensors exactly as the training's collator
    made them, labels included (-100 for what is not learned).
    """

    model: torch.nn.Module
    batches: Sequence[Mapping[str, torch.Tensor]]
    make_optimizer: Callable[[Sequence[torch.nn.Parameter]], torch.optim.Optimizer] | None = None
    loss_of: Callable[[torch.nn.Module, Mapping[str, torch.Tensor]], torch.Tensor] | None = None  # else the model's own
    evaluate: Callable[[torch.nn.Module], float] | None = None  # the training's evaluation, in whatever mode it runs
    generate: Callable[[str], str] | None = None  # the deployment's way from a user's text to an answer
    backward: Callable[[torch.nn.Module, Sequence[Mapping[str, torch.Tensor]]], Any] | None = None
    """The gradients of one optimizer step from these micro-batches, accumulated as the training does it."""


@dataclass(frozen=True, eq=False)
class RunFacts:
    """Everything known of one training; equal to itself alone, since what it holds is large and is cached by it."""

    name: str
    settings: Settings
    tokenizer: PreTrainedTokenizerBase | None = None
    model_config: Mapping[str, Any] = field(default_factory=dict)  # config.json of the base
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    train: Sequence[Example] = ()
    validation: Sequence[Example] = ()
    conversations: Sequence[Sequence[Mapping[str, Any]]] = ()  # the same rows before rendering, where they are known
    findings: Sequence[Finding] | None = None  # what `data_checks` found; (): nothing; None: it did not run
    refusals: Sequence[Signal] = ()  # what the doors of ours said that do not let it in
    trace: Trace | None = None
    saved: Saved | None = None
    base_template: str = ""  # the chat template that came with the base, where it was trained with another one
    live: Callable[[], LiveModel] | None = None  # loads it; probes call it once
    batches: Sequence[Mapping[str, torch.Tensor]] = ()  # as `LiveModel.batches`, where no model is needed to make them
    environment: Mapping[str, Any] = field(default_factory=dict)  # versions, card
    missing: Mapping[str, str] = field(default_factory=dict)  # part -> why it is not there
