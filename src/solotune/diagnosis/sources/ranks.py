"""What the files of a run say of its ranks (the processes of a run on several GPUs).

    of_folder("output")         another trainer's folder: adapters, logs and checkpoints of its ranks
    of_record(record)           a run of solotune

| what | where |
|---|---|
| adapters | adapter_rank0.safetensors, rank_0/adapter_model.safetensors |
| logs | log_rank0.jsonl, rank0/metrics.jsonl; one log whose lines have a `rank` |
| number of ranks | rng_state_0.pth of transformers' Trainer, random_states_0.pkl of accelerate, in each checkpoint |

A folder is of ranks only if its numbers are 0, 1, ..., N - 1 (`rank8` and `rank16` are ranks of LoRA). Of most folders
only names are read.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from solotune.diagnosis.run_facts import RankCheckpoint, Ranks
from solotune.diagnosis.sources import pickle_reader, trainer_logs
from solotune.diagnosis.sources.run_files import json_of
from solotune.diagnosis.sources.surroundings import files_of, folders_of
from solotune.errors import SolotuneError
from solotune.run.events import ResumeEvent, StartEvent, StepEvent
from solotune.run.record import RunRecord

MAX_RANKS = 64
"""Ranks whose adapters and logs are read."""
MAX_CHECKPOINTS = 200
_RANK = re.compile(
    r"(?<![a-z0-9])(?<![tmpe]p[._-])(?:local[._-]?|global[._-]?)?rank[._-]?(\d{1,5})(?!\d)", re.IGNORECASE
)
"""The number of a rank; of tensor, model, pipeline and expert parallel ranks (`tp_rank_0`) files are shards."""
_STATES = re.compile(r"rng_state(?:_(\d{1,5}))?\.pth|random_states_(\d{1,5})\.pkl")
_ADAPTER = "adapter_model.safetensors"
_FIELDS = ("rank", "global_rank", "process_index")
"""Names of the rank in a line of a log."""


def of_folder(folder: Path) -> Ranks | None:
    """The ranks of another trainer's run; None if nothing says that there were several."""
    home = folder.parent if re.fullmatch(r"checkpoint-\d+", folder.name) else folder
    found = Ranks(_adapters(folder), _logs(folder), _checkpoints(home))
    return found if found.world_size > 1 else None


def _of_ranks(paths: Iterable[tuple[str, Path]]) -> list[dict[int, Path]]:
    """Paths whose names differ only in the number of a rank, and whose numbers are 0, 1, ..., N - 1."""
    groups: dict[str, dict[int, Path]] = {}
    for name, path in paths:
        if (shown := _RANK.search(name)) is not None:
            groups.setdefault(name[: shown.start(1)] + name[shown.end(1) :], {})[int(shown[1])] = path
    return [group for group in groups.values() if len(group) > 1 and sorted(group) == list(range(len(group)))]


def _adapters(folder: Path) -> Mapping[int, Mapping[str, Any]]:
    """The adapter of each rank, if each rank saved one after the same step."""
    from solotune.model.adapter import read_tensors

    files = [(path.name, path) for path in files_of(folder) if path.suffix == ".safetensors"]
    inner = [(place.name, place / _ADAPTER) for place in folders_of(folder) if place / _ADAPTER in files_of(place)]
    for group in _of_ranks([*files, *inner]):
        if len({json_of(path.parent / trainer_logs.STATE).get("global_step") for path in group.values()}) > 1:
            continue
        with contextlib.suppress(SolotuneError):
            found = {rank: read_tensors(path) for rank, path in sorted(group.items())[:MAX_RANKS]}
            if all(any("lora_" in name for name in tensors) for tensors in found.values()):
                return found
    return {}


def _logs(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """What each rank logged: in a file of its own, or in one file with the rank in each line."""
    places = [folder, *folders_of(folder)]
    files = [(f"{file.parent.name}/{file.name}" if file.parent != folder else file.name, file)
             for place in places for file in files_of(place) if file.suffix == ".jsonl"]  # fmt: skip
    for group in _of_ranks(files):
        found = {rank: trainer_logs.lines_of(file) for rank, file in sorted(group.items())[:MAX_RANKS]}
        if all(found.values()):
            return found
    for name, file in files:
        if trainer_logs.is_log(file.name) and not _RANK.search(name):
            found = _split(trainer_logs.lines_of(file))
            if len(found) > 1:
                return found
    return {}


def _split(lines: Iterable[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """The lines of each rank."""
    found: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        rank = next((line[name] for name in _FIELDS if type(line.get(name)) is int), None)
        if rank is not None and 0 <= rank < MAX_RANKS:
            found.setdefault(rank, []).append(line)
    return found if sorted(found) == list(range(len(found))) else {}


# --- checkpoints


def _checkpoints(folder: Path) -> list[RankCheckpoint]:
    """The ranks at each checkpoint; rows and epoch too if their number changed."""
    found: list[tuple[int, int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d{1,18})", path.name)
        if not step or not path.is_dir() or path.is_symlink() or len(found) >= MAX_CHECKPOINTS:
            continue
        if (count := _count(path)) is not None:
            found.append((int(step[1]), count, path))
    found.sort()
    if all(one[1] == other[1] for one, other in pairwise(found)):
        return [RankCheckpoint(step, count) for step, count, _ in found]
    return [_checkpoint(step, count, path) for step, count, path in found]


def _count(checkpoint: Path) -> int | None:
    """Ranks that saved their random state here; 1 if one did without a number."""
    names = [shown for file in files_of(checkpoint) if (shown := _STATES.fullmatch(file.name))]
    numbers = {int(shown[1] or shown[2]) for shown in names if shown[1] or shown[2]}
    if numbers:
        return len(numbers) if numbers == set(range(len(numbers))) else None
    return 1 if names else None


def _checkpoint(step: int, count: int, path: Path) -> RankCheckpoint:
    state, arguments = json_of(path / trainer_logs.STATE), {}
    with contextlib.suppress(pickle_reader.UnreadableError):
        arguments = pickle_reader.attributes(path / "training_args.bin")[1] if _has_arguments(path) else {}
    rows, accumulated = state.get("train_batch_size"), arguments.get("gradient_accumulation_steps")
    rows = rows if type(rows) is int else arguments.get("per_device_train_batch_size")
    known = rows * accumulated if isinstance(rows, int) and isinstance(accumulated, int) else 0
    epoch = state.get("epoch")
    return RankCheckpoint(
        step,
        count,
        count * known if known > 0 else None,
        float(epoch) if isinstance(epoch, (int, float)) and 0 < epoch < 1e9 else None,
    )


def _has_arguments(path: Path) -> bool:
    return path / "training_args.bin" in files_of(path)


# --- solotune


def of_record(record: RunRecord) -> Ranks | None:
    """The ranks of a run of solotune, from its events; None if it always had one."""
    parts: list[RankCheckpoint] = []  # from each start or resume to the next
    for event in record.events:
        if isinstance(event, (StartEvent, ResumeEvent)):
            parts.append(RankCheckpoint(event.step, event.world_size or 1))
        elif isinstance(event, StepEvent) and parts:
            parts[-1] = RankCheckpoint(event.step, parts[-1].world_size, None, event.epoch)
    found = Ranks(checkpoints=parts)
    return found if found.world_size > 1 else None
