"""A LoRA adapter as a value, without a loaded model: reader and writer of PEFT's file format.

    adapter_config.json          r, lora_alpha, use_rslora, rank_pattern, alpha_pattern, target_modules, ...
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight (r, in) and .lora_B.weight (out, r)

    adapter = Adapter.read(folder)         a folder that solotune or PEFT wrote
    adapter.delta("model.layers.0.self_attn.q_proj")     what it adds to that layer's weight

The folder is not trusted: pickles, links out of it and numbers that are not finite are refused. Adapters that are more
than LoRA (DoRA, trained embeddings or biases, PiSSA, ...) are refused too, because no delta describes them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from solotune.errors import InputError, IntegrityError
from solotune.hardware.ram import ram
from solotune.hub.safe_files import check_links, contained, json_object
from solotune.regular_files import read_bytes
from solotune.run.atomic_io import Folder

TENSORS, CONFIG, PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
MAX_TENSOR_BYTES = 32 << 30  # rank 256 on every layer of a 70B model is 13 GB in float32
PARTS = ("lora_A", "lora_B")
_KEY = re.compile(rf"base_model\.model\.(.+)\.({'|'.join(PARTS)})\.weight")

READ = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias")
CHANGES_NOTHING = (
    # purpose, and which modules have an adapter: the tensors show it
    "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    # training only, and settings that do nothing without another key (which is refused)
    "lora_dropout", "init_lora_weights", "eva_config", "loftq_config", "corda_config", "lora_ga_config",
    "runtime_config", "ensure_weight_tying", "qalora_group_size", "megatron_core",
)  # fmt: skip
KEEPS_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")  # other initialisations change the base's weights
PLAIN = "plain LoRA or rsLoRA"
_SLOW_PATTERN = re.compile(r"\)[*+?{]")  # a repeated group: matching can take exponential time


def tensor_key(module: str, part: str) -> str:
    """PEFT's name of a tensor: `part` is lora_A or lora_B, `module` the layer's dotted name in the base."""
    return f"base_model.model.{module}.{part}.weight"


@dataclass(frozen=True)
class Adapter:
    """PEFT's config of an adapter, and its tensors under PEFT's names."""

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """Read and check an adapter folder.

        Raises:
            InputError: no adapter in safetensors, more than LoRA, or tensors that do not match the config or are not
                finite.
            IntegrityError: the file is damaged.
        """
        adapter = cls(read_config(folder), read_finite_tensors(folder))
        _check_config(folder / CONFIG, adapter.config)
        _check_tensors(folder / TENSORS, adapter)
        return adapter

    def write(self, folder: Folder) -> None:
        """Write the two files that PEFT reads."""
        folder.write(TENSORS, save_tensors(dict(self.tensors), {"format": "pt"}))
        folder.write(CONFIG, json.dumps(self.config, indent=2) + "\n")

    @property
    def modules(self) -> list[str]:
        """Dotted names of the layers that have an adapter, in the order of the file."""
        found = (_KEY.fullmatch(key) for key in self.tensors)
        return list(dict.fromkeys(match[1] for match in found if match))

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base stores these layers' weights as (in, out), like GPT-2; the delta must then be transposed."""
        return bool(self.config.get("fan_in_fan_out"))

    def rank(self, module: str) -> int:
        """The rank that the config gives a layer."""
        return _by_pattern(self.config.get("rank_pattern"), module, self.config["r"])

    def scaling(self, module: str) -> float:
        """The factor s of B A for a layer: alpha / r, of rsLoRA alpha / sqrt(r)."""
        alpha, r = _by_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"]), self.rank(module)
        return alpha / math.sqrt(r) if self.config.get("use_rslora") else alpha / r

    def delta(self, module: str) -> torch.Tensor:
        """Change of a layer's weight: s B A, (out, in), float32.

        Raises:
            KeyError: the layer has no adapter.
        """
        A, B = self.factors(module)
        return self.scaling(module) * (B @ A)

    def factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and B (out, r) of a layer, float32.

        Raises:
            KeyError: the layer has no adapter.
        """
        A, B = (self.tensors[tensor_key(module, part)].float() for part in PARTS)
        return A, B


def peft_config(
    modules: Collection[str],
    candidates: Collection[str],
    *,
    base: str,
    revision: str | None,
    r: int,
    alpha: float,
    dropout: float,
    use_rslora: bool,
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    """Content of adapter_config.json for an adapter with one rank.

    `target_modules` are last names if they select exactly the layers that have an adapter, else whole dotted names.

    Args:
        modules: dotted names of the layers that have an adapter.
        candidates: dotted names of all layers of the base that PEFT could adapt: linears and embeddings.
        base: hub id of the base, or its path.
    """
    leaves = {name.rpartition(".")[2] for name in modules}
    selected = {name for name in candidates if name.rpartition(".")[2] in leaves}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": use_rslora,
        "target_modules": sorted(leaves if selected == set(modules) else modules),
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "inference_mode": True,
    }


# --- reading


def adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder, unchecked.

    Raises:
        InputError: there is no adapter.
        IntegrityError: the file is damaged.
    """
    return read_tensors(folder / TENSORS)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file of a checkpoint or an adapter.

    Raises:
        InputError: there is no such file, it is not a regular file, or too large.
        IntegrityError: it is damaged.
    """
    try:
        return load_tensors(read_bytes(path, min(MAX_TENSOR_BYTES, ram().free // 2)))  # the bytes, and the tensors
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", allowed="a folder that solotune or PEFT wrote") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read", seen=error.strerror) from None
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:  # the last four: odd dtypes
        raise IntegrityError(
            f"{path}: the file is damaged", seen=str(error)[:300], change="use an older checkpoint"
        ) from None


def read_finite_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder that is not trusted.

    Raises:
        InputError: it is a pickle, a link out of the folder, or not finite.
        IntegrityError: the file is damaged.
    """
    from solotune.model.weights import check_finite  # imports transformers, which other callers do not need

    path = folder / TENSORS
    if not path.exists() and (folder / PICKLE).exists():
        raise InputError(
            f"{folder}: no adapter in safetensors",
            seen=PICKLE,
            allowed=f"{TENSORS}; formats that can run code are not read",
        )
    check_links(folder)
    tensors = read_tensors(path)
    for name, tensor in tensors.items():
        check_finite(str(path), name, tensor)
    return tensors


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter folder, unchecked.

    Raises:
        InputError: there is none, it is a link out of the folder, or it is not a JSON object.
    """
    if not (folder / CONFIG).exists():
        raise InputError(f"{folder}: no {CONFIG}", allowed="an adapter that solotune or PEFT wrote")
    return json_object(contained(folder, CONFIG))


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """Value of the first pattern that matches the module's name, or its end after a dot, as in PEFT."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Check the config.

    Raises:
        InputError: it is not plain LoRA, or has impossible values.
    """

    def refused(key: str, allowed: str) -> InputError:
        seen = f"{key}: {json.dumps(config.get(key))}"[:200]
        change = "merge the adapter into its base with PEFT, and use the merged model" if allowed == PLAIN else ""
        return InputError(f"{path}: {key} has a value that is not supported", seen=seen, allowed=allowed, change=change)

    for key in sorted(config.keys() - {*READ, *CHANGES_NOTHING}):
        if config[key] not in (None, False, {}, [], ""):
            raise refused(key, PLAIN)
    for key, allowed in (("peft_type", ("LORA",)), ("bias", ("none", None)), ("init_lora_weights", KEEPS_THE_BASE)):
        if not any(config.get(key) is value or config.get(key) == value for value in allowed):
            raise refused(key, PLAIN)
    if not _is_rank(config.get("r")):
        raise refused("r", "a whole number above 0")
    if not _is_number(config.get("lora_alpha")):
        raise refused("lora_alpha", "a number")
    for key, is_valid in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(map(is_valid, patterns.values())):
            raise refused(key, "a mapping of module names to numbers")
        if not all(map(_is_pattern, patterns)):
            raise refused(key, "module names, or simple patterns for them")
    for key in ("use_rslora", "fan_in_fan_out"):
        if config.get(key) not in (None, False, True):
            raise refused(key, "true or false")


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_pattern(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return _SLOW_PATTERN.search(pattern) is None


def _check_tensors(path: Path, adapter: Adapter) -> None:
    """Check the tensors.

    Raises:
        InputError: a tensor that is not a lora_A or lora_B, has no partner, or has another rank than the config.
    """
    for key, tensor in adapter.tensors.items():
        if _KEY.fullmatch(key) is None or tensor.dim() != 2 or not tensor.is_floating_point():
            seen = f"{key}: {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            raise InputError(f"{path}: contains tensors that are not LoRA matrices", seen=seen[:200], allowed=PLAIN)
    for module in adapter.modules:
        A, B = (adapter.tensors.get(tensor_key(module, part)) for part in PARTS)
        if A is None or B is None:
            raise InputError(
                f"{path}: a LoRA matrix is missing", seen=f"{module} has no {PARTS[0 if A is None else 1]}"
            )
        if not len(A) == B.shape[1] == adapter.rank(module):
            raise InputError(
                f"{path}: the rank differs from adapter_config.json",
                seen=f"{module}: A {tuple(A.shape)}, B {tuple(B.shape)}",
                allowed=f"rank {adapter.rank(module)}",
            )
