"""Choose the training data of a trainer's folder among the files that lie in it or beside it.

    choice = choose(around, names, log, settings)
    choice.paths        the files to use; empty if none is certain
    choice.why          "its name is in sft.yaml", "its 240 rows make the 30 steps of each epoch"
    choice.offered      files that may be it, for the user to give with --dataset

A file is used if a file of the run names it (the last part of the written path is its name), or if its number of rows
makes the steps that the run logged for each epoch. A file that merely lies there is offered.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solotune.dataset.readers.files import format_of
from solotune.dataset.readers.source import Source
from solotune.diagnosis.facts.derived import number
from solotune.diagnosis.sources.step_log import Entry, StepLog
from solotune.diagnosis.sources.surroundings import Surroundings, is_array
from solotune.errors import SolotuneError
from solotune.regular_files import open_regular
from solotune.run.record import json_object

MAX_FILE_BYTES = 256 << 20
"""Larger files are offered: reading them is the user's decision."""
MAX_COUNTED = 8
"""Files whose rows are counted."""
MAX_ROWS = 2_000_000
NUM_OFFERED = 4
_ROUNDED = ((2, 0.0051), (4, 5.1e-5))
"""Digits to which trainers round the epoch, and how far it may then be from the exact one."""
_TRAIN = re.compile(r"(^|[^a-z])(train|sft)([^a-z]|$)", re.IGNORECASE)
_HELD_OUT = re.compile(r"(^|[^a-z])(test|eval|valid|validation|val|dev|held.?out)([^a-z]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Choice:
    """Files or folders of data, and how they were recognised."""

    paths: tuple[Path, ...] = ()
    why: str = ""
    offered: tuple[Path, ...] = ()
    is_named: bool = False
    """Whether a file of the run names it."""


def choose(
    around: Surroundings, names: Sequence[tuple[str, str]], log: StepLog | None, settings: Mapping[str, Any]
) -> Choice:
    """The training data of the run.

    Args:
        names: (written name, the file in which it stands).
        log: of the run, with its steps and epochs.
        settings: solotune's names; the batch size and the share that was held out are read.
    """
    found = [(path, where) for name, where in names if (path := named(around, name)) is not None]
    paths = tuple(dict.fromkeys(path for path, _ in found))
    if paths and len(found) == len(names) and all(_size(path) <= MAX_FILE_BYTES for path in paths):
        return Choice(paths, f"its name is in {found[0][1]}", is_named=True)
    possible = [path for path in around.data if path.suffix.lower() != ".json" or is_array(path)]
    possible = [*around.saved_datasets, *possible]
    small = [path for path in possible if _size(path) <= MAX_FILE_BYTES]
    small = sorted(small, key=lambda path: bool(_HELD_OUT.search(path.stem)))[:MAX_COUNTED]
    fitting = [(path, rows) for path in small if (rows := num_rows(path)) and _fits(rows, log, settings)]
    by_name = [one for one in fitting if _TRAIN.search(one[0].stem)]
    chosen = fitting if len(fitting) == 1 else by_name if len(by_name) == 1 else []
    if chosen and not names:
        path, rows = chosen[0]
        return Choice((path,), f"its {rows:,} rows make the run's steps of an epoch")
    offered = [*paths, *(path for path, _ in fitting), *(path for path in possible if not _HELD_OUT.search(path.stem))]
    return Choice(offered=tuple(dict.fromkeys(offered))[:NUM_OFFERED])


def held_out(around: Surroundings, names: Sequence[tuple[str, str]]) -> Choice:
    """The validation data, if files of the run name it."""
    found = [(path, where) for name, where in names if (path := named(around, name)) is not None]
    paths = tuple(dict.fromkeys(path for path, _ in found))
    if not paths or len(found) != len(names) or any(_size(path) > MAX_FILE_BYTES for path in paths):
        return Choice()
    return Choice(paths, f"its name is in {found[0][1]}", is_named=True)


def named(around: Surroundings, name: str) -> Path | None:
    """The file or saved dataset that a name means; a name of LLaMA-Factory's list means the file in the list."""
    if found := around.named(name, [*around.data, *around.saved_datasets]):
        return found
    for listed in around.dataset_info:
        entry = (json_object(listed) or {}).get(name)
        file = entry.get("file_name") if isinstance(entry, Mapping) else None
        if found := around.named(file, around.data):
            return found
    return None


def names_of(value: Any) -> list[str]:
    """The names in a `dataset` setting of any tool: a name, names with commas, a list, `data.jsonl#500` of ms-swift,
    axolotl's `datasets: [{path: ..., data_files: ...}]`."""
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",")]
        return [re.sub(r"#\d+$", "", part) for part in parts if part and len(part) <= 4096]
    if isinstance(value, Mapping):
        files = names_of(value.get("data_files"))
        return files or names_of(value.get("path"))
    if isinstance(value, (list, tuple)):
        return [name for one in value[:100] for name in names_of(one)]
    return []


