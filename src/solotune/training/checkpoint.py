"""Checkpoints: everything that a run needs to continue as if it had never stopped.

    checkpoints/step-000050/
        adapter_model.safetensors  adapter_config.json     the adapter, as PEFT reads it
        optimizer.safetensors                              the optimizer's moments, by parameter
        random.safetensors                                 states of the random generators
        best.safetensors                                   the best evaluation so far, if it is asked for (`best_model`)
        state.json                                         step, optimizer scalars, fingerprints
        manifest.json                                      size and sha256 of each of these

No pickle is written or read. A checkpoint folder appears complete or not at all (`atomic_io.whole_folder`), and is
valid only if every file matches its manifest. The newest valid one is used; newer damaged ones are reported with what
is wrong with them. A checkpoint is read back before it appears, and older ones are removed after that. The row order is
not stored: it is a function of seed and epoch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import nn

from solotune.errors import IntegrityError, SolotuneError
from solotune.model.adapter import Adapter, adapter_tensors, read_tensors
from solotune.run.atomic_io import remove_folder, whole_folder
from solotune.run.manifest import check_folder
from solotune.run.run_dir import read_object

STEP_FOLDER = re.compile(r"step-(\d{6,})")
BEST = "best.safetensors"


@dataclass
class Checkpoint:
    """The content of a checkpoint, on the CPU."""

    step: int
    adapter: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    random: dict[str, torch.Tensor]
    state: dict[str, Any]
    best: dict[str, torch.Tensor] = field(default_factory=dict)


def save(folder: Path, step: int, adapter: Mapping[str, torch.Tensor], peft_config: Mapping[str, Any],
         optimizer: torch.optim.Optimizer, state: Mapping[str, Any],
         best: Mapping[str, torch.Tensor] | None = None) -> Path:  # fmt: skip
    """Write checkpoints/step-<step> below `folder`; its path.

    Args:
        state: the caller's own values, as JSON; `load` returns them.
        best: `BestModel.tensors`; none: there is no such file.

    Raises:
        StorageError: it cannot be written, or reading it back gave something else.
    """
    tensors, scalars = _split_optimizer(optimizer)
    target = folder / f"step-{step:06d}"
    with whole_folder(target) as partial:
        Adapter(peft_config, adapter).write(partial)
        partial.write("optimizer.safetensors", save_tensors(tensors))
        partial.write("random.safetensors", save_tensors(random_state()))
        if best:
            partial.write(BEST, save_tensors(dict(best)))
        content = {"step": step, "optimizer": scalars, **state}
        partial.write("state.json", json.dumps(content, indent=2) + "\n")
    return target


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        InputError: the folder is not a checkpoint.
        IntegrityError: a file in it is damaged.
    """
    state = read_state(folder)
    return Checkpoint(
        step=state["step"],
        adapter=adapter_tensors(folder),
        optimizer=read_tensors(folder / "optimizer.safetensors"),
        random=read_tensors(folder / "random.safetensors"),
        state=state,
        best=read_tensors(folder / BEST) if (folder / BEST).is_file() else {},
    )


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint; the caller's own values in it are unchecked.

    Raises:
        InputError: there is none, or it is not a JSON object.
        IntegrityError: the step or the optimizer's scalars are missing or damaged.
    """
    path = folder / "state.json"
    state = read_object(path)
    for key, kind in (("step", int), ("optimizer", dict)):
        if type(state.get(key)) is not kind:
            raise IntegrityError(f"{path}: no {key} in it", change="use another checkpoint")
    return state


def invalid_reason(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is as it was written."""
    if not folder.is_dir():
        return "the folder does not exist"
    for file, problem in check_folder(folder):
        return f"{file}: {problem}"
    try:
        step = read_state(folder)["step"]
    except SolotuneError as error:
        return f"state.json: {error.problem.rpartition(': ')[2]}"
    named = STEP_FOLDER.fullmatch(folder.name)
    return None if named is None or int(named[1]) == step else f"state.json: it belongs to step {step}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints below `folder`, valid or not, oldest first."""
    return sorted((int(m[1]), path) for path in folder.glob("step-*") if (m := STEP_FOLDER.fullmatch(path.name)))


def newest(folder: Path) -> Path | None:
    """The valid checkpoint with the highest step below `folder`."""
    return next((path for path, problem in newest_first(folder) if problem is None), None)


def newest_first(
    folder: Path, objection: Callable[[Path], str | None] = lambda path: None
) -> Iterator[tuple[Path, str | None]]:
    """Each checkpoint, newest first, with why it cannot be used; the first usable one (reason None) is the last.

    Args:
        objection: gives another reason not to use a checkpoint that is valid in itself.
    """
    for _, path in reversed(list_checkpoints(folder)):
        problem = invalid_reason(path) or objection(path)
        yield path, problem
        if problem is None:
            return


def keep_newest(folder: Path, limit: int | None, step: int) -> None:
    """Keep the newest `limit` checkpoints up to `step` and remove older ones; that of `step` was just read back."""
    found = [path for number, path in list_checkpoints(folder) if number <= step]
    for path in found[: -limit if limit else 0]:
        remove_folder(path)


def restore_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint, parameters: list[nn.Parameter]) -> None:
    """Restore the optimizer's moments, each with its dtype and shape, on its parameter's device.

    bitsandbytes' optimizers first create their state as in a first step, and the values are copied into it. So paged
    moments are in paged memory again, which `load_state_dict` would lose.

    Raises:
        IntegrityError: the checkpoint's state belongs to another optimizer.
    """
    state: dict[int, dict[str, Any]] = {}
    for source in (checkpoint.optimizer, checkpoint.state["optimizer"]):
        for path, value in source.items():
            index, *_, name = path.split("/")
            if not index.isdecimal() or int(index) >= len(parameters):
                raise _other_state(path[:200], f"states of {len(parameters)} parameters")
            state.setdefault(int(index), {})[name] = value
    if not hasattr(optimizer, "init_state"):
        for index, values in state.items():
            for name, value in values.items():
                if name != "step" and getattr(value, "shape", None) != parameters[index].shape:
                    raise _other_state(f"{name}: {_kind(value)}", str(tuple(parameters[index].shape)))
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return
    for index, values in state.items():
        parameter = parameters[index]
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)  # type: ignore[attr-defined]
        made = optimizer.state[parameter]
        if parameter.is_cuda:
            torch.cuda.synchronize()  # paged memory is written by the host below, and was filled by the GPU
        if made.keys() != values.keys():
            raise _other_state(", ".join(sorted(values)), ", ".join(sorted(made)))
        for name, value in values.items():
            if not isinstance(value, torch.Tensor):
                made[name] = value
                continue
            if _kind(made[name]) != _kind(value):
                raise _other_state(f"{name}: {_kind(value)}", _kind(made[name]))
            made[name].copy_(value)


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:80]


def _other_state(seen: str, allowed: str) -> IntegrityError:
    return IntegrityError("the checkpoint's optimizer state belongs to another optimizer", seen=seen, allowed=allowed)


def random_state() -> dict[str, torch.Tensor]:
    """The states of PyTorch's generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random(states: Mapping[str, torch.Tensor]) -> None:
    if "cpu" in states:
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
