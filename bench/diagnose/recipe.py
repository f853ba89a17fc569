"""Everything that one training does, as plain fields: a fault is a function that changes some of them.

    recipe = clean(load("llama-chatml"), seed=0)
    recipe.pads_learned = True                 # what faults_*.py do

The fields describe what is *done*; `settings` and `asked` are what the person who did it wrote down, and only those
(with rows, model and curve) are shown to the diagnosis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from bench.diagnose.bases import Base, Format
from bench.diagnose.worlds import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Row(NamedTuple):
    """A rendered chat before the collator."""

    ids: list[int]
    learned: list[bool]


@dataclass
class Recipe:
    """One training. Hooks are lists, so that two faults can be in one."""

    base: Base
    seed: int
    chats: list[Chat]
    held_out: list[Chat]
    tokenizer: PreTrainedTokenizerFast
    format: Format
    """What renders the rows."""
    deployed: Callable[[str], str]
    """A user's text to the prompt that the deployment makes of it."""
    settings: dict[str, Any]
    asked: dict[str, Any] = field(default_factory=dict)

    mask: Literal["answers", "all", "none", "prompts"] = "answers"
    held_out_mask: Literal["answers", "all"] | None = None
    edit_row: list[Callable[[Row], Row]] = field(default_factory=list)
    max_length: int = 256
    cut: Literal["start", "end"] = "start"
    drops_empty: bool = False
    """Whether rows in which nothing is learned are left out, as TRL does."""

    pad_left: bool = False
    sends_mask: bool = True
    positions: Literal["none", "counted", "real"] = "none"
    masks_pad_id: bool = False
    pads_learned: bool = False
    shift: int = 0
    packing: Literal["", "apart", "plain", "blocks"] = ""
    window: int = 160
    """Tokens of a pack."""

    prepare: list[Callable[[torch.nn.Module], None]] = field(default_factory=list)
    adapters: dict[str, Any] = field(default_factory=dict)
    """peft.LoraConfig's arguments."""
    touch: list[Callable[[torch.nn.Module], None]] = field(default_factory=list)
    """After the adapters are on."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW
    learning_rate: float = 6e-3
    warmup: int = 0
    decay: Literal["linear", "cosine", "constant"] = "linear"
    schedule_steps: int | None = None
    """What the schedule was made for; None: the run."""
    clip: float = 1.0
    weight_decay: float = 0.0
    steps: int = 60
    stop_after: int | None = None
    """A run that was ended early."""
    batch: int = 8
    accumulation: int = 1
    normalise: Literal["tokens", "none", "means"] = "tokens"
    ranks: int = 1
    """Processes of a run on several GPUs; each takes `batch` rows of every step."""
    rank: int = 0
    """The one whose adapter is trained here."""
    exchange: Literal["average", "sum", "none", "half"] = "average"
    """What the ranks do with their gradients; half: of half of the tensors."""
    divides_by: Literal["all", "own", "all and ranks"] = "all"
    """The tokens that a rank divides its loss by, if gradients are averaged then."""
    seed_of_rank: bool = False
    gathers: bool = False
    """Whether the adapters and logs of all ranks are at hand."""
    ranks_after: int | None = None
    """Ranks after the seam."""
    shuffles: bool = True
    copies: int = 1
    """How often each row comes in one epoch."""

    evaluates: int = 3
    evaluates_in_training_mode: bool = False
    loss_of: Callable[[torch.nn.Module, dict[str, torch.Tensor], int], torch.Tensor] | None = None
    """(model, batch, step) to loss, where it is not the model's own."""
    hides_nan: bool = False
    crash: Callable[[Any], Any] | None = None
    """A context manager around each step, given the step, that may raise what a full card raises."""
    warnings: list[str] = field(default_factory=list)
    seam: tuple[int, frozenset[str]] | None = None
    """Step after which it was resumed, and what was lost: optimizer, schedule, order."""

    saves: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None
    saves_at_start: bool = False
    merged: Callable[[torch.nn.Module], torch.nn.Module] | None = None
    """The trained model with adapters to the merged model that is shipped."""
    model_config: dict[str, Any] = field(default_factory=dict)
    generation_config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    has_live: bool = True
    is_static: bool = False
    """Before a run: nothing was trained yet."""

    def set(self, **settings: Any) -> None:
        """Writes keys of the config."""
        self.settings.update(settings)

    @property
    def epoch_steps(self) -> float:
        """Optimizer steps of one epoch as planned."""
        return max(len(self.chats) / (self.batch * self.accumulation * self.ranks), 1e-9)


LINEARS = {
    "Llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "GPT2": ["c_attn", "c_proj", "c_fc"],
    "GPTNeoX": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "OPT": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}


def linears(base: Base) -> list[str]:
    """The linears of a layer by their names."""
    return LINEARS.get(base.kind.family, LINEARS["Llama"])


def clean(base: Base, seed: int, rows: int = 240, held_out: int = 32) -> Recipe:
    """A training in which nothing is wrong."""
    kind, tokenizer = base.kind, base.tokenizer()
    chats, held_out_chats = base.world.split(rows, held_out, seed)
    shape = kind.format
    recipe = Recipe(
        base=base,
        seed=seed,
        chats=chats,
        held_out=held_out_chats,
        tokenizer=tokenizer,
        format=shape,
        deployed=lambda text: shape.text([{"role": "user", "content": text}], begun=True),
        settings={},
        learning_rate=kind.learning_rate,
        steps=kind.steps,
        batch=kind.batch,
        adapters={
            "r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.0,
            "target_modules": linears(base),
            "task_type": "CAUSAL_LM",
        },
    )
    recipe.settings = {
        "model_name_or_path": str(base.folder),
        "base_precision": "fp32",
        "bf16": False,
        "use_cpu": True,
        "lora_r": 8,
        "lora_alpha": 16.0,
        "lora_dropout": 0.0,
        "lora_target_modules": linears(base),
        "dataset": "chats.jsonl",
        "max_length": recipe.max_length,
        "packing": False,
        "assistant_only_loss": True,
        "per_device_train_batch_size": recipe.batch,
        "gradient_accumulation_steps": 1,
        "optim": "adamw_torch",
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "max_steps": recipe.steps,
        "logging_steps": 1,
        "seed": seed,
    }
    if not kind.is_instruct:
        recipe.set(format="custom")
    return recipe
