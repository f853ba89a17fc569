"""Read and check config.json of a model folder before transformers acts on it.

Why
---
A config.json is more than numbers. `auto_map` names Python files of the folder; `attn_implementation: owner/kernel`
makes transformers download and import native code; in 2026 a config could switch `trust_remote_code` on
(CVE-2026-5241, CVE-2026-4372), and a line break in `model_type` was executed by another trainer (CVE-2026-93348).

Rules
-----
    keys that can lead to code          refused at any depth, whatever their value does today
    `auto_map`                          not used, nor passed on, if transformers has the architecture; refused otherwise
    keys of transformers' internals     (`_name_or_path`, `_attn_implementation_internal`) not passed on
    keys that name a method or table    refused (a method, `attribute_map`); the class's declared fields are free, and
    of the class                        transformers checks their types, because its config classes are strict
    text with a slash in unknown keys   not passed on: no model reads a number from it, loaders read repository names
    sizes                               limited, before the architecture is built

transformers then gets the checked object, not the file, so that what was checked is what is used.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from solotune.errors import InputError
from solotune.hub.quantised import QUANTISATION, refuse_quantised
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
        is_adapter = (folder / "adapter_config.json").exists()
        raise InputError(
            f"{folder}: no config.json, so this is not a model folder",
            seen="adapter_config.json: an adapter" if is_adapter else None,
            allowed="a Hugging Face model folder",
            change="use its base model: base_model_name_or_path in adapter_config.json" if is_adapter else None,
        )
    check_regular(folder, path)
    check_links(folder)
    raw = json_object(path, MAX_CONFIG_BYTES)
    refuse_code(path, raw)
    refuse_quantised(folder, raw)
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in CONFIG_MAPPING:
        raise InputError(
            f"{path}: transformers cannot read this config",
            seen=f"model_type: {name!r}"[:200],
            allowed="an architecture of the installed transformers; code from a model folder never runs",
        )
    _refuse_sizes(path, raw)
    if (named := raw.get("transformers_weights")) not in (None, "model.safetensors", "model.safetensors.index.json"):
        raise InputError(
            f"{path}: transformers_weights names another weight file",
            seen=f"transformers_weights: {named!r}"[:200],
            allowed="model.safetensors, or model.safetensors.index.json",
            change="rename that file to model.safetensors, and remove the key",
        )
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
    passed_on = {key: _plain(value) for key, value in raw.items() if _is_passed_on(path, kind, key, value)}
    try:
        return kind.from_dict(passed_on)
    # a strict class, its validators and their arithmetic can raise any class
    except Exception as error:
        raise InputError(f"{path}: transformers cannot read this config", seen=_reason(error)) from None


def _plain(value: Any) -> Any:
    """A copy without `auto_map` at any depth, and with transformers' spelling of infinity as a number."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _plain(item) for key, item in value.items() if key != "auto_map"}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _reason(error: Exception) -> str:
    """A library's message in one line; with strict classes, its second line names the key."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or type(error).__name__


def refuse_code(path: Path, value: Any, above: str = "", is_known: bool = False) -> None:
    """Check keys at any depth.

    Args:
        is_known: transformers has the architecture, so `auto_map` is never looked at; also true of everything below a
            `model_type` of transformers.

    Raises:
        InputError: a key that can lead to code.
    """
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not above and isinstance(value, dict) and isinstance(kind := value.get("model_type"), str):
        is_known = kind in CONFIG_MAPPING
    for key, item in items:
        name = f"{above}{key}"
        if is_known and key == "auto_map":
            continue
        if isinstance(key, str) and CODE.fullmatch(key) and not _is_harmless(key, item):
            raise InputError(
                f"{path}: {name} can make a loader run code from the model folder or from elsewhere",
                seen=f"{name}: {item!r}"[:200],
                allowed="architectures of the installed transformers",
                change=f"remove {name} if the model has such an architecture; otherwise use another model",
            )
        refuse_code(path, item, f"{name}.", is_known)


def _is_harmless(key: str, value: Any) -> bool:
    """Whether the value makes a code key harmless: off, a size, or an attention implementation of transformers."""
    if value is None or (value is False and key != "auto_map"):
        return True
    if key == "__float__":
        return value in ("Infinity", "-Infinity", "NaN")
    if "implementation" in key:
        return isinstance(value, str) and value in IMPLEMENTATIONS
    if isinstance(value, list):
        return all(_is_harmless(key, item) for item in value)
    is_size = type(value) in (int, float) and not key.startswith("use_")
    return "kernel" in key and is_size  # of a convolution


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
    if key.startswith("_") or CODE.fullmatch(key) or key in QUANTISATION:
        return False
    if hasattr(kind, key) and (callable(getattr(kind, key)) or isinstance(getattr(kind, key), (dict, tuple, set))):
        raise InputError(
            f"{path}: {key} is not a setting of this architecture",
            seen=f"{key}: {value!r}"[:200],
            change=f"remove {key}",
        )
    return not (isinstance(value, str) and "/" in value)
