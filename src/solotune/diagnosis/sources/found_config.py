"""Choose the config of a trainer's folder among the YAML files that lie in it or beside it.

    choice = choose(around, held)
    choice.path, choice.why       output/training_args.yaml, "in the folder"
    choice.offered                configs that may be it, for the user to give with --config

A config inside the folder is the run's, if it is the only one or has the name that a tool gives it. One beside it is
the run's if its `output_dir` has the folder's name or its values are those that the run used, and no value contradicts.
A value that the run left at the library's default is no contradiction: to find it is why configs are compared. Others
are offered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solotune.diagnosis.facts.derived import number
from solotune.diagnosis.facts.library_defaults import is_default
from solotune.diagnosis.sources import hf_settings
from solotune.diagnosis.sources.surroundings import Surroundings
from solotune.errors import InputError

MAX_READ = 20
"""Configs that are read."""
LEAST_KEYS = 3
"""Settings of a training in a file that counts as its config."""
LEAST_EQUAL = 3
"""Values beside the folder that have to be the run's, without an `output_dir` that says so."""
KEYS = frozenset(
    "learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps lora_r "
    "lora_alpha lora_dropout lora_target_modules max_length lr_scheduler_type warmup_steps warmup_ratio "
    "weight_decay optim bf16 fp16 load_in_4bit packing max_grad_norm dataset model_name_or_path "
    "assistant_only_loss finetuning_type adapter adapter_type tuner_type".split()
)
_BEST_KNOWN = ("training_args.yaml", "args.json", "trainer_config.yaml", "axolotl_config.yaml")
_NAMES_OUTPUT = ("output_dir", "output-dir", "out_dir", "save_dir")


@dataclass(frozen=True)
class ConfigChoice:
    """A config file and how it was recognised."""

    path: Path | None = None
    why: str = ""
    offered: tuple[Path, ...] = ()


def choose(around: Surroundings, held: Mapping[str, Any]) -> ConfigChoice:
    """The config of the run.

    Args:
        held: what the run used, from its arguments and its adapter, under solotune's names; empty if unknown.
    """
    inside: list[tuple[bool, int, Path]] = []
    beside: list[tuple[bool, int, Path]] = []
    possible: list[Path] = []
    for path in around.configs[:MAX_READ]:
        written = _read(path)
        ours = hf_settings.translated(written)
        num_keys = len(KEYS & ours.keys())
        if num_keys < LEAST_KEYS:
            continue
        if around.is_inside(path):
            inside.append((path.name in _BEST_KNOWN, num_keys, path))
            continue
        possible.append(path)
        is_output = _output(written) == around.folder.name
        num_equal, num_contrary = _compared(ours, held)
        if not num_contrary and (num_equal >= LEAST_EQUAL or is_output):
            beside.append((is_output, num_equal, path))
    known = [one for one in inside if one[0]] or inside
    if known and (len(known) == 1 or known[0][0]):
        return ConfigChoice(max(known, key=lambda one: one[:2])[2], "it lies in the folder")
    possible = [*(path for _, _, path in inside), *possible]
    beside.sort(key=lambda one: one[:2], reverse=True)
    if beside and (len(beside) == 1 or beside[0][:2] > beside[1][:2]):
        is_output, num_equal, path = beside[0]
        return ConfigChoice(path, "its output_dir is this folder" if is_output else f"{num_equal} values are the run's")
    return ConfigChoice(offered=tuple(possible[:4]))


def _read(path: Path) -> dict[str, Any]:
    try:
        return hf_settings.read(path)[0]
    except InputError:
        return {}


def _output(written: Mapping[str, Any]) -> str:
    """The name of the folder that a config writes to."""
    found = next((written[key] for key in _NAMES_OUTPUT if isinstance(written.get(key), str)), "")
    return found.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _compared(ours: Mapping[str, Any], held: Mapping[str, Any]) -> tuple[int, int]:
    """(values that the run used too, values that contradict what it used)."""
    equal = contrary = 0
    for key in KEYS & ours.keys() & held.keys():
        wrote, used = number(ours[key]), number(held[key])
        if isinstance(ours[key], bool) and isinstance(held[key], bool):
            wrote, used = float(ours[key]), float(held[key])
        if wrote is None or used is None:
            continue
        if wrote == used:
            equal += 1
        elif not is_default(key, held[key]):
            contrary += 1
    return equal, contrary
