"""Registers the programs of this set, and applies a change to a recipe or a job with the same functions."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bench.diagnose.ours import Job
from bench.diagnose.recipe import Row
from bench.diagnose.unseen.registry import KINDS_OF_PROGRAM, Unseen
from bench.diagnose.worlds import Chat

PROGRAMS: list[Unseen] = []
SHORT = {"qwen": "qwen2-chatml", "gemma": "gemma2-model", "exaone": "exaone4-bars", "star": "starcoder2-hash",
         "falcon": "falcon-plain"}  # fmt: skip


def program(*codes: str, on: str) -> Callable[[Callable[[Any, random.Random], None]], Any]:
    """`on`: "base/task/kind", one or more, with spaces between."""

    def registered(change: Callable[[Any, random.Random], None]) -> Any:
        for place in on.split():
            base, task, kind = place.split("/")
            assert kind in KINDS_OF_PROGRAM, kind
            why = " ".join((change.__doc__ or "").split())
            PROGRAMS.append(Unseen(codes, change.__name__, why, kind, SHORT[base], task, change, "unseen2"))
        return change

    return registered


_FIELDS = {
    "max_grad_norm": "clip", "warmup_steps": "warmup", "lr_scheduler_type": "decay", "max_steps": "steps",
    "per_device_train_batch_size": "batch", "gradient_accumulation_steps": "accumulation",
}  # fmt: skip
_ADAPTER = {"lora_r": "r", "lora_target_modules": "target_modules"}
_OF_ADAPTER = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "init_lora_weights")


def tell(made: Any, **config: Any) -> None:
    """Sets keys of a config, and does what they say."""
    if isinstance(made, Job):
        made.config.update(config)
        return
    for key, value in config.items():
        if key in _OF_ADAPTER:
            made.adapters[_ADAPTER.get(key, key)] = value
        elif key == "assistant_only_loss":
            made.mask = "answers" if value else "all"
        elif hasattr(made, _FIELDS.get(key, key)):
            setattr(made, _FIELDS.get(key, key), value)
    made.set(**config)


def chats_of(made: Any) -> list[Chat]:
    """The rows that are trained on; each may be changed in place."""
    return [row["messages"] for row in made.train] if isinstance(made, Job) else made.chats


def all_chats(made: Any) -> list[Chat]:
    """Those and the held-out ones."""
    return made.messages() if isinstance(made, Job) else [*made.chats, *made.held_out]


def put(made: Any, train: list[Chat], held_out: list[Chat] | None = None) -> None:
    """Other rows; None keeps those held out."""
    if isinstance(made, Job):
        made.train = [{"messages": chat} for chat in train]
        made.held_out = made.held_out if held_out is None else [{"messages": chat} for chat in held_out]
    else:
        made.chats = train
        made.held_out = made.held_out if held_out is None else held_out


def held_of(made: Any) -> list[Chat]:
    return [row["messages"] for row in made.held_out] if isinstance(made, Job) else made.held_out


def reformat(made: Any, **changes: Any) -> None:
    """Another template, in the rows and where the template is kept."""
    made.format = replace(made.format, **changes)
    retemplate(made)


def retemplate(made: Any) -> None:
    if isinstance(made, Job):
        made.retemplate()
    else:
        shape = made.format
        made.tokenizer.chat_template = shape.jinja()
        made.deployed = lambda text: shape.text([{"role": "user", "content": text}], begun=True)


def rows_as(made: Any, row_of: Callable[[Chat], dict[str, Any]]) -> None:
    """Rows of another form in the files; what is trained on stays."""
    if isinstance(made, Job):
        made.train = [row_of(row["messages"]) for row in made.train]
        made.held_out = [row_of(row["messages"]) for row in made.held_out]
    else:
        made.row_of = row_of


def runs(row: Row) -> list[tuple[int, int]]:
    """Where learned spans begin and end."""
    found, begin = [], None
    for at, learned in enumerate([*row.learned, False]):
        if learned and begin is None:
            begin = at
        elif not learned and begin is not None:
            found.append((begin, at))
            begin = None
    return found


def lengths(made: Any) -> list[int]:
    """Tokens of the training rows, sorted."""
    texts = [made.format.text(chat) for chat in chats_of(made)]
    return sorted(len(made.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
