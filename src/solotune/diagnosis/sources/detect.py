"""Recognize the target of `solotune diagnose`: a config, a run of solotune, or a folder of another trainer.

solotune.yaml, or a dict        before the run
runs/demo                       during or after it; crashed, unfinished, resumed
output/, output/checkpoint-50   written by Hugging Face's Trainer, PEFT and tools on top of them
project/                        with one such folder in it
mlruns/, wandb/, runs/          logs alone, also in a file: trainer_log.jsonl, nohup.out
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from solotune.config.load import load_config
from solotune.config.run_config import RunConfig
from solotune.diagnosis.evidence import of_refusal
from solotune.diagnosis.run_facts import RunFacts, Settings
from solotune.diagnosis.sources import hf_trainer, not_a_run, solotune_run, trainer_logs
from solotune.errors import InputError
from solotune.run.run_dir import RunDirectory, list_runs

FOREIGN_MARKS = ("trainer_state.json", "training_args.bin", "adapter_config.json", "adapter_model.safetensors")


def run_facts_of(
    target: str | Path | Mapping[str, Any] | RunConfig,
    overrides: Iterable[str] = (),
    config: str | Path | None = None,
    dataset: str | None = None,
    base: str | None = None,
) -> RunFacts:
    """All facts on the target.

    Args:
        overrides: `key=value`, for a config.
        config: the config used for training; only for folders of other tools.
        dataset: the training data; only for folders of other tools.
        base: the base model; only for folders of other tools, whose own names are not opened.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(target, (Mapping, RunConfig)):
        _refuse(config, dataset, base, "a config")
        return _of_config(target, overrides)
    path = Path(os.path.expanduser(target))
    if not path.is_dir():
        if not path.exists():
            raise _unknown(target)
        if trainer_logs.is_console(path.name) or (trainer_logs.is_log(path.name) and trainer_logs.read(path)):
            return hf_trainer.from_folder(path.parent, config=config, dataset=dataset, base=base, log_file=path)
        if (error := not_a_run.of_file(path)) is not None:
            raise error
        _refuse(config, dataset, base, "a config")
        return _of_config(target, overrides)
    if is_run(path):
        _refuse(config, dataset, base, "a run of solotune")
        return solotune_run.from_run(path)
    if is_foreign(path):
        return hf_trainer.from_folder(path, config=config, dataset=dataset, base=base)
    runs = not_a_run.runs_in(path, lambda inner: is_run(inner) or has_marks(inner))
    if len(runs) == 1 and not is_run(runs[0]):
        return hf_trainer.from_folder(runs[0], config=config, dataset=dataset, base=base)
    if not runs and trainer_logs.find_logs(path):
        return hf_trainer.from_folder(path, config=config, dataset=dataset, base=base)
    raise not_a_run.of_folder(path, runs or [run.path for run in list_runs(path)])


def is_foreign(folder: Path) -> bool:
    """Whether another trainer wrote this folder: its files, those of a checkpoint, or a log in the folder itself."""
    return has_marks(folder) or bool(trainer_logs.find_logs(folder, 0))


def has_marks(folder: Path) -> bool:
    """Whether files of a trainer lie in the folder or in its checkpoints."""
    marks = (pattern for mark in FOREIGN_MARKS for pattern in (mark, f"checkpoint-*/{mark}"))
    return any(next(folder.glob(pattern), None) for pattern in marks)


def _of_config(target: str | Path | Mapping[str, Any] | RunConfig, overrides: Iterable[str]) -> RunFacts:
    """The facts on a config; if a value is refused that is a fault of the catalogue, only that fault."""
    try:
        config = load_config(target, overrides)
    except InputError as error:
        if error.fault is None:
            raise
        name = Path(target).stem if isinstance(target, (str, Path)) else "run"
        missing = {"train": "the config is refused", "live": "the config is refused"}
        return RunFacts(name, Settings({"tool": "solotune"}), refusals=of_refusal(error), missing=missing)
    return solotune_run.of_config(config)


def is_run(folder: Path) -> bool:
    """Whether this is a run of solotune, and not a folder of another tool with a file named config.yaml."""
    return (folder / "config.yaml").is_file() and any(
        (folder / name).exists() for name in ("metrics.jsonl", "environment.json", "data.json", "plan.json", "log.txt")
    )


def open_run(target: object) -> RunDirectory | None:
    """The run directory to write diagnosis.json into; None if the target is not a run of solotune."""
    if not isinstance(target, (str, Path)) or not is_run(Path(os.path.expanduser(target))):
        return None
    return RunDirectory.open(target)


def _refuse(config: object, dataset: object, base: object, what: str) -> None:
    for option, value in (("--config", config), ("--dataset", dataset), ("--base", base)):
        if value is not None:
            raise InputError(
                f"{option} is only for folders of other trainers; {what} already names its own",
                seen=value,
                change=f"remove {option}",
            )


def _unknown(target: str | Path) -> InputError:
    known = ", ".join(str(run.path) for run in list_runs()[-3:])
    return InputError(
        f"{target}: no such file or folder",
        seen=f"looked in {Path.cwd()}",
        allowed="a config file, a run directory, or a folder of another trainer",
        change=f"latest runs: {known}" if known else None,
    )
