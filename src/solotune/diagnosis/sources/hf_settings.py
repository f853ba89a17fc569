"""Translate settings of other tools to solotune's keys: config files, training arguments, adapter_config.json.

    written, lines = read("sft.yaml")        flat, as they were written
    translated({"max_seq_length": 256})      {"max_length": 256}

Unknown names are kept. Values with the opposite meaning or another unit are converted (`train_on_inputs: true` is
`assistant_only_loss: false`); values without a counterpart are dropped.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from solotune.config.key_aliases import FOREIGN_KEYS
from solotune.config.run_config import RunConfig
from solotune.config.settings import FOREIGN
from solotune.config.yaml_reader import MAX_CONFIG_BYTES, parse, plain
from solotune.diagnosis.facts.derived import number
from solotune.diagnosis.run_facts import Settings
from solotune.errors import InputError
from solotune.regular_files import read_bytes
from solotune.run.record import parse_json

MAX_DEPTH = 8  # of any YAML; sections that are read are at most three deep
MAX_NESTED = 3
_SECTIONS = ("peft_config", "lora_config", "lora", "training_arguments", "training_args", "training", "trainer", "args",
             "sft", "sft_config", "model", "data", "quantization_config", "bnb_config", "optimizer_args", "config",
             "adapter", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "model_init_kwargs",
             "script_args")  # fmt: skip
"""Sections whose keys are read like top-level settings."""


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(key -> value as written, solotune's key -> file and line) of a YAML or JSON config of another tool.

    Raises:
        InputError: the file is missing, not YAML or JSON, or not a mapping.
    """
    file = Path(os.path.expanduser(path))
    try:
        content = read_bytes(file, MAX_CONFIG_BYTES)
    except OSError as error:
        allowed = "a YAML or JSON file of at most 256 KiB"
        raise InputError(f"{file}: this config cannot be read", seen=error.strerror, allowed=allowed) from None
    found: Any = None
    try:
        found = parse_json(content)
    except ValueError:
        found = parse(content.decode("utf-8-sig", "replace"), str(file), MAX_DEPTH)
    if not isinstance(found, Mapping):
        raise InputError(f"{file}: a config is lines of `key: value`", seen=type(found).__name__)
    return flat(found, file.name)


def flat(found: Mapping[Any, Any], name: str = "") -> tuple[dict[str, Any], dict[str, str]]:
    """Settings in their sections as `read` gives them; `name` is that of the file."""
    lines: dict[str, str] = {}
    written: dict[str, Any] = {}
    _flatten(found, written, lines, name, 0)
    return written, lines


def _flatten(found: Mapping[Any, Any], written: dict[str, Any], lines: dict[str, str], name: str, depth: int) -> None:
    for key, value in found.items():
        if isinstance(value, Mapping) and str(key) in _SECTIONS and depth < MAX_NESTED:
            _flatten(value, written, lines, name, depth + 1)
            if str(key) == "quantization_config":
                written.setdefault("quantization_config", plain(value))
            continue
        short = re.sub(r"^(train|top)\.", "", str(key))  # llamaboard_config.yaml has `train.learning_rate`
        written[short] = plain(value)
        place = getattr(getattr(found, "lc", None), "key", None)
        with contextlib.suppress(KeyError, TypeError):
            line = f"{name} line {place(key)[0] + 1}" if place else name
            lines.update(dict.fromkeys(translated({short: written[short]}), line))


def _inverted(value: Any) -> Any:
    return not value if isinstance(value, bool) else None


def _as_is(value: Any) -> Any:
    return value


def _dtype(value: Any) -> Any:
    word = str(value).rpartition(".")[2]
    return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16"}.get(word, word)


def _names(value: Any) -> Any:
    if isinstance(value, str) and value in ("all", "all-linear"):
        return "all-linear"
    return [name.strip() for name in value.split(",")] if isinstance(value, str) and "," in value else value


