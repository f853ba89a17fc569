"""`RunFacts`: the input of a diagnosis, everything known about a run of any trainer.

It is made from a config before a run (`solotune_run.of_config`), from a run directory (`solotune_run.from_run`), from
an output folder of Hugging Face's Trainer (`hf_trainer.from_folder`), or by the caller from the objects of a training
loop. Every part may be missing. A rule names the parts that it needs; if one is missing, the diagnosis lists its fault
as open.

The code that made the parts is not trusted: batches are read as the model gets them.

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
    """Settings of a run under solotune's names; None if unknown. Names of other tools are translated (`hf_settings`).

    Settings that `RunConfig` does not have use the name of their library: `optim` and `lr_scheduler_type` of any kind,
    `fp16`, `model_dtype` and `adapter_dtype` (float32, bfloat16, float16), `load_in_8bit`, `bnb_4bit_compute_dtype`,
    `llm_int8_skip_modules`, `init_lora_weights`, `modules_to_save`, `trainable_token_indices`, `inference_mode`,
    `use_reentrant`, `logging_nan_inf_filter`, `ignore_data_skip`, `neftune_noise_alpha`, `dataloader_num_workers`,
    `shuffle` (whether the sampler shuffles), `truncation_side` (right keeps the start), `add_generation_prompt` (as
    deployed), `chat_template` (as trained), `serving_template` and `serving_stop_ids` (as deployed), `serving_alpha`
    and `serving_r`, `merged_into` (dtype or quantisation of the base that was merged into), `memory_bytes` (of the
    card), `world_size` (ranks of a run on several GPUs), `average_tokens_across_devices`.
    """

    values: Mapping[str, Any]
    asked: Mapping[str, Any] = field(default_factory=dict)  # what the user wrote, where it differs
    sources: Mapping[str, str] = field(default_factory=dict)  # key -> file and line, for the fix

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)


@dataclass(frozen=True)
class Trace:
    """The log of a run: one entry for each of S logged steps, NaN if a value is missing."""

    step_S: np.ndarray  # int64
    loss_S: np.ndarray
    learning_rate_S: np.ndarray
    grad_norm_S: np.ndarray
    epoch_S: np.ndarray
    eval_step_E: np.ndarray  # E evaluations
    eval_loss_E: np.ndarray
    total_steps: int | None  # planned
    is_finished: bool
    errors: tuple[str, ...] = ()  # exceptions and warnings in its logs
    seams: tuple[int, ...] = ()  # steps after which it was resumed


@dataclass(frozen=True)
class Saved:
    """The saved files of a run: tensors by their names in the file, and the configs with them."""

    adapter: Tensors
    adapter_config: Mapping[str, Any]
    optimizer_present: bool | None = None
    scheduler_present: bool | None = None
    merged: Callable[[], torch.nn.Module] | None = None
    in_checkpoint: Tensors | None = None
    """The adapter in a checkpoint of the same run, if this one changes nothing (B = 0)."""


@dataclass(frozen=True)
class LiveModel:
    """A model that can run on this machine, with the batches of its training.

    `model` takes transformers' arguments (input_ids, attention_mask, position_ids, labels, use_cache) and has its
    adapters enabled; probes restore it. `batches` are dicts of tensors exactly as the collator of the training made
    them, with labels (-100 for tokens without one).
    """

    model: torch.nn.Module
    batches: Sequence[Mapping[str, torch.Tensor]]
    make_optimizer: Callable[[Sequence[torch.nn.Parameter]], torch.optim.Optimizer] | None = None
    loss_of: Callable[[torch.nn.Module, Mapping[str, torch.Tensor]], torch.Tensor] | None = None  # else the model's own
    evaluate: Callable[[torch.nn.Module], float] | None = None  # the evaluation of the training, in its own mode
    generate: Callable[[str], str] | None = None  # the answer to a user's text, as deployed
    backward: Callable[[torch.nn.Module, Sequence[Mapping[str, torch.Tensor]]], Any] | None = None
    """Compute the gradients of one optimizer step from these micro-batches, accumulated as in the training."""
    backward_of_ranks: Callable[[torch.nn.Module, Sequence[Sequence[Mapping[str, torch.Tensor]]]], Any] | None = None
    """Of a training on several GPUs: compute the gradients with which rank 0 takes one optimizer step, from the
    micro-batches of each rank, exchanged as in the training."""
    is_rebuilt: bool = False
    """Made by solotune from the files of another trainer: what that one froze or cut off does not show."""


@dataclass(frozen=True)
class RankCheckpoint:
    """How many ranks a run had when it saved a checkpoint; None if a part is not known."""

    step: int
    world_size: int | None = None
    batch: int | None = None  # rows of an optimizer step, over all ranks
    epoch: float | None = None  # as counted at `step`


@dataclass(frozen=True)
class Ranks:
    """What is known of the ranks (processes) of a run on several GPUs."""

    adapters: Mapping[int, Tensors] = field(default_factory=dict)  # rank -> its trained tensors, all at one moment
    logs: Mapping[int, Sequence[Mapping[str, Any]]] = field(default_factory=dict)  # rank -> what it logged, by `step`
    checkpoints: Sequence[RankCheckpoint] = ()  # of one run, by step

    @property
    def world_size(self) -> int:
        """The largest number of ranks that is seen; 1 if none is."""
        counts = [one.world_size or 1 for one in self.checkpoints]
        return max([1, len(self.adapters), len(self.logs), *counts])


@dataclass(frozen=True, eq=False)
class RunFacts:
    """Everything known about one run. Compared by identity, since it is large and used as a cache key."""

    name: str
    settings: Settings
    tokenizer: PreTrainedTokenizerBase | None = None
    model_config: Mapping[str, Any] = field(default_factory=dict)  # config.json of the base
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    train: Sequence[Example] = ()
    validation: Sequence[Example] = ()
    conversations: Sequence[Sequence[Mapping[str, Any]]] = ()  # the same rows before rendering, if known
    texts: Sequence[str] = ()  # some rows of plain text as the data has them, if another trainer tokenized them
    findings: Sequence[Finding] | None = None  # what `data_checks` found; (): nothing; None: it did not run
    refusals: Sequence[Signal] = ()  # errors of solotune that stop this config, as signals
    trace: Trace | None = None
    saved: Saved | None = None
    ranks: Ranks | None = None  # None: nothing says that there were several
    base_template: str = ""  # the base's chat template, if the run uses another one
    base_tokenizer: PreTrainedTokenizerBase | None = None  # as it lies with the base, if it is another than `tokenizer`
    live: Callable[[], LiveModel] | None = None  # loads the model; called once
    batches: Sequence[Mapping[str, torch.Tensor]] = ()  # as `LiveModel.batches`, if known without the model
    environment: Mapping[str, Any] = field(default_factory=dict)  # versions, GPU
    missing: Mapping[str, str] = field(default_factory=dict)  # part -> why it is missing
    not_given: Mapping[str, str] = field(default_factory=dict)  # part that is missing without damage -> what to give
    found: Mapping[str, str] = field(default_factory=dict)  # of a folder of another trainer: part -> where it was found
