"""Translate a config of another tool: Axolotl, LLaMA-Factory, TRL, Unsloth, transformers, PEFT, ms-swift.

    values, left_out = translated(Path("axolotl.yaml"))

Keys become ours by the same tables that answer a foreign key in a config (`foreign_keys`, `key_aliases`). A key without
a counterpart is left out, with the reason; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from solotune.config.describe import allowed_values
from solotune.config.foreign_keys import CONVERTED, answer, is_allowed, names_of_dataset_info
from solotune.config.key_aliases import FOREIGN_KEYS
from solotune.config.run_config import RunConfig
from solotune.config.yaml_reader import read_mapping


def translated(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Our keys with their values; and, for each key of the file without a counterpart, the reason.

    Raises:
        InputError: no such file, or not YAML.
    """
    read, _ = read_mapping(path)
    values, left_out = {}, {}
    if names := names_of_dataset_info(read):
        left_out["dataset"] = names
    for key, value in _flat(read):
        if value is None or key in left_out:
            continue
        found, reason = _of(key, value)
        left_out |= {key: reason} if reason else {}
        values |= {ours: wanted for ours, wanted in found.items() if ours not in values}
    return values, left_out


def _of(key: str, value: Any) -> tuple[dict[str, Any], str]:
    """Our keys for one of theirs, and why there is none."""
    ours = key if key in RunConfig.model_fields else FOREIGN_KEYS.get(key)
    if key in CONVERTED:
        written = CONVERTED[key](value)
        return (written, "") if isinstance(written, dict) else ({}, written or "")
    if ours is None:
        return {}, answer(key, value).removeprefix("remove the line: ") or "no setting of solotune"
    if ours in ("eval_strategy", "save_strategy") and value == "steps":
        return {}, ""  # `eval_steps` and `save_steps` say so
    if is_allowed(ours, value):
        return {ours: value}, ""
    return {}, f"{ours} takes {allowed_values(ours)}, not {str(value)[:60]!r}"


def _flat(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Keys with their values; those of sections (torchtune, H2O) without the section."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        is_section = isinstance(value, Mapping) and key not in RunConfig.model_fields
        found += _flat(value) if is_section else [(str(key), value)]
    return found
