"""Read the safetensors files of a model folder: match tensors to modules, check shapes, dtypes and finiteness.

Only safetensors are read: other weight formats can run code. The headers of all files are read first
(`safetensors_header.read_header`), so that missing, extra or misshapen tensors are refused before memory is taken.
Tensors are matched to the architecture one to one; a checkpoint that must be renamed or merged first (mixtures of
experts) goes through transformers' own loader, and must be complete.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from solotune.errors import InputError
from solotune.hub.safe_files import check_regular, contained, json_object
from solotune.hub.safetensors_header import Entry, read_header
from solotune.units import first_line

FLOATS = ("F32", "F16", "BF16", "F64")
MISSING = "the checkpoint lacks {} tensors"
EXTRA = "the checkpoint has {} tensors that the architecture does not have"
COMPUTED = r"rotary_emb\.inv_freq$"  # tables in old checkpoints that every model computes itself


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order.

    Raises:
        InputError: there are none, one in the index is missing or outside the folder, or index and files differ.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if (folder / "model.safetensors").exists():
            return [contained(folder, "model.safetensors")]
        others = sorted(p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".gguf"})
        raise InputError(
            f"{folder}: no weights in safetensors",
            seen=", ".join(others) or "no weight files",
            allowed="*.safetensors; formats that can run code are not read",
        )
    check_regular(folder, index)
    weight_map = json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: not a safetensors index (weight_map: tensor -> file)")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f"{index}: refers to a file outside the folder", seen=str(name), allowed="names such as a.safetensors"
            )
    names = sorted(set(weight_map.values()))
    if missing := [name for name in names if not (folder / name).exists()]:
        raise InputError(f"{folder}: a weight file is missing", seen=missing[0], change="download the folder again")
    files = [contained(folder, name) for name in names]
    _check_index(index, weight_map, files)
    return files


def _check_index(index: Path, weight_map: dict[str, str], files: list[Path]) -> None:
    """Compare the index with the files.

    Raises:
        InputError: a tensor is not in the file that the index names, is in two files, or is not in the index.
    """
    there: dict[str, str] = {}
    for path in files:
        for name in read_header(path):
            if name in there:
                raise InputError(f"{path}: contains a tensor that is also in {there[name]}", seen=name)
            there[name] = path.name
    differ = [name for name in weight_map.keys() | there.keys() if weight_map.get(name) != there.get(name)]
    if differ := sorted(name for name in differ if not re.search(COMPUTED, name)):
        name = differ[0]
        listed = f"in {weight_map[name]} according to the index" if name in weight_map else "not in the index"
        actual = f"found in {there[name]}" if name in there else "found in no file"
        raise InputError(
            f"{index}: index and files differ for {len(differ)} tensors",
            seen=f"{name}: {listed}, {actual}",
            change="download the folder again",
        )


def match_names(module: PreTrainedModel, files: list[Path]) -> dict[str, str] | None:
    """Checkpoint tensor name -> name in the model; None if transformers must rename or merge them.

    Files may lack or carry the prefix of the inner model (`transformer.` of GPT-2), may hold tables that are computed
    (`rotary_emb.inv_freq`) and may lack tied weights.

    Raises:
        InputError: a tensor is missing, extra, or has another shape or dtype than the architecture.
    """
    wanted = module.state_dict(keep_vars=True)
    tied = set(module.all_tied_weights_keys)
    prefix = module.base_model_prefix + "."
    names: dict[str, str] = {}
    unknown: list[str] = []
    numel = 0
    for path in files:
        for key, entry in read_header(path).items():
            name = next((n for n in (key, prefix + key, key.removeprefix(prefix)) if n in wanted), None)
            if name is None and _is_ignored(module, key):
                continue
            _check_dtype(path, key, entry)
            numel += entry.numel
            if name is None:
                unknown.append(key)
            else:
                names[key] = name
                _check_shape(path, key, entry, tuple(wanted[name].shape))
    missing = sorted(wanted.keys() - tied - set(names.values()))
    if not unknown and not missing:
        return names
    whole = {id(tensor): tensor.numel() for name, tensor in wanted.items() if name not in tied}
    if _is_converted(module) and sum(whole.values()) <= numel:
        return None
    folder = files[0].parent
    shown = missing or sorted(unknown)
    raise InputError(
        f"{folder}: {(MISSING if missing else EXTRA).format(len(shown))}",
        seen=", ".join(shown[:3]),
        change="check that config.json belongs to these weights, or download the folder again",
    )


def _is_ignored(module: PreTrainedModel, key: str) -> bool:
    patterns = [*(module._keys_to_ignore_on_load_unexpected or []), COMPUTED]
    return any(re.search(pattern, key) for pattern in patterns)


def _is_converted(module: PreTrainedModel) -> bool:
    """Whether transformers renames or merges tensors of this architecture while loading."""
    config: PreTrainedConfig = module.config
    kinds = {config.model_type, config.get_text_config().model_type, type(module).__name__}
    return any(get_checkpoint_conversion_mapping(kind) for kind in kinds)


def _check_dtype(path: Path, key: str, entry: Entry) -> None:
    if entry.dtype not in FLOATS:
        raise InputError(
            f"{path}: tensor {key} does not fit the architecture in config.json",
            seen=f"{entry.dtype} {entry.shape}",
            allowed=f"floating point of 16 bits or more: {', '.join(FLOATS)}",
        )


def _check_shape(path: Path, key: str, entry: Entry, expected: tuple[int, ...]) -> None:
    if entry.shape != expected:
        raise InputError(
            f"{path}: tensor {key} does not fit the architecture in config.json",
            seen=f"{entry.dtype} {entry.shape}",
            allowed=f"floating point {expected}",
        )


def read_tensors(files: list[Path], names: dict[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name in the model, tensor on the CPU), one at a time in the files' order."""
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - a safetensors handle, not a dict
                    if key in names:
                        yield names[key], file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a readable safetensors file", seen=str(error)) from None


def check_finite(where: str, name: str, tensor: torch.Tensor) -> None:
    """Check a tensor for NaN and infinity.

    If any number is NaN or infinite, so is the sum. Only then are all numbers checked, because large finite numbers can
    also add up to infinity.

    Raises:
        InputError: NaN or infinity in it. Later nothing would show it: sdpa on a CPU hides a NaN.
    """
    total = tensor.sum(dtype=torch.float32 if tensor.dtype.itemsize < 8 else torch.float64)
    if bool(total.isfinite()):
        return
    bad = int((~tensor.isfinite()).sum())
    if bad:
        raise InputError(
            f"{where}: tensor {name} is not finite",
            seen=f"{bad:,} of {tensor.numel():,} numbers are NaN or infinite",
            change="download the folder again, or use another model",
        )


def load_with_transformers(folder: Path, attention: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load a checkpoint that must be converted. transformers fills missing tensors with random numbers: refused."""
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
        raise InputError(f"{folder}: transformers cannot load the checkpoint", seen=first_line(error)) from None
    module, found = loaded
    for kind, words in (("missing_keys", MISSING), ("unexpected_keys", EXTRA)):
        if names := sorted(found[kind]):
            raise InputError(f"{folder}: {words.format(len(names))}", seen=", ".join(names[:3]))
    return module
