"""May this checkpoint be continued, and where does its run live?

A resumed run must be the run it would have been: same training rows, same values of every key that can change what is
learned. A difference is named and refused instead of giving a curve with an unexplained kink.
"""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path
from typing import Any

from solotune import checkpoint
from solotune.checkpoint import Checkpoint
from solotune.config import RunConfig, section_of
from solotune.dataset import Prepared
from solotune.errors import IntegrityError
from solotune.record import RunDirectory, latest_run_of, read_json

# Changing one of these between a checkpoint and its resumption cannot change what is learned.
FREE_TO_CHANGE = {
    *(key for key in RunConfig.model_fields if section_of(key) in ("run", "evaluation")),
    "gradient_checkpointing",
    "activation_offload",
    "memory_budget",
    "preflight",
    "base_residency",
}


def open_run(config: RunConfig, prepared: Prepared, resume: bool) -> tuple[RunDirectory, Checkpoint | None]:
    """The run's directory, made or taken over and locked, and the checkpoint to start from.

    Raises:
        DirectoryInUseError: another process or another run has the directory.
        IntegrityError: config or training rows are not those of the checkpoint.
    """
    explicit = Path(os.path.expanduser(config.resume_from_checkpoint)) if config.resume_from_checkpoint else None
    if resume and config.output_dir is None and explicit is None and (latest := latest_run_of(config)):
        config = config.replaced("newest run of this config", output_dir=str(latest.path))
    run = RunDirectory.create(config, resume=resume)
    try:
        folder = explicit or (checkpoint.newest(run.checkpoints) if resume else None)
        start = checkpoint.load(folder) if folder else None
        if start is not None:
            _check_unchanged(start.state["fingerprints"], fingerprints(config, prepared), str(folder))
        if resume:
            run.forget_after(start.step if start else -1)
    except BaseException:
        run.release()
        raise
    return run, start


def recorded_day(config: RunConfig, resume: bool) -> date | None:
    """The date that the run to continue was rendered on; None where none is continued."""
    if config.resume_from_checkpoint:
        return day_of(Path(config.resume_from_checkpoint).expanduser().parents[1])  # RUN/checkpoints/step-000050
    if not resume:
        return None
    run = RunDirectory(Path(config.output_dir).expanduser()) if config.output_dir else latest_run_of(config)
    return day_of(run.path) if run else None


def day_of(run: Path) -> date | None:
    """The date that the rows of a run were rendered on; None where it is not recorded.

    Raises:
        IntegrityError: data.json holds something else in its place.
    """
    path = run / "data.json"
    written = read_json(path).get("rendered_on") if path.is_file() else None
    try:
        return date.fromisoformat(written) if written else None
    except (TypeError, ValueError):
        raise IntegrityError(f"{path}: rendered_on is not a date", seen=written, allowed="2026-01-31") from None


def fingerprints(config: RunConfig, prepared: Prepared) -> dict[str, Any]:
    """What must be the same for a resumed run to be the same run."""
    fixed = {key: value for key, value in config.model_dump().items() if key not in FREE_TO_CHANGE}
    return {"config": fixed, "train_rows": prepared.report.to_json()["sha256"]["train"]}


def _check_unchanged(then: dict[str, Any], now: dict[str, Any], where: str) -> None:
    for key, value in now["config"].items():
        if then["config"].get(key) != value:
            raise IntegrityError(
                f"{where}: {key} has changed since this checkpoint, so the run would not be the same",
                seen=f"{key}: {value}",
                allowed=f"{key}: {then['config'].get(key)}",
                change="put it back, or start a new run",
            )
    if then["train_rows"] != now["train_rows"]:
        raise IntegrityError(
            f"{where}: the training rows have changed since this checkpoint",
            change="put the data back, or start a new run",
        )
