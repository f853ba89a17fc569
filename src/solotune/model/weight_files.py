"""Which safetensors files of a model folder hold its weights: those that transformers would read, or a clear refusal.

    model.safetensors                                        one file
    model.safetensors.index.json                             the shards that it names
    model-00001-of-00003.safetensors, ...                    all shards, if there is no index (transformers needs one)

A folder with two sets of weights is refused, because two readers would load two models from it. Safetensors files that
belong to no set (`consolidated.safetensors`) are not read; `unread_files` names them.

Only safetensors are read: other weight formats can run code.
"""

from __future__ import annotations

import re
from pathlib import Path

from solotune.errors import InputError
from solotune.hub.safe_files import check_regular, contained, json_object
from solotune.hub.safetensors_header import read_header

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
COMPUTED = r"rotary_emb\.inv_freq$"  # tables in old checkpoints that every model computes itself
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_ANY_SHARD = re.compile(r"model-[\w-]+\.safetensors")
_ALLOWED = f"{WHOLE}, or model-00001-of-00002.safetensors, model-00002-of-00002.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order.

    Raises:
        InputError: there are none or more than one set, one is missing or outside the folder, a tensor is in two files,
            index and files differ, or there is an adapter beside the model.
    """
    _refuse_adapter(folder)
    shards = sorted(path.name for path in folder.glob("model-*.safetensors") if _ANY_SHARD.fullmatch(path.name))
    weight_map = _weight_map(folder) if (folder / INDEX).exists() else None
    if (folder / WHOLE).exists():
        others = sorted({*shards, *(weight_map or {}).values()} - {WHOLE})
        if others:
            raise InputError(
                f"{folder}: two sets of weights",
                seen=f"{WHOLE}, and {_some(others)}",
                allowed="one set; transformers would read the first, another program the second",
                change=f"move {WHOLE}, or the other files and {INDEX}, out of the folder",
            )
        files = [contained(folder, WHOLE)]
    elif weight_map is not None:
        names = sorted(set(weight_map.values()))
        if missing := [name for name in names if not (folder / name).exists()]:
            raise InputError(f"{folder}: a weight file is missing", seen=missing[0], change="download the folder again")
        files = [contained(folder, name) for name in names]
    else:
        files = [contained(folder, name) for name in _without_index(folder, shards)]
    _check_tensors(folder / INDEX, weight_map, files)
    return files


def unread_files(folder: Path, files: list[Path]) -> list[str]:
    """Names of the folder's safetensors files that are not among the model's weights."""
    return sorted({path.name for path in folder.glob("*.safetensors")} - {path.name for path in files})


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _refuse_adapter(folder: Path) -> None:
    """transformers would load an adapter in a model folder into the model, and so train or serve another base."""
    if (folder / "adapter_config.json").exists() and any(folder.glob("model*.safetensors")):
        raise InputError(
            f"{folder}: contains an adapter next to the model",
            seen="adapter_config.json, which transformers would load into the model",
            allowed="only the model",
            change="move adapter_config.json out of the folder, or merge the adapter into the model with PEFT",
        )


def _without_index(folder: Path, shards: list[str]) -> list[str]:
    """All shards of a folder without an index.

    Raises:
        InputError: there are none, they are parts of several sets, or one of a set is missing.
    """
    if not shards:
        others = {p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".gguf", ".safetensors"}}
        named = [name for name in sorted(others) if name.endswith(".safetensors") and not name.startswith("adapter_")]
        change = f"rename it to {WHOLE} if its tensors have transformers' names" if len(named) == 1 else None
        if "adapter_model.safetensors" in others and not named:
            change = "this is an adapter: use its base model, base_model_name_or_path in adapter_config.json"
        raise InputError(
            f"{folder}: no weights in safetensors" if not named else f"{folder}: no weights under transformers' names",
            seen=_some(sorted(others)) or "no weight files",
            allowed=_ALLOWED if named else "*.safetensors; formats that can run code are not read",
            change=change,
        )
    numbered = {name: match for name in shards if (match := _SHARD.fullmatch(name))}
    totals = {int(match[2]) for match in numbered.values()}
    if len(totals) > 1 or (totals and len(numbered) < len(shards)):
        raise InputError(
            f"{folder}: parts of several sets of weights, and no {INDEX} that says which belong together",
            seen=_some(shards),
            allowed=_ALLOWED,
            change="keep the files of one set, or download the folder again",
        )
    absent = {*range(1, max(totals, default=0) + 1)} - {int(match[1]) for match in numbered.values()}
    if absent:
        raise InputError(
            f"{folder}: a weight file is missing",
            seen=f"no part {min(absent)} of {max(totals)}",
            change="download the folder again",
        )
    return shards


def _weight_map(folder: Path) -> dict[str, str]:
    index = folder / INDEX
    check_regular(folder, index)
    weight_map = json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: not a safetensors index (weight_map: tensor -> file)")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f"{index}: refers to a file outside the folder", seen=str(name), allowed="names such as a.safetensors"
            )
    return weight_map


def _check_tensors(index: Path, weight_map: dict[str, str] | None, files: list[Path]) -> None:
    """Compare the files with each other and with the index.

    Raises:
        InputError: a tensor is in two files, not in the file that the index names, or not in the index.
    """
    there: dict[str, str] = {}
    for path in files:
        for name in read_header(path):
            if name in there:
                raise InputError(f"{path}: contains a tensor that is also in {there[name]}", seen=name)
            there[name] = path.name
    if weight_map is None:
        return
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
