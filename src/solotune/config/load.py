"""Load a config: a YAML file, a mapping or a checked config, plus `key=value` overrides.

    load_config("run.yaml", ["learning_rate=1e-4", "lora_target_modules=all-linear"])

Everything is checked here, once: unknown keys are errors with a suggestion, keys of other tools are refused with the
right name, and all mistakes of a file are reported together, each with its line. Later code trusts the values.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from solotune.config.describe import allowed_values, field_help
from solotune.config.foreign_keys import answer, names_of_dataset_info, renamed
from solotune.config.key_aliases import REFUSED_KEYS
from solotune.config.refused_values import faults_of
from solotune.config.run_config import RunConfig
from solotune.config.secrets import HIDDEN, holds_secret, without_secrets
from solotune.config.yaml_reader import override_value, read_mapping
from solotune.errors import InputError

PATHS = ("model_name_or_path", "dataset", "eval_dataset", "chat_template_path")
"""Keys whose values may be relative paths: from the working directory, or else from the config's folder."""
MAX_SHOWN = 400  # characters of a wrong value


def load_config(
    source: str | Path | Mapping[str, Any] | RunConfig,
    overrides: Iterable[str] = (),
    keys: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Read and check a config.

        config = solotune.load_config("run.yaml", ["learning_rate=1e-4"])
        print(config.learning_rate, config.source_of("learning_rate"))  # 0.0001 command line

    Args:
        source: path of a YAML file, a mapping of keys, or a config that is already checked. Relative paths in a file
            count from the working directory; if nothing is there, from the folder of the file.
        overrides: `key=value` strings; each value is read as YAML.
        keys: keys with Python values; they win over `overrides`.

    Raises:
        InputError: lists every mistake, each with its file and line or `command line`.
    """
    if isinstance(source, RunConfig):
        values, sources, name = source.model_dump(exclude_unset=True), dict(source.sources), source.name
    elif isinstance(source, Mapping):
        values, sources, name = dict(source), dict.fromkeys(source, "python"), "run"
    else:
        path = Path(os.path.expanduser(source))
        values, sources = read_mapping(path)
        _find_paths(values, path.parent)
        name = path.stem
    for key, value in override_values(overrides).items():
        values[key], sources[key] = value, "command line"
    for key, value in (keys or {}).items():
        values[key], sources[key] = value, "python"
    _refuse_secrets(values, sources)
    _take_alias(values, sources)
    _fill_in(values, sources)
    try:
        return RunConfig.validated(values, sources, name)
    except ValidationError as error:
        raise _explained(error, values, sources) from None


def override_values(overrides: Iterable[str]) -> dict[str, Any]:
    """The values of `key=value` strings, each read as YAML.

    Raises:
        InputError: not of that form, or not valid YAML.
    """
    values = {}
    for text in overrides:
        key, equals, raw = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise InputError(
                "command line: an override must look like key=value",
                seen=without_secrets(text),
                allowed="learning_rate=1e-4",
            )
        values[key] = override_value(raw, f"command line, {key}")
    return values


def _find_paths(values: dict[str, Any], folder: Path) -> None:
    """Names that do not exist in the working directory, but in the config's folder, become paths of files there."""

    def found(name: Any) -> Any:
        if not isinstance(name, str) or not name or os.path.lexists(os.path.expanduser(name)):
            return name
        return str(folder / name) if os.path.lexists(folder / name) else name

    for key in PATHS:
        value = values.get(key)
        if value is not None:
            values[key] = [found(one) for one in value] if isinstance(value, list) else found(value)
    metrics = values.get("metrics")
    for entry in metrics if isinstance(metrics, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("python"), str):
            file, colon, function = entry["python"].rpartition(":")
            entry["python"] = found(file) + colon + function


def _refuse_secrets(values: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """Raises:
    InputError: a value looks like a token or password, or a key has such a name; the value is not shown.
    """
    for key, value in values.items():
        texts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if holds_secret(key, value, by_name=key not in RunConfig.model_fields):
            raise InputError(
                f"{sources.get(key, 'config')}, {without_secrets(key)}: this looks like a token or password, "
                "and the config is saved with the run",
                seen=HIDDEN,
                change="remove it from the config and the command line, and use an environment variable (HF_TOKEN)",
            )
        if any(isinstance(text, str) and "\0" in text for text in texts):
            raise InputError(f"{sources.get(key, 'config')}, {key}: a NUL character", seen=repr(value)[:80])


def _take_alias(values: dict[str, Any], sources: dict[str, str]) -> None:
    """`load_in_4bit: true` is the one accepted alias: it means `base_precision: nf4`."""
    if "load_in_4bit" not in values:
        return
    alias, where = values.pop("load_in_4bit"), sources.pop("load_in_4bit", "python")
    if alias is not True or values.get("base_precision", "nf4") != "nf4":
        raise InputError(
            f"{where}: load_in_4bit is only an alias for base_precision: nf4",
            seen=f"load_in_4bit: {alias}" + (f", base_precision: {p}" if (p := values.get("base_precision")) else ""),
            allowed="load_in_4bit: true, without base_precision",
            change="use base_precision: nf4, bf16 or fp32",
        )
    values["base_precision"], sources["base_precision"] = "nf4", where


def _fill_in(values: dict[str, Any], sources: dict[str, str]) -> None:
    """Set what one key implies for another, so that a saved config loads again unchanged."""
    for key, cause, implied_value in (
        ("eval_strategy", "eval_steps", "steps"),
        ("save_strategy", "save_steps", "steps"),
        ("validation_size", "eval_dataset", 0),
    ):
        is_stronger = sources.get(cause) == "command line" != sources.get(key)
        if values.get(cause) is not None and (key not in values or is_stronger):
            values[key], sources[key] = implied_value, f"because {cause} is set"


def _explained(error: ValidationError, values: Mapping[str, Any], sources: Mapping[str, str]) -> InputError:
    """All mistakes of a config, one line each; the branches of a union become one line."""
    lines: dict[str, str] = {}
    for detail in error.errors():
        key = str(detail["loc"][0]) if detail["loc"] else ""
        where = f"{sources.get(key, 'config')}, {key}" if key in sources else key
        lines.setdefault(key, f"{where}: {_mistake(key, detail, values)}".removeprefix(": "))
    if "dataset" not in lines and (hint := names_of_dataset_info(values)):
        lines["dataset"] = f"{sources.get('dataset', 'config')}, dataset: {hint}"
    # a mistake between keys begins with their names
    refused = [[key] if key else [part.strip(":,") for part in line.split()] for key, line in lines.items()]
    faults = faults_of(values, refused)
    listed = [line + (f"; this is {found.code} (solotune explain {found.code})" if found else "")
              for line, found in zip(lines.values(), faults, strict=True)]  # fmt: skip
    fault, change = next((found for found in faults if found is not None), (None, None))
    unknown = [str(detail["loc"][0]) for detail in error.errors() if detail["type"] == "extra_forbidden"]
    names = [renamed(key, values[key]) for key in unknown]
    if fault is None and names and len(names) == len(lines) and all(names):
        fault, change = "F02", ", ".join(map(str, names))
    if len(listed) == 1:
        return InputError(listed[0], change=change, fault=fault)
    return InputError(f"the config has {len(listed)} mistakes:\n  " + "\n  ".join(listed), change=change, fault=fault)


def _mistake(key: str, detail: ErrorDetails, values: Mapping[str, Any]) -> str:
    kind = detail["type"]
    if kind == "missing":
        return f"missing; {field_help(key)}"
    if kind == "extra_forbidden":
        if key in REFUSED_KEYS:
            return REFUSED_KEYS[key]
        advice = answer(key, values[key])
        return f"unknown key; {advice}" if advice else "unknown key"
    if not detail["loc"]:
        return detail["msg"].removeprefix("Value error, ")
    try:
        seen = repr(values[key])
    except ValueError:  # Python writes no number of more than 4,300 digits
        seen = "a number of thousands of digits"
    shown = seen if len(seen) <= MAX_SHOWN else f"{seen[:MAX_SHOWN]}... ({len(seen):,} characters)"
    return f"{shown} ({type(values[key]).__name__}) is not allowed; allowed: {allowed_values(key)}"
