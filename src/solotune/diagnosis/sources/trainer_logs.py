"""Read the logged steps of a training from the logs of any trainer or tracker.

    logs = find_logs(folder)          the logs in a folder and its well-known subfolders, the most trusted kind first

| kind | where |
|---|---|
| trainer_state.json | transformers' Trainer and everything on top of it |
| trainer_log.jsonl, logging.jsonl, other `*log*.jsonl`, metrics.jsonl | LLaMA-Factory, ms-swift, loops of one's own |
| run-*.wandb | W&B offline runs |
| events.out.tfevents.* | TensorBoard |
| metrics/loss beside meta.yaml | MLflow |
| *.log, *.out, *.err, *log*.txt | what the console showed |

Each is bounded by bytes and lines, and whatever cannot be read in it is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from solotune.diagnosis.sources import binary_logs, console_log
from solotune.diagnosis.sources.step_log import Entry, StepLog, is_step, of_entries
from solotune.diagnosis.sources.surroundings import files_of, folders_of
from solotune.regular_files import open_regular
from solotune.run.record import json_object, parse_json

MAX_LOG_BYTES = 64 << 20
MAX_LINE_BYTES = 1 << 20
MAX_METRIC_BYTES = 16 << 20
NUM_FILES = 200
NUM_FOLDERS = 200
DEPTH = 4
"""Folders below the target: project/wandb/offline-run-1/files."""
STATE = "trainer_state.json"

# --- one file


def of_state(file: Path) -> StepLog | None:
    """trainer_state.json of transformers."""
    state = json_object(file) or {}
    logged = state.get("log_history")
    history = [entry for entry in logged if isinstance(entry, Mapping)] if isinstance(logged, list) else []
    entries = [
        dict(entry) for entry in history if is_step(entry.get("step")) and ("loss" in entry or "eval_loss" in entry)
    ]
    total, last = state.get("max_steps"), state.get("global_step")
    ended = any("train_runtime" in entry or "train_loss" in entry for entry in history)
    return StepLog(
        "state",
        file,
        entries,
        total if is_step(total) and total > 0 else None,
        ended or (is_step(last) and is_step(total) and 0 < total <= last),
        {"train_batch_size": state["train_batch_size"]} if is_step(state.get("train_batch_size")) else {},
    )


def of_jsonl(file: Path) -> StepLog | None:
    """One JSON object on each line: LLaMA-Factory's trainer_log.jsonl, ms-swift's logging.jsonl, others."""
    found = _lines(file, (b"loss", b"train_runtime"))
    ranks = [rank for entry in found if type(rank := entry.get("rank")) is int]  # of a run on several GPUs, or of LoRA
    found = [entry for entry in found if not ranks or entry.get("rank") in (None, min(ranks))]
    return of_entries("jsonl", file, found, is_finished=any("train_runtime" in entry for entry in found))


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The JSON objects with a step on the lines of a file; none if it cannot be read."""
    try:
        found = _lines(file, (b"step",))
    except OSError:
        return []
    steps = [{**entry, "step": entry.get("step", entry.get("global_step"))} for entry in found]
    return [entry for entry in steps if is_step(entry["step"])]


def _lines(file: Path, words: tuple[bytes, ...]) -> list[Mapping[str, Any]]:
    """The JSON objects on lines with one of these words."""
    found = []
    for line in _tail(file, MAX_LOG_BYTES).splitlines():
        if len(line) <= MAX_LINE_BYTES and any(word in line for word in words):
            try:
                value = parse_json(line)
            except (ValueError, RecursionError):  # torn by a crash
                continue
            found += [value] if isinstance(value, Mapping) else []
    return found


def of_console(file: Path) -> StepLog | None:
    """What a training printed."""
    text = _tail(file, MAX_LOG_BYTES).decode("utf-8", "replace")
    entries, total, ended = console_log.steps_of(text)
    log = of_entries("console", file, entries, is_finished=ended)
    return None if log is None else replace(log, total_steps=log.total_steps or total, text=text)


def of_tensorboard(files: Sequence[Path]) -> StepLog | None:
    """The event files of one folder, which are those of one run; a resumed run has several."""
    by_step: dict[int, Entry] = {}
    settings: Any = {}
    for file in files:
        for step, values in binary_logs.tensorboard(file):
            for tag, value in values.items():
                if isinstance(value, str):
                    settings = _object(value) or settings if tag.startswith("args") else settings
                else:
                    by_step.setdefault(step, {"step": step})[tag] = value
    entries = [by_step[step] for step in sorted(by_step)]
    ended = any("train/train_runtime" in entry for entry in entries)
    return of_entries("tensorboard", files[-1], entries, settings, ended)


def of_wandb(file: Path) -> StepLog | None:
    """A run of W&B; its console beside it."""
    history, config, console, code = binary_logs.wandb(file)
    output = file.parent / "files" / "output.log"
    text = "".join(console)
    if not text and output in files_of(output.parent):
        text = _tail(output, MAX_LOG_BYTES).decode("utf-8", "replace")
    nested = [value for key, value in config.items() if key.endswith("_args") and isinstance(value, Mapping)]
    settings = {key: value for part in (*nested, config) for key, value in part.items()}
    ended = any("train/train_runtime" in entry for entry in history)
    log = of_entries("wandb", file, history, settings, ended)
    if log is None and text:
        entries, total, ended = console_log.steps_of(text)
        log = of_entries("wandb", file, entries, settings, ended)
        log = None if log is None else replace(log, total_steps=log.total_steps or total)
    if log is not None and code not in (None, 0) and "Traceback" not in text:
        text += f"\nerror: the run ended with exit code {code}\n"
    return None if log is None else replace(log, text=text)