_TURNED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "train_on_inputs": ("assistant_only_loss", _inverted),
    "train_on_prompt": ("assistant_only_loss", _inverted),
    "train_on_responses_only": ("assistant_only_loss", _as_is),
    "completion_only_loss": ("assistant_only_loss", _as_is),
    "torch_dtype": ("model_dtype", _dtype),
    "dtype": ("model_dtype", _dtype),
    "bnb_4bit_compute_dtype": ("bnb_4bit_compute_dtype", _dtype),
    "load_in_8bit": ("load_in_8bit", _as_is),
    "load_in_4bit": ("load_in_4bit", _as_is),
    "quantization_bit": ("load_in_4bit", lambda bits: bits == 4),
    "quant_bits": ("load_in_4bit", lambda bits: bits == 4),
    "lora_target": ("lora_target_modules", _names),
    "target_modules": ("lora_target_modules", _names),
    "lora_target_modules": ("lora_target_modules", _names),
    "lora_target_linear": ("lora_target_modules", lambda all_linear: "all-linear" if all_linear is True else None),
    "lora_modules_to_save": ("modules_to_save", _as_is),
    "activation_checkpointing": ("gradient_checkpointing", _as_is),
    "gradient_checkpointing_kwargs": ("use_reentrant", lambda words: _of_dict(words, "use_reentrant")),
    "activation_checkpointing_kwargs": ("use_reentrant", lambda words: _of_dict(words, "use_reentrant")),
    "truncation_mode": ("truncation_side", lambda mode: {"keep_end": "left", "keep_start": "right"}.get(str(mode))),
    "shuffle_dataset": ("shuffle_dataset", _as_is),
    "chat_template": ("chat_template", _as_is),
    "datasets": ("dataset", lambda listed: _dataset_of(listed)),
    "test_datasets": ("eval_dataset", lambda listed: _dataset_of(listed)),
    "val_dataset": ("eval_dataset", lambda listed: listed or None),
    "quantization": ("quantization", _as_is),
}


def _of_dict(words: Any, key: str) -> Any:
    return words.get(key) if isinstance(words, Mapping) else None


def _dataset_of(listed: Any) -> Any:
    """axolotl's `datasets: [{path: ..., type: ...}]`, or with `path: json` the name in `data_files`."""
    if isinstance(listed, list) and listed:
        paths = [_path_of(one) if isinstance(one, Mapping) else one for one in listed]
        return paths if len(paths) > 1 else paths[0]
    return listed


def _path_of(one: Mapping[str, Any]) -> Any:
    files = one.get("data_files")
    return files if isinstance(files, str) else one.get("path")


def translated(found: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under solotune's names; unknown names are kept, None and `auto` are dropped."""
    held: dict[str, Any] = {}
    for key, value in found.items():
        name, turn = _TURNED.get(key, (FOREIGN_KEYS.get(key, key), _as_is))
        value = turn(value)
        if value is None or value == "auto":
            continue
        if key == name or name not in found:
            held[name] = _number_where_meant(name, value)
    return held


_NUMBERS = {
    "learning_rate", "lora_alpha", "lora_r", "lora_dropout", "weight_decay", "max_grad_norm", "adam_epsilon",
    "warmup_ratio", "warmup_steps", "num_train_epochs", "max_steps", "max_length", "per_device_train_batch_size",
    "gradient_accumulation_steps",
}  # fmt: skip


def _number_where_meant(name: str, value: Any) -> Any:
    """Numbers of number settings: `2e-4` is a string in YAML 1.1."""
    if name not in _NUMBERS or (found := number(value)) is None:
        return value
    return int(found) if found.is_integer() and not isinstance(value, float) else found


def of_adapter(config: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json under solotune's names, without `inference_mode`, which PEFT always saves as true."""
    names = {
        "r": "lora_r",
        "lora_alpha": "lora_alpha",
        "lora_dropout": "lora_dropout",
        "target_modules": "lora_target_modules",
        "use_rslora": "use_rslora",
        "init_lora_weights": "init_lora_weights",
        "modules_to_save": "modules_to_save",
        "trainable_token_indices": "trainable_token_indices",
    }
    return {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}


def as_run_config(settings: Settings, base: str, dataset: Any) -> RunConfig:
    """A RunConfig to read the rows and load the base; values that it does not allow get their default."""
    get = settings.get
    wanted: dict[str, Any] = {
        "on_bad_row": "drop",
        "base_precision": "nf4" if get("load_in_4bit") is True else "fp32" if get("bf16") is not True else "bf16",
        "bf16": get("bf16") is True,
        "packing": False,
        "optim": "adamw_torch",
        "torch_compile": False,
        "validation_size": 0,
        "assistant_only_loss": get("assistant_only_loss") is not False,
    }
    same = ("max_length", "lora_r", "lora_alpha", "use_rslora", "lora_target_modules", "learning_rate", "weight_decay",
            "max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "eval_dataset",
            "dataset_split", "dataset_config", "model_revision", "max_steps", "num_train_epochs")  # fmt: skip
    config = RunConfig.model_validate({"model_name_or_path": base, "dataset": dataset, "lora_dropout": 0.0, **wanted})
    for key in same:
        value = get(key)
        if value is not None:
            with contextlib.suppress(ValueError, OverflowError):  # a value that RunConfig does not allow
                value = float(value) if isinstance(value, int) and key in ("lora_alpha", "learning_rate") else value
                config = config.replaced(FOREIGN, **{key: value})
    return config
