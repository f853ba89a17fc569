"""A checkpoint: everything that a run needs to go on as if it had never stopped.

    checkpoints/step-000050/
        adapter_model.safetensors  adapter_config.json     the adapter, as PEFT reads it
        optimizer.safetensors                              the optimizer's moments, by parameter
        random.safetensors                                 states of the random generators
        state.json                                         step, optimizer scalars, fingerprints of config and data

No pickle is written or read. A checkpoint folder appears complete or not at all (`record.whole_folder`), so the newest
folder is a good one. The row order is not stored: it is a function of seed and epoch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from solotune.errors import InputError, IntegrityError
from solotune.record import read_json, whole_folder, write_whole

STEP_FOLDER = re.compile(r"step-(\d{6,})$")


@dataclass
class Checkpoint:
    """What a checkpoint holds, on the CPU."""

    step: int
    adapter: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    random: dict[str, torch.Tensor]
    state: dict[str, Any]


def write_adapter(folder: Path, adapter: Mapping[str, torch.Tensor], peft_config: str) -> None:
    """The two files that PEFT reads."""
    write_whole(folder / "adapter_model.safetensors", save_tensors(dict(adapter), {"format": "pt"}))
    write_whole(folder / "adapter_config.json", peft_config)


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder.

    Raises:
        InputError: there is no adapter.
        IntegrityError: the file is damaged.
    """
    return _read_tensors(folder / "adapter_model.safetensors")


def save(folder: Path, step: int, adapter: Mapping[str, torch.Tensor], peft_config: str,
         optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> Path:  # fmt: skip
    """Writes checkpoints/step-<step> below `folder` and returns its path.

    Args:
        state: what the caller wants back, as JSON.
    """
    tensors, scalars = _split_optimizer(optimizer)
    target = folder / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    with whole_folder(target) as partial:
        write_adapter(partial, adapter, peft_config)
        write_whole(partial / "optimizer.safetensors", save_tensors(tensors))
        write_whole(partial / "random.safetensors", save_tensors(random_state()))
        content = {"step": step, "optimizer": scalars, **state}
        write_whole(partial / "state.json", json.dumps(content, indent=2) + "\n")
    return target


def load(folder: Path) -> Checkpoint:
    """Reads a checkpoint.

    Raises:
        InputError: the folder is no checkpoint.
        IntegrityError: a file in it is damaged.
    """
    state = read_json(folder / "state.json")
    return Checkpoint(
        step=state["step"],
        adapter=read_adapter(folder),
        optimizer=_read_tensors(folder / "optimizer.safetensors"),
        random=_read_tensors(folder / "random.safetensors"),
        state=state,
    )


def newest(folder: Path) -> Path | None:
    """The checkpoint with the highest step below `folder`."""
    found = sorted((int(m[1]), path) for path in folder.glob("step-*") if (m := STEP_FOLDER.search(path.name)))
    return found[-1][1] if found else None


def keep_newest(folder: Path, limit: int | None) -> None:
    """Removes the oldest checkpoints beyond `limit`; a folder is renamed away first, so none is ever seen half gone."""
    found = sorted((int(m[1]), path) for path in folder.glob("step-*") if (m := STEP_FOLDER.search(path.name)))
    for _, path in found[: -limit if limit else 0]:
        doomed = path.with_name(f".{path.name}.removed")
        os.replace(path, doomed)
        for file in doomed.iterdir():
            file.unlink()
        doomed.rmdir()


def restore_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint, parameters: list[nn.Parameter]) -> None:
    """Gives the optimizer its moments back, each on its parameter's device."""
    state: dict[int, dict[str, Any]] = {}
    for source in (checkpoint.optimizer, checkpoint.state["optimizer"]):
        for path, value in source.items():
            index, *parents, name = path.split("/")
            inner = state.setdefault(int(index), {})
            for parent in parents:
                inner = inner.setdefault(parent, {})
            on_device = isinstance(value, torch.Tensor)
            inner[name] = value.to(parameters[int(index)].device) if on_device else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_state() -> dict[str, torch.Tensor]:
    """The states of PyTorch's generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random(states: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _split_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimizer's state as (tensors, scalars) under paths such as `0/exp_avg`; bitsandbytes' 8-bit one nests."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{path}/{name}", inner)
        elif isinstance(value, torch.Tensor):
            tensors[path] = value.detach().cpu().contiguous().clone()
        else:
            scalars[path] = value

    for index, values in optimizer.state_dict()["state"].items():
        walk(str(index), values)
    return tensors, scalars


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_tensors(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", allowed="a folder that solotune or PEFT wrote") from None
    except SafetensorError as error:
        raise IntegrityError(
            f"{path}: the file is damaged", seen=str(error), change="use an older checkpoint"
        ) from None
