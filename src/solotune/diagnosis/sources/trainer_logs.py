"""Read the logged steps of a training from the logs of any trainer or tracker.

    logs = find_logs(folder)          the logs in a folder and its well-known subfolders, the most trusted kind first
    log = best(logs)                  the one with steps; or None
    trace_of(log)                     as the rules read it

| kind | where |
|---|---|
| trainer_state.json | transformers' Trainer and everything on top of it |
| trainer_log.jsonl, logging.jsonl, other `*log*.jsonl`, metrics.jsonl | LLaMA-Factory, ms-swift, loops of one's own |
| run-*.wandb | W&B offline runs |
| events.out.tfevents.* | TensorBoard |
| metrics/loss beside meta.yaml | MLflow |
| *.log, *.out, *.err, *log*.txt | what the console showed |

Each is bounded by bytes and lines, and whatever cannot be read in it is left out. If several runs were appended to one
file, the last one counts; a run that continues from a checkpoint stays one run, with a seam.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from solotune.diagnosis.run_facts import Trace
from solotune.diagnosis.sources import binary_logs, console_log, run_files
from solotune.diagnosis.sources.surroundings import files_of, folders_of
from solotune.regular_files import open_regular
from solotune.run.events import MAX_INT
from solotune.run.record import json_object, parse_json

MAX_LOG_BYTES = 64 << 20
MAX_LINE_BYTES = 1 << 20
MAX_METRIC_BYTES = 16 << 20
NUM_FILES = 200
NUM_FOLDERS = 200
DEPTH = 4
"""Folders below the target: project/wandb/offline-run-1/files."""
STATE = "trainer_state.json"
_ALIASES = {
    "lr": "learning_rate", "gradnorm": "grad_norm", "gradient_norm": "grad_norm", "val_loss": "eval_loss",
    "valid_loss": "eval_loss", "validation_loss": "eval_loss", "current_steps": "step", "global_step": "step",
    "training_loss": "loss", "_step": "_step", "total_steps": "of_steps", "max_steps": "of_steps",
}  # fmt: skip
_KEPT = {"step", "loss", "learning_rate", "grad_norm", "epoch", "eval_loss", "of_steps"}

Entry = dict[str, Any]


@dataclass(frozen=True)
class StepLog:
    """The logged steps of one run."""

    kind: str
    file: Path
    entries: Sequence[Entry]
    """With `step`, and any of loss, learning_rate, grad_norm, epoch, eval_loss."""
    total_steps: int | None = None
    is_finished: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    """As the tracker recorded them, with the trainer's names."""
    text: str = ""
    """Console output beside it, where its errors are."""
    num_runs: int = 1
    """Runs in this file or folder; the entries are those of the last."""
    seams: tuple[int, ...] = ()
    num_others: int = 0
    """Logs of the same kind beside it, of earlier runs."""

    @property
    def num_steps(self) -> int:
        return sum("loss" in entry for entry in self.entries)


def best(logs: Sequence[StepLog]) -> StepLog | None:
    """The first log with a loss; None if there is none.

    A trainer that crashed leaves the state of its last checkpoint: another log of the same run, which goes further, is
    then the better one.
    """
    with_steps = [log for log in logs if log.num_steps]
    if not with_steps:
        return None
    first = with_steps[0]
    if first.kind != "state" or first.is_finished:
        return first
    last = first.entries[-1]["step"]
    return next((log for log in with_steps[1:] if log.entries[-1]["step"] > last and _is_same_run(first, log)), first)


def _is_same_run(one: StepLog, other: StepLog) -> bool:
    """Whether both logs have the same losses at the same steps."""
    losses = ({e["step"]: number for e in log.entries if (number := _number(e.get("loss"))) is not None}
              for log in (one, other))  # fmt: skip
    mine, theirs = losses
    shared = mine.keys() & theirs.keys()
    return bool(shared) and all(math.isclose(mine[step], theirs[step], rel_tol=0.01) for step in shared)


def trace_of(log: StepLog, errors: tuple[str, ...] = ()) -> Trace:
    """The log as arrays."""
    steps = [entry for entry in log.entries if "loss" in entry]
    evals = [entry for entry in log.entries if "eval_loss" in entry]
    return Trace(
        step_S=np.array([entry["step"] for entry in steps], np.int64),
        loss_S=run_files.column(steps, "loss"),
        learning_rate_S=run_files.column(steps, "learning_rate"),
        grad_norm_S=run_files.column(steps, "grad_norm"),
        epoch_S=run_files.column(steps, "epoch"),
        eval_step_E=np.array([entry["step"] for entry in evals], np.int64),
        eval_loss_E=run_files.column(evals, "eval_loss"),
        total_steps=log.total_steps,
        is_finished=log.is_finished,
        errors=errors,
        seams=log.seams,
    )


