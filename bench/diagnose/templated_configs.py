"""Configs over templated tasks: each of twelve kinds in several sizes, shapes and splits. Nothing is wrong in them.

Before training, by rules alone: all. Trained: one of each kind on a tiny base that knows chats, and a few with the real
SmolLM2-135M.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.diagnose.configs import TRAINED, ConfigProgram, Files, Keys, as_jsonl
from bench.diagnose.templated import TASKS, Ask, Task, rows


@dataclass(frozen=True)
class Variant:
    """How a task is put into files and keys."""

    name: str
    count: int
    shape: str  # messages, alpaca, prompt, turns
    base: str
    imbalance: float = 0.0
    system: bool = False
    prefix: bool = False
    """The instruction stands before every prompt, in the user's turn."""
    held_out: int = 0
    """Rows of `eval_dataset`; 0: some of the rows are held out."""
    keys: Keys = field(default_factory=dict)


VARIANTS = (
    Variant("50 rows", 50, "messages", "smollm2", system=True),
    Variant("200 rows, alpaca", 200, "alpaca", "llama3", keys={"max_length": 512}),
    Variant("200 rows, eval file", 200, "messages", "qwen3", held_out=40, prefix=True),
    Variant("500 rows, imbalanced", 500, "messages", "smollm2", 0.85, system=True, keys={"validation_size": 0.1}),
    Variant("500 rows, pairs", 500, "prompt", "smollm2", prefix=True, keys={"max_length": 256}),
    Variant("500 rows, packed", 500, "messages", "llama3", prefix=True, keys={"packing": True, "max_length": 1024}),
    Variant("1000 rows, two turns", 1000, "turns", "qwen3", keys={"max_length": 1024}),
    Variant("2000 rows", 2000, "messages", "smollm2", system=True, held_out=200, keys={"num_train_epochs": 1}),
    Variant("2000 rows, learns all", 2000, "alpaca", "qwen3", 0.5, keys={"assistant_only_loss": False}),
)
_TINY = ("llama-chatml", "gpt2-turns", "qwen3-header", "opt-inst", "gemma-turns", "neox-dialog")
"""Of `bases`: those that know chats."""
_TINY_RUN = Variant("trained", 240, "messages", "", held_out=32)
_TINY_KEYS = {**TRAINED, "max_length": 512, "max_steps": 60, "per_device_train_batch_size": 8, "learning_rate": 6e-3,
              "lr_scheduler_type": "linear", "lora_target_modules": "all-linear", "lora_r": 8, "lora_alpha": 16.0,
              "lora_dropout": 0.0, "eval_steps": 20}  # fmt: skip
_REAL_RUNS = ("json_extraction", "sentiment", "text_to_sql", "reports")


def programs(tokenizers: Path) -> list[ConfigProgram]:
    """All of them; those of tokenizers that are not there are left out."""
    found = [
        ConfigProgram(f"{task.name}, {variant.name}", variant.base, "templated", files_of(task, variant), variant.keys,
                      tokenizers)
        for task in TASKS.values()
        for variant in VARIANTS
        if variant.base == "smollm2" or (tokenizers / variant.base).is_dir()
    ]  # fmt: skip
    for place, task in enumerate(TASKS.values()):
        base = _TINY[place % len(_TINY)]
        files = files_of(task, _TINY_RUN)
        found.append(ConfigProgram(task.name, base, "templated", files, _TINY_KEYS, is_before=False))
    for name in _REAL_RUNS:
        files = files_of(TASKS[name], Variant("trained", 400, "messages", "smollm2", system=True))
        found.append(ConfigProgram(name, "smollm2", "templated", files, TRAINED, is_before=False))
    return found


def files_of(task: Task, variant: Variant) -> Files:
    """The variant's rows, and those that are held out."""

    def write(folder: Path) -> Keys:
        asked = rows(task, variant.count + variant.held_out, random.Random(f"{task.name} {variant}"), variant.imbalance)
        shaped = _shaped(task, variant, asked[variant.held_out :])
        keys = {"dataset": as_jsonl(folder / "train.jsonl", shaped)}
        if variant.held_out:
            keys["eval_dataset"] = as_jsonl(folder / "eval.jsonl", _shaped(task, variant, asked[: variant.held_out]))
        return keys

    return write


def _shaped(task: Task, variant: Variant, asked: list[Ask]) -> list[dict[str, Any]]:
    """The rows in the columns of the variant."""
    if variant.prefix:
        asked = [(f"{task.system}\n\n{prompt}", answer) for prompt, answer in asked]
    if variant.shape == "alpaca":
        return [{"instruction": task.system, "input": prompt, "output": answer} for prompt, answer in asked]
    if variant.shape == "prompt":
        return [{"prompt": prompt, "completion": answer} for prompt, answer in asked]
    chats = [_chat([one]) for one in asked]
    if variant.shape == "turns":
        chats = [_chat([one, other]) for one, other in zip(asked[::2], asked[1::2], strict=True)]
    if variant.system:
        chats = [[{"role": "system", "content": task.system}, *chat] for chat in chats]
    return [{"messages": chat} for chat in chats]


def _chat(asked: list[Ask]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for pair in asked for role, text in zip(("user", "assistant"), pair,
            strict=True)]  # fmt: skip
