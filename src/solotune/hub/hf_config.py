"""Read and check config.json of a model folder before transformers acts on it.

Why
---
A config.json is more than numbers. `auto_map` names Python files of the folder; `attn_implementation: owner/kernel`
makes transformers download and import native code; in 2026 a config could switch `trust_remote_code` on
(CVE-2026-5241, CVE-2026-4372), and a line break in `model_type` was executed by another trainer (CVE-2026-93348).

Rules
-----
    keys that can lead to code          refused at any depth, whatever their value does today
    keys of transformers' internals     (`_name_or_path`, `_attn_implementation_internal`) not passed on
    keys that name a method or table    refused (a method, `attribute_map`); the class's declared fields are free, and
    of the class                        transformers checks their types, because its config classes are strict
    text with a slash in unknown keys   not passed on: no model reads a number from it, loaders read repository names
    sizes                               limited, before the architecture is built

transformers then gets the checked object, not the file, so that what was checked is what is used.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from solotune.errors import InputError
from solotune.hub.safe_files import check_links, check_regular, json_object

MAX_LAYERS = 2_000
MAX_SIZE = 1 << 25  # of all other whole numbers: vocabularies have up to 2^18, the longest context 10^7
LAYERS = re.compile(r"layers?$|^depth$")
MAX_CONFIG_BYTES = 1 << 20
CODE = re.compile(
    r"auto_map|auto_class|trust_remote_code|code_revision|\w*_implementation(_internal)?|\w*kernels?(_\w+)?"
    r"|_target_|custom_\w+|__\w+",
    re.IGNORECASE,
)
IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
DTYPES = ("float32", "float16", "bfloat16", "float64")


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check config.json of a model folder; the content is returned unchanged.

    Raises:
        InputError: it is missing, can lead to code, is unknown to transformers, has impossible sizes, or belongs to a
            checkpoint that is already quantised.
    """
    path = folder / "config.json"
    if not path.exists():
        raise InputError(
            f"{folder}: no config.json, so this is not a model folder", allowed="a Hugging Face model folder"
        )
    check_regular(folder, path)
    check_links(folder)
    raw = json_object(path, MAX_CONFIG_BYTES)
    refuse_code(path, raw)
    _refuse_quantised(path, raw)
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in CONFIG_MAPPING:
        raise InputError(
            f"{path}: transformers cannot read this config",
            seen=f"model_type: {name!r}"[:200],
            allowed="an architecture of the installed transformers; code from a model folder never runs",
        )
    _refuse_sizes(path, raw)
    return raw


def architecture_of(folder: Path, raw: dict[str, Any]) -> PreTrainedConfig:
    """Turn the result of `read_config` into transformers' config of this architecture.

    Raises:
        InputError: a key that would replace a method or table of the class, or values that the class refuses.
    """
    path, name = folder / "config.json", raw["model_type"]
    if name == "mistral" and "layer_types" in raw:  # like transformers' own AutoConfig
        name = "ministral"
    kind: Any = CONFIG_MAPPING[name]
    passed_on = {key: copy.deepcopy(value) for key, value in raw.items() if _is_passed_on(path, kind, key, value)}
    try:
        return kind.from_dict(passed_on)
    # a strict class, its validators and their arithmetic can raise any class
    except Exception as error:
        raise InputError(f"{path}: transformers cannot read this config", seen=_reason(error)) from None


def _reason(error: Exception) -> str:
    """A library's message in one line; with strict classes, its second line names the key."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or type(error).__name__


def refuse_code(path: Path, value: Any, above: str = "") -> None:
    """Check keys at any depth.

    Raises:
        InputError: a key that can lead to code.
    """
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        name = f"{above}{key}"
        if isinstance(key, str) and CODE.fullmatch(key) and not _is_harmless(key, item):
            raise InputError(
                f"{path}: {name} can make a loader run code from the model folder or from elsewhere",
                seen=f"{name}: {item!r}"[:200],
                allowed="architectures of the installed transformers",
                change=f"remove {name} if the model has such an architecture; otherwise use another model",
            )
        refuse_code(path, item, f"{name}.")


def _is_harmless(key: str, value: Any) -> bool:
    """Whether the value makes a code key harmless: off, a size, or an attention implementation of transformers."""
    if value is None or (value is False and key != "auto_map"):
        return True
    if "implementation" in key:
        return isinstance(value, str) and value in IMPLEMENTATIONS
    if isinstance(value, list):
        return all(_is_harmless(key, item) for item in value)
    is_size = type(value) in (int, float) and not key.startswith("use_")
    return "kernel" in key and is_size  # of a convolution


def _refuse_quantised(path: Path, raw: dict[str, Any]) -> None:
    text = raw.get("text_config")
    for owner in (raw, text if isinstance(text, dict) else {}):
        found = owner.get("quantization_config") or owner.get("compression_config")
        if found is not None:
            method = found.get("quant_method", "unknown method") if isinstance(found, dict) else found
            raise InputError(
                f"{path}: the checkpoint is already quantised",
                seen=f"quantization_config: {method}"[:200],
                allowed="16- or 32-bit weights, which solotune quantises itself",
                change="use the original model, which is not quantised",
            )


def _refuse_sizes(path: Path, raw: dict[str, Any], above: str = "") -> None:
    """Check sizes and dtypes.

    Raises:
        InputError: a whole number that no model has, or a dtype that is not a float type.
    """
    for key, value in raw.items():
        name = f"{above}{key}"
        if isinstance(value, dict):
            _refuse_sizes(path, value, f"{name}.")
        limit = MAX_LAYERS if LAYERS.search(key) else MAX_SIZE
        if type(value) is int and abs(value) > limit and "theta" not in key:
            allowed = f"at most {limit:,}"
            raise InputError(f"{path}: {name} is too large", seen=str(value)[:60], allowed=allowed)
        if key in ("torch_dtype", "dtype") and value is not None and value not in DTYPES:
            seen = repr(value)[:60]
            raise InputError(f"{path}: {name} is not a floating-point type", seen=seen, allowed=", ".join(DTYPES))


def _is_passed_on(path: Path, kind: Any, key: str, value: Any) -> bool:
    """Whether a key is passed on to transformers.

    Raises:
        InputError: the key would replace a method or table of the architecture's config class.
    """
    fields = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    if key in fields or key in ("model_type", "rope_scaling"):
        return True
    if key.startswith("_") or CODE.fullmatch(key):
        return False
    if hasattr(kind, key) and (callable(getattr(kind, key)) or isinstance(getattr(kind, key), (dict, tuple, set))):
        raise InputError(
            f"{path}: {key} is not a setting of this architecture",
            seen=f"{key}: {value!r}"[:200],
            change=f"remove {key}",
        )
    return not (isinstance(value, str) and "/" in value)