# --- one file


def of_state(file: Path) -> StepLog | None:
    """trainer_state.json of transformers."""
    state = json_object(file) or {}
    logged = state.get("log_history")
    history = [entry for entry in logged if isinstance(entry, Mapping)] if isinstance(logged, list) else []
    entries = [
        dict(entry) for entry in history if _is_step(entry.get("step")) and ("loss" in entry or "eval_loss" in entry)
    ]
    total, last = state.get("max_steps"), state.get("global_step")
    ended = any("train_runtime" in entry or "train_loss" in entry for entry in history)
    return StepLog(
        "state",
        file,
        entries,
        total if _is_step(total) and total > 0 else None,
        ended or (_is_step(last) and _is_step(total) and 0 < total <= last),
        {"train_batch_size": state["train_batch_size"]} if _is_step(state.get("train_batch_size")) else {},
    )


def of_jsonl(file: Path) -> StepLog | None:
    """One JSON object on each line: LLaMA-Factory's trainer_log.jsonl, ms-swift's logging.jsonl, others."""
    content = _tail(file, MAX_LOG_BYTES)
    found = []
    for line in content.splitlines():
        if len(line) <= MAX_LINE_BYTES and (b"loss" in line or b"train_runtime" in line):
            try:
                value = parse_json(line)
            except (ValueError, RecursionError):  # torn by a crash
                continue
            found += [value] if isinstance(value, Mapping) else []
    return of_entries("jsonl", file, found, is_finished=any("train_runtime" in entry for entry in found))


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


NO_STEPS = StepLog("none", Path(), ())
"""Of a run that logged nothing but errors."""


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


def of_entries(
    kind: str, file: Path, found: Iterable[Mapping[str, Any]], settings: Any = None, is_finished: bool = False
) -> StepLog | None:
    """The log of entries under any names; None if none has a loss."""
    entries, order, total = [], 0, None
    for one in found:
        entry = _normal(one)
        if "loss" not in entry and "eval_loss" not in entry:
            continue
        order += 1
        step = entry.get("step")
        if not isinstance(step, (int, float)) or not math.isfinite(step) or abs(step) > MAX_INT:
            step = order
        of_steps = entry.pop("of_steps", None)
        total = int(of_steps) if isinstance(of_steps, (int, float)) and 0 < of_steps <= MAX_INT else total
        entries.append({**entry, "step": int(step)})
    if not entries:
        return None
    entries, num_runs, seams = _last_run(entries)
    last = entries[-1]["step"]
    return StepLog(
        kind,
        file,
        entries,
        total,
        is_finished or (total is not None and 0 < total <= last),
        settings if isinstance(settings, Mapping) else {},
        num_runs=num_runs,
        seams=seams,
    )


def _normal(one: Mapping[str, Any]) -> Entry:
    """An entry under transformers' names, without `train/`; numbers alone."""
    entry: Entry = {}
    for key, value in one.items():
        if key == "global_step/max_steps" and isinstance(value, str) and re.fullmatch(r"\d{1,12}/\d{1,12}", value):
            entry["step"], entry["of_steps"] = map(int, value.split("/"))
            continue
        name = re.sub(r"^(?:train|training)/", "", str(key))
        name = re.sub(r"^(?:eval|val|valid|validation)/(?:.*_)?loss$", "eval_loss", name)
        name = _ALIASES.get(name, name)
        if name in _KEPT and (number := _number(value)) is not None:
            entry.setdefault(name, number)
    return entry


def _number(value: Any) -> float | int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and len(value) > 40:
        return None
    try:
        return value if isinstance(value, (int, float)) else float(value)
    except ValueError:
        return None


def _last_run(entries: list[Entry]) -> tuple[list[Entry], int, tuple[int, ...]]:
    """(entries of the last run, number of runs, steps at which it was continued). A step back to the start of a run
    begins another; a step back to a later place continues the same run from a checkpoint."""
    current: list[Entry] = []
    seams: list[int] = []
    num_runs = 1
    for entry in entries:
        if current and entry["step"] < current[-1]["step"]:
            if entry["step"] <= current[0]["step"]:
                current, seams, num_runs = [], [], num_runs + 1
            else:
                while current and current[-1]["step"] >= entry["step"]:
                    current.pop()
                seams.append(current[-1]["step"] if current else 0)
        current.append(entry)
    return current, num_runs, tuple(seams)


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


def _is_step(value: Any) -> TypeGuard[int]:
    return type(value) is int and abs(value) <= MAX_INT


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
    files = [(file, place) for place in places for file in files_of(place)]
    chosen: list[tuple[int, float, Path, Callable[[Path], StepLog | None]]] = []
    for file, _ in files:
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
