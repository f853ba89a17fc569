"""The files of a model folder, read strictly: its architecture, its safetensors, and whose tensor is whose.

config.json and the safetensors index are checked before transformers or safetensors act on them. Only safetensors are
read: the other weight formats can run code. Tensors are matched to the architecture one to one; a checkpoint that needs
renaming or merging first (mixtures of experts) goes through transformers' own loader, with its gaps refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from solotune.errors import InputError


def read_architecture(folder: Path) -> PreTrainedConfig:
    """config.json of a model folder.

    Raises:
        InputError: it is missing, unknown to transformers, or of a checkpoint that is already quantised.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"{folder}: no config.json, so this is not a model folder", allowed="a Hugging Face model folder"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        architecture = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not valid JSON", seen=error.msg) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: transformers cannot read it", seen=str(error).strip().split("\n")[0]) from None
    if "quantization_config" in raw:
        method = raw["quantization_config"].get("quant_method", "unknown method")
        raise InputError(
            f"{path}: the checkpoint is already quantised",
            seen=f"quantization_config: {method}",
            allowed="16- or 32-bit weights, which solotune quantises itself",
            change="name the original, unquantised model",
        )
    return architecture


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order.

    Raises:
        InputError: there are none, or one that the index names is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
            raise InputError(f"{index}: not a safetensors index (weight_map: tensor -> file)") from None
        if outside := [name for name in names if Path(name).name != name]:
            raise InputError(f"{index}: names a file outside the folder", seen=outside[0])
    else:
        names = [name for name in ("model.safetensors",) if (folder / name).is_file()]
    if not names:
        others = sorted(p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".gguf"})
        raise InputError(
            f"{folder}: no weights in safetensors",
            seen=", ".join(others) or "no weight files",
            allowed="*.safetensors; formats that can run code are not read",
        )
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise InputError(f"{folder}: a weight file is missing", seen=missing[0], change="download the folder again")
    return [folder / name for name in names]


def match_names(module: PreTrainedModel, files: list[Path]) -> dict[str, str] | None:
    """Checkpoint tensor name -> name in the model; None where the two do not correspond one to one.

    Files may lack or carry the prefix of the inner model (`transformer.` of GPT-2), may hold tables that are computed
    (`rotary_emb.inv_freq`) and may lack tied weights.
    """
    wanted = set(module.state_dict(keep_vars=True))
    tied = set(module.all_tied_weights_keys)
    ignored = [*(module._keys_to_ignore_on_load_unexpected or []), r"rotary_emb\.inv_freq$"]
    prefix = module.base_model_prefix + "."
    names: dict[str, str] = {}
    for path in files:
        with _opened(path) as file:
            for key in file.keys():  # noqa: SIM118 - a safetensors handle, not a dict
                name = next((n for n in (key, prefix + key, key.removeprefix(prefix)) if n in wanted), None)
                if name is not None:
                    names[key] = name
                elif not any(re.search(pattern, key) for pattern in ignored):
                    return None
    return names if wanted - tied <= set(names.values()) else None


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file", seen=str(error)) from None


def read_tensors(files: list[Path], names: dict[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the model, tensor on the CPU), one at a time in the files' order."""
    for path in files:
        with _opened(path) as file:
            for key in file.keys():  # noqa: SIM118
                if key in names:
                    yield names[key], file.get_tensor(key)


def load_with_transformers(folder: Path, attention: str, dtype: torch.dtype) -> PreTrainedModel:
    """For checkpoints that must be converted; transformers fills gaps with random numbers, so gaps are refused."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: the checkpoint does not load", seen=str(error).strip().split("\n")[0]) from None
    module, found = loaded
    for kind, words in (("missing_keys", "lacks"), ("unexpected_keys", "has, but the architecture does not know,")):
        if names := sorted(found[kind]):
            raise InputError(f"{folder}: the checkpoint {words} {len(names)} tensors", seen=", ".join(names[:3]))
    return module
