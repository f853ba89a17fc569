"""The logged steps of a trainer's folder, and the errors that its console shows.

    log, errors = steps_of(folder, [folder, folder / "checkpoint-50"], around)

A console log beside the folder is the run's only if it shows the losses of the run.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from pathlib import Path

from solotune.diagnosis.facts.derived import number
from solotune.diagnosis.sources import model_card, step_log, trainer_logs
from solotune.diagnosis.sources.folder_settings import LOG_BYTES, beginning
from solotune.diagnosis.sources.hf_rows import first_with
from solotune.diagnosis.sources.step_log import StepLog
from solotune.diagnosis.sources.surroundings import Surroundings, files_of
from solotune.diagnosis.sources.trainer_logs import STATE
from solotune.regular_files import open_regular

NUM_FILES = 200
MAX_CONSOLES = 5
"""Console logs beside the folder that are read."""


def steps_of(folder: Path, places: list[Path], around: Surroundings) -> tuple[StepLog | None, tuple[str, ...]]:
    """The logged steps of the run, the best there are; and the errors and warnings in its console logs."""
    file = first_with(places, STATE)
    logs = [log for log in (trainer_logs.read(file) if file else None,) if log is not None]
    logs += trainer_logs.find_logs(folder)
    if not any(log.num_steps for log in logs):
        card = model_card.read(beginning(first_with(places, "README.md")))
        logs += [log for log in (step_log.of_entries("card", folder / "README.md", card.entries),) if log is not None]
    log = step_log.best(logs)
    log = logs[0] if log is None and logs else log
    if log is not None and log.kind in ("jsonl", "wandb", "tensorboard", "mlflow"):
        log = replace(log, num_others=sum(other.kind == log.kind for other in logs) - 1)
    texts = [*_consoles(folder), *([log.text] if log is not None and log.kind == "wandb" else [])]
    if log is not None and log.kind == "state":
        texts += [beside.text for beside in _consoles_beside(around) if _is_same_run(beside, log)]
    return log, tuple(line for text in texts for line in _errors(text))


def steps_in(file: Path) -> tuple[StepLog | None, tuple[str, ...]]:
    """The logged steps of one log, and its errors if it is what a console showed."""
    log = trainer_logs.read(file)
    if not trainer_logs.is_console(file.name):
        return log, tuple(_errors(log.text)) if log is not None else ()
    text = log.text if log is not None else "\n".join(_ends([file]))
    return log, tuple(_errors(text))


def _consoles(folder: Path) -> list[str]:
    """The ends of the log files of the folder."""
    return _ends([path for path in files_of(folder) if trainer_logs.is_console(path.name)][:NUM_FILES])


def _ends(files: list[Path]) -> list[str]:
    """The last LOG_BYTES of each file."""
    found = []
    for path in files:
        with contextlib.suppress(OSError), open_regular(path) as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES))
            found.append(file.read(LOG_BYTES).decode("utf-8", "replace"))
    return found


def _consoles_beside(around: Surroundings) -> list[StepLog]:
    """The console logs next to the folder."""
    files = [path for path in files_of(around.folder.parent) if trainer_logs.is_console(path.name)]
    files = [path for path in files if path.stat().st_size <= trainer_logs.MAX_LOG_BYTES][:MAX_CONSOLES]
    return [log for log in map(trainer_logs.of_console_or_none, files) if log is not None]


def _is_same_run(console: StepLog, log: StepLog) -> bool:
    """Whether a console shows the losses of this run: three of them one after another, to the digits shown."""
    shown = [f"{entry['loss']:.3g}" for entry in console.entries if "loss" in entry]
    first = [f"{loss:.3g}" for entry in log.entries[:3] if (loss := number(entry.get("loss"))) is not None]
    return len(first) == 3 and any(shown[i : i + 3] == first for i in range(len(shown) - 2))


_TOLD = re.compile(r"error|warning|warn\(|unrecognized arguments|recompile|trainable params: 0\b", re.IGNORECASE)
"""Of the lines of a console, those that tell of a fault."""


def _errors(text: str) -> list[str]:
    """Tracebacks, errors and warnings in a console's text."""
    place = text.rfind("Traceback (most recent call last)")
    found = [text[place : place + LOG_BYTES]] if place >= 0 else []
    return found + [line for line in text.splitlines() if _TOLD.search(line)][-50:]