def of_mlflow(folder: Path) -> StepLog | None:
    """A run folder of MLflow: metrics/<name> with lines of time, value and step; params/<name>."""
    by_step: dict[int, Entry] = {}
    for file, name in _named_files(folder / "metrics"):
        for line in _tail(file, MAX_METRIC_BYTES).decode("ascii", "replace").splitlines():
            parts = line.split()
            if len(parts) >= 3 and re.fullmatch(r"\d{1,15}", parts[2]):
                step = int(parts[2])
                by_step.setdefault(step, {"step": step})[name] = console_number(parts[1])
    settings = {name: console_number(_tail(file, 4096).decode("utf-8", "replace").strip())
                for file, name in _named_files(folder / "params")}  # fmt: skip
    entries = [by_step[step] for step in sorted(by_step)]
    return of_entries("mlflow", folder, entries, settings, any("train_runtime" in entry for entry in entries))


def of_console_or_none(file: Path) -> StepLog | None:
    """`of_console`; None too if the file cannot be read."""
    return read(file, of_console)


def console_number(text: str) -> Any:
    """A written number, True, False or None as what it is; else the text."""
    if text in ("True", "False", "None"):
        return {"True": True, "False": False}.get(text)
    try:
        found = float(text)
    except ValueError:
        return text
    return int(found) if re.fullmatch(r"-?\d{1,15}", text) else found


def _named_files(folder: Path) -> list[tuple[Path, str]]:
    """The files below a folder, one level of folders deep, and their names: `eval/loss`."""
    found = [(file, file.name) for file in files_of(folder)]
    for inner in folders_of(folder, 50):
        found += [(file, f"{inner.name}/{file.name}") for file in files_of(inner)]
    return found[:NUM_FILES]


def _object(text: str) -> Mapping[str, Any] | None:
    """The JSON object in a text; TensorBoard's `add_text` may have it in a Markdown block."""
    start, end = text.find("{"), text.rfind("}")
    try:
        found = parse_json(text[start : end + 1].encode()) if 0 <= start < end else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, Mapping) else None


def _tail(file: Path, most: int) -> bytes:
    """The last bytes of a regular file, at most so many, from the start of a line."""
    with open_regular(file) as opened:
        size = file.stat().st_size
        opened.seek(max(0, size - most))
        content = opened.read(most)
    return content if size <= most else content.partition(b"\n")[2]


# --- the logs of a folder

_LOG = r"(?:.*[._-])?(?:log|logs|logging)(?:[._-].*)?"  # running_log, log_12, train-logs; no dialogs
_READERS: tuple[tuple[str, Callable[[Path], StepLog | None]], ...] = (
    (r"trainer_log\.jsonl|logging\.jsonl", of_jsonl),
    (r"run-.*\.wandb", of_wandb),
    (r"events\.out\.tfevents\..*", lambda file: of_tensorboard([file])),
    (rf"{_LOG}\.jsonl|(?:.*[._-])?metrics(?:[._-].*)?\.jsonl", of_jsonl),
    (rf".*\.(log|out|err)|{_LOG}\.txt", of_console),
)
_SKIPPED = re.compile(r"debug(-internal|-cli.*)?\.log")  # of W&B itself


def is_log(name: str) -> bool:
    """Whether a file of this name is a log that can be read here."""
    return name == STATE or any(re.fullmatch(pattern, name) for pattern, _ in _READERS)


def is_console(name: str) -> bool:
    """Whether this is the name of a file with console output."""
    return re.fullmatch(_READERS[-1][0], name) is not None and not _SKIPPED.fullmatch(name)


def find_logs(folder: Path, depth: int = DEPTH) -> list[StepLog]:
    """The logs with steps below a folder, without its checkpoints: in the order of `_READERS`, of a kind the newest
    first."""
    places, level = [folder], [folder]
    for _ in range(depth):
        level = [inner for place in level for inner in folders_of(place, NUM_FOLDERS)][:NUM_FOLDERS]
        places += level
    chosen: list[tuple[int, float, Path, Callable[[Path], StepLog | None]]] = []
    for file in (file for folder in places for file in files_of(folder)):
        place = next((i for i, (pattern, _) in enumerate(_READERS) if re.fullmatch(pattern, file.name)), None)
        if place is not None and not (place == len(_READERS) - 1 and _SKIPPED.fullmatch(file.name)):
            chosen.append((place, -file.stat().st_mtime, file, _READERS[place][1]))
    for place in places:
        if (place / "metrics").is_dir() and (place / "meta.yaml").is_file():
            chosen.append((len(_READERS) - 2, -place.stat().st_mtime, place, of_mlflow))
    found = []
    for _, _, file, reader in sorted(chosen, key=lambda one: one[:3])[:NUM_FILES]:
        if (log := read(file, reader)) is not None and log.num_steps:
            found.append(log)
    return found


def read(file: Path, reader: Callable[[Path], StepLog | None] | None = None) -> StepLog | None:
    """The log in a file (or MLflow's folder); None if it cannot be read or has no loss."""
    if reader is None:
        reader = of_state if file.name == STATE else next(
            (one for pattern, one in _READERS if re.fullmatch(pattern, file.name)), of_console
        )  # fmt: skip
    try:
        return reader(file)
    except OSError:
        return None