def num_rows(path: Path) -> int | None:
    """The rows of a data file; None if it cannot be read or has too many to count."""
    try:
        if format_of(path) == "jsonl" and path.suffix.lower() in (".jsonl", ".ndjson"):
            with open_regular(path) as file:
                return sum(1 for line in file if line.strip())
        count = 0
        for count, _ in enumerate(Source.of("dataset", str(path), "train"), start=1):
            if count > MAX_ROWS:
                return None
        return count
    except (SolotuneError, OSError, ValueError):
        return None


def _size(path: Path) -> int:
    """Bytes of a file, or of the files of a saved dataset."""
    try:
        if path.is_dir():
            return sum(file.stat().st_size for file in path.rglob("*.arrow") if file.is_file())
        return path.stat().st_size
    except OSError:
        return MAX_FILE_BYTES + 1


# --- rows and steps


def _fits(rows: int, log: StepLog | None, settings: Mapping[str, Any]) -> bool:
    """Whether so many rows make the epochs that the run logged."""
    if log is None or settings.get("packing") is True or settings.get("group_by_length") is True:
        return False
    batch = number(log.settings.get("train_batch_size")) or number(settings.get("per_device_train_batch_size"))
    accumulation = number(settings.get("gradient_accumulation_steps")) or 1
    entries = _telling(log.entries)
    if not batch or batch < 1 or accumulation < 1 or not entries:
        return False
    share = number(settings.get("validation_size")) or 0
    counts = {rows}
    if 0 < share < 1:  # held out of the same file
        counts = {rows - math.ceil(rows * share), rows - math.floor(rows * share)}
    elif 1 <= share < rows:
        counts = {rows - int(share)}
    drops = settings.get("dataloader_drop_last") is True
    return any(
        all(_epoch_fits(entry, count, int(batch), int(accumulation), drops) for entry in entries) for count in counts
    )


def _telling(entries: Iterable[Entry]) -> list[Entry]:
    """First, middle and last entry with an epoch that is written precisely enough to tell the number of rows."""
    with_epoch = [one for one in entries if isinstance(one.get("epoch"), (int, float)) and one["step"] > 0]
    if not with_epoch:
        return []
    chosen = [with_epoch[0], with_epoch[len(with_epoch) // 2], with_epoch[-1]]
    last = chosen[-1]
    return chosen if last["epoch"] >= 20 * _tolerance(with_epoch) else []


def _tolerance(entries: Sequence[Entry]) -> float:
    """How far a written epoch may be from the exact one: by the digits of all."""
    for digits, most in _ROUNDED:
        if all(round(entry["epoch"], digits) == entry["epoch"] for entry in entries):
            return most
    return 1e-6


def _epoch_fits(entry: Entry, rows: int, batch: int, accumulation: int, drops: bool) -> bool:
    """Whether transformers' Trainer is at this epoch after this step."""
    batches = rows // batch if drops else math.ceil(rows / batch)
    if batches < 1:
        return False
    updates = math.ceil(batches / accumulation)
    epochs, rest = divmod(int(entry["step"]), updates)
    exact = epochs + min(rest * accumulation, batches) / batches
    return abs(exact - entry["epoch"]) <= _tolerance([entry])
