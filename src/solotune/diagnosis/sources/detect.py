"""Recognize the target of `solotune diagnose`: a config, a run of solotune, or a folder of another trainer.

solotune.yaml, or a dict        before the run
runs/demo                       during or after it; crashed, unfinished, resumed
output/, output/checkpoint-50   written by Hugging Face's Trainer, PEFT and tools on top of them
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
from solotune.diagnosis.sources import hf_trainer, solotune_run
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
    if isinstance(target, (Mapping, RunConfig)) or not Path(os.path.expanduser(target)).is_dir():
        _refuse(config, dataset, base, "a config")
        if isinstance(target, (str, Path)) and not Path(os.path.expanduser(target)).exists():
            raise _unknown(target)
        return _of_config(target, overrides)
    folder = Path(os.path.expanduser(target))
    if is_run(folder):
        _refuse(config, dataset, base, "a run of solotune")
        return solotune_run.from_run(folder)
    if any(next(folder.glob(pattern), None) for mark in FOREIGN_MARKS for pattern in (mark, f"checkpoint-*/{mark}")):
        return hf_trainer.from_folder(folder, config=config, dataset=dataset, base=base)
    inner = list_runs(folder)
    raise InputError(
        f"{folder} is not a run, a config or a trainer's output folder",
        seen=", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "an empty folder",
        allowed=f"a config file, a run directory (config.yaml), or a trainer's folder ({', '.join(FOREIGN_MARKS)})",
        change=f"solotune diagnose {inner[-1].path}" if inner else None,
    )


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
