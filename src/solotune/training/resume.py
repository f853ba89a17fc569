"""Resume a run: find the checkpoint, check that config, base and rows are the same, take over the run directory.

A resumed run must be the run that it would have been: same base, same training rows, same values of every key that can
change the weights. Each key has one of three classes (`CLASSES`):

    frozen    a change is refused with the key's name, instead of giving a loss curve with an unexplained kink
    inexact   the same run except for rounding (and dropout masks, if the batch is split differently): it continues,
              with a note
    free      cannot change a loss: saving, evaluating, printing, budgets. Keys that say where base and rows come from
              are free too, since both are compared by content: a moved folder or a new file date is the same run, and
              a changed byte in a training row is refused, whichever key it came through

Software and device are recorded as well. Another torch or GPU is inexact. Another bitsandbytes is refused if the
optimizer's state is one of bitsandbytes' own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from solotune.config.describe import section_of
from solotune.config.run_config import Choice, RunConfig
from solotune.config.settings import MICRO_BATCH
from solotune.dataset import Prepared
from solotune.errors import InputError, IntegrityError
from solotune.hardware.machine import Machine, device_of
from solotune.hub.model_files import ModelFiles
from solotune.model.adapter import adapter_tensors
from solotune.model.base_fingerprint import base_fingerprint, check_base
from solotune.run.atomic_io import remove_folder, rename
from solotune.run.events import SaveEvent
from solotune.run.manifest import check_folder
from solotune.run.record import RunRecord
from solotune.run.run_dir import FINGERPRINTS, MARKS, UNUSED, RunDirectory, read_object
from solotune.training import checkpoint
from solotune.training.checkpoint import Checkpoint
from solotune.training.find_run import planned_micro_batch, refuse_other_config, rows_per_step, run_of_config

Class = Literal["frozen", "inexact", "free"]

_FREE_SECTIONS = ("run", "evaluation")
COMPARED_BY_CONTENT = {
    "model_name_or_path", "model_revision", "dataset", "dataset_config", "dataset_revision", "dataset_split",
    "eval_dataset", "eval_dataset_split", "validation_size", "split_by", "column_mapping", "on_bad_row",
    "chat_template_path", "overflow", "assistant_only_loss", "train_on_last_turn",
}  # fmt: skip
_SAME_BITS = {"preflight", "base_offload", "base_sharding", "activation_offload"}  # same kernels on the same numbers
_INEXACT = {  # and the keys of MICRO_BATCH, if their product is the same
    "gradient_checkpointing", "base_residency", "torch_compile", "cuda_graphs",
    "attn_implementation", "use_cpu",
}  # fmt: skip


def class_of(key: str) -> Class:
    """The class of a config key: what happens if it changes between checkpoint and resume."""
    if key in _INEXACT:
        return "inexact"
    if key in COMPARED_BY_CONTENT or section_of(key) in _FREE_SECTIONS or key in _SAME_BITS:
        return "free"
    return "frozen"


CLASSES: dict[str, Class] = {key: class_of(key) for key in RunConfig.model_fields}


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint from which a resumed run continues."""

    point: Checkpoint
    inexact: list[str] = field(default_factory=list)
    """Why its losses may differ from those of a run without interruption, by rounding."""
    passed_over: list[str] = field(default_factory=list)
    """Newer checkpoints that cannot be used, each with its reason."""

    def in_words(self) -> list[str]:
        """For the log."""
        lines = [f"skipped {line}" for line in self.passed_over]
        how = f"results may differ slightly: {'; '.join(self.inexact)}" if self.inexact else "nothing has changed"
        return [*lines, f"continuing after step {self.point.step}; {how}"]


def open_run(config: RunConfig, now: dict[str, Any], resume: bool) -> tuple[RunDirectory, ResumePoint | None]:
    """Create or take over the run's directory, lock it, and find the checkpoint to continue from.

    Args:
        now: the `fingerprints` of this run.

    Raises:
        DirectoryInUseError: another process or another run has the directory.
        IntegrityError: config, base or training rows are not those of the checkpoint, or no checkpoint is valid.
    """
    explicit = _folder(config.resume_from_checkpoint) if config.resume_from_checkpoint else None
    run = RunDirectory.create(config.output_dir, config.name, resume=resume)
    try:
        if resume and explicit is not None and explicit.resolve().parent != run.checkpoints.resolve():
            raise InputError(
                f"resume_from_checkpoint: {explicit} belongs to another run than {run.path}, which --resume continues",
                change="use another output_dir without --resume, or --resume without resume_from_checkpoint",
            )
        point, passed_over = None, []
        if explicit is not None:
            point = _given(explicit)
        elif resume:
            point, passed_over = _newest(run)
        start = None
        if point is not None:
            where = str(explicit or run.path)
            start = ResumePoint(point, compare(point.state.get("fingerprints"), now, where), passed_over)
        elif resume:
            refuse_other_config(run.path, config)
        if resume:
            _take_over(run, point)
            if point is not None:  # the run may have been killed before it removed old checkpoints
                checkpoint.keep_newest(run.checkpoints, config.save_total_limit, point.step)
    except BaseException:
        run.release()
        raise
    return run, start


def run_to_continue(config: RunConfig) -> RunConfig:
    """The config with the `output_dir` that `--resume` continues, if it names none: that of its newest run.

    Raises:
        IntegrityError: there are only runs of this name with other values.
    """
    if config.output_dir is not None or config.resume_from_checkpoint is not None:
        return config
    run = run_of_config(config)
    return config if run is None else config.replaced("newest run of this config", output_dir=str(run.path))


def which_run(config: RunConfig) -> str:
    """Which run `--resume` continues, in words, for a config of `run_to_continue`."""
    if config.resume_from_checkpoint is not None:
        return f"--resume: continuing from {config.resume_from_checkpoint}"
    if config.output_dir is None:
        return (
            f"--resume: there is no run of this config ({config.name}) in {Path('runs').absolute()}; a new run begins"
        )
    path = Path(os.path.expanduser(config.output_dir))
    if not any((path / mark).exists() for mark in MARKS):
        return f"--resume: there is no run in {path}; a new run begins"
    return f"--resume: continuing the run {path}"


def check_given(from_checkpoint: str | None) -> None:
    """Check `resume_from_checkpoint` before anything else is done.

    Raises:
        InputError: it is not a checkpoint folder.
    """
    if from_checkpoint is not None and not (_folder(from_checkpoint) / "state.json").is_file():
        folder = _folder(from_checkpoint)
        missing = "no state.json in it" if folder.is_dir() else f"no such folder; looked in {Path.cwd()}"
        raise InputError(
            f"resume_from_checkpoint: {from_checkpoint} is not a checkpoint",
            seen=missing,
            allowed="RUN/checkpoints/step-000050",
        )


def _folder(from_checkpoint: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(from_checkpoint)))


def _given(folder: Path) -> Checkpoint:
    check_given(str(folder))
    if problem := checkpoint.invalid_reason(folder):
        raise IntegrityError(f"{folder}: {problem}", change="use another checkpoint")
    return checkpoint.load(folder)


def _newest(run: RunDirectory) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that can be used, and the newer ones with what is wrong with each."""

    def objection(path: Path) -> str | None:
        return run.metrics_mismatch(checkpoint.read_state(path).get("metrics"))

    passed_over = []
    for path, problem in checkpoint.newest_first(run.checkpoints, objection):
        if problem is None:
            return checkpoint.load(path), passed_over
        passed_over.append(f"{path.name}: {problem}")
    if passed_over:
        raise IntegrityError(
            f"{run.path}: none of its checkpoints can be used",
            seen="; ".join(passed_over),
            change="remove the folder and start a new run",
        )
    return _finished(run), []


def _finished(run: RunDirectory) -> Checkpoint | None:
    """The end of a finished run without checkpoints (`save_strategy: no`): its adapter, with no step left."""
    end = RunRecord.read(run.path).end
    if end is None or check_folder(run.adapter):
        return None
    before = {"bytes": end.offset}
    state = {"fingerprints": read_object(run.path / FINGERPRINTS), "optimizer": {}, "metrics": before, "is_over": True}
    return Checkpoint(end.event.step, adapter_tensors(run.adapter), {}, {}, state)


def _take_over(run: RunDirectory, point: Checkpoint | None) -> None:
    """Restore the directory to when `point` was saved; newer checkpoints are kept under names that nothing reads."""
    kept = None
    for step, path in checkpoint.list_checkpoints(run.checkpoints):
        if point is not None and step == point.step:
            kept = path
        elif point is None or step > point.step:
            unused = path.with_name(path.name + UNUSED)
            if unused.exists():
                remove_folder(unused)
            rename(path, unused.name)
    run.truncate_metrics(point.state["metrics"] if point else None)
    if kept is not None and point is not None:
        run.log(SaveEvent(point.step, kept.name))  # this line came after the recorded length of metrics.jsonl


def keep_micro_batch(config: RunConfig, run: RunDirectory | None) -> tuple[RunConfig, list[Choice]]:
    """The config with the micro-batch that the plan of the run to continue chose: another one would round otherwise.

    Args:
        run: the run that `--resume` continues; that of `resume_from_checkpoint` comes before it.
    """
    given = config.resume_from_checkpoint
    folder = _folder(given).parent.parent if given else run.path if run else None
    sizes = planned_micro_batch(RunRecord(folder, ())) if folder and config.memory.micro_batch_is_open else {}
    if not sizes or rows_per_step(sizes) != rows_per_step(config.model_dump()):
        return config, []
    choices = [Choice(key, size, "the run that is continued was planned so") for key, size in sizes.items()]
    return config.replaced("plan", **sizes), choices


def recorded_day(from_checkpoint: str | None, run: RunDirectory | None) -> date | None:
    """The date on which the rows of the run to continue were rendered; None for a new run.

    Args:
        from_checkpoint: `resume_from_checkpoint`; its run comes before `run`.
        run: the run that `--resume` continues.
    """
    if from_checkpoint:
        return day_of(_folder(from_checkpoint).parent.parent)  # RUN/checkpoints/step-000050
    return day_of(run.path) if run else None


def continued(output_dir: str | None) -> RunDirectory | None:
    """The run that `--resume` continues: that of `output_dir`, which `run_to_continue` has set; None for a new run."""
    return RunDirectory(Path(os.path.expanduser(output_dir))) if output_dir else None


def day_of(run: Path) -> date | None:
    """The date on which the rows of a run were rendered; None if it is not recorded.

    Raises:
        IntegrityError: `rendered_on` in data.json is not a date.
    """
    path = run / "data.json"
    written = read_object(path).get("rendered_on") if os.path.lexists(path) else None
    try:
        return date.fromisoformat(written) if written else None
    except (TypeError, ValueError):
        raise IntegrityError(f"{path}: rendered_on is not a date", seen=written, allowed="2026-01-31") from None


def fingerprints(config: RunConfig, prepared: Prepared, machine: Machine, model_files: ModelFiles) -> dict[str, Any]:
    """What must be equal for a resumed run to be the same run, and what determines its rounding."""
    on_gpu = device_of(machine, use_cpu=config.use_cpu) == "cuda"
    rows = prepared.report.to_json()["sha256"]
    kept = {key: value for key, value in config.model_dump().items() if CLASSES[key] != "free"}
    return {
        "config": kept,
        "world_size": config.ranks,
        "base": base_fingerprint(model_files),
        "train_rows": rows["train"],
        "validation_rows": rows["validation"],
        "software": {name: _version(name) for name in ("torch", "transformers", "bitsandbytes")},
        "device": f"{machine.gpu}, driver {machine.driver}" if on_gpu else _cpu(machine),
    }


def _check_recorded(then: Any, where: str) -> None:
    """Check the types of recorded `fingerprints`.

    Raises:
        IntegrityError: a part is missing, or of another type.
    """
    wanted = {"config": dict, "base": dict, "software": dict, "train_rows": str, "validation_rows": str, "device": str}
    for key, kind in wanted.items():
        if not isinstance(then, dict) or not isinstance(then.get(key), kind):
            raise IntegrityError(
                f"{where}: what the run recorded of itself is damaged ({key})", change="start a new run"
            )


def compare(then: Any, now: dict[str, Any], where: str) -> list[str]:
    """Compare two `fingerprints`: the reasons why continuing is not exact; empty if it is exact.

    Args:
        then: as the checkpoint recorded it; its types are checked.
        where: the checkpoint or run, for messages.

    Raises:
        IntegrityError: it would be a different run.
    """
    _check_recorded(then, where)
    old, new = then["config"], now["config"]
    changed = [key for key, value in new.items() if old.get(key) != value]
    had, ranks = then.get("world_size", 1), now["world_size"]
    _check_rows_of_step(rows_per_step(old, had), new, ranks, had, where)
    if set(changed) & set(MICRO_BATCH) and rows_per_step(old, had) == rows_per_step(new, ranks):
        inexact = [key for key in changed if CLASSES[key] == "inexact" or key in MICRO_BATCH]
    else:
        inexact = [key for key in changed if CLASSES[key] == "inexact"]
    for key in changed:
        if key not in inexact:
            raise IntegrityError(
                f"{where}: {key} has changed since this checkpoint, so the run would not be the same",
                seen=f"{key}: {new[key]}",
                allowed=f"{key}: {old.get(key)}",
                change="set it back, or start a new run",
            )
    if then["train_rows"] != now["train_rows"]:
        raise IntegrityError(
            f"{where}: the training rows have changed since this checkpoint",
            change="restore the data, or start a new run",
        )
    check_base(then["base"], now["base"], where)
    ours, theirs = now["software"]["bitsandbytes"], then["software"]["bitsandbytes"]
    if new["optim"] != "adamw_torch" and ours != theirs:
        raise IntegrityError(
            f"{where}: the optimizer's state was written by another version of bitsandbytes",
            seen=ours, allowed=theirs, change=f"pip install bitsandbytes=={theirs}, or start a new run",
        )  # fmt: skip
    reasons = [f"{key} was {old.get(key)}, is {new[key]}" for key in inexact]
    if had != ranks:
        reasons.append(f"the number of ranks was {had}, is {ranks}: sums are rounded in another order")
    pairs = [(name, then["software"].get(name), has) for name, has in now["software"].items()]
    reasons += [f"{name} was {had}, is {has}" for name, had, has in [*pairs, ("device", then["device"], now["device"])]
                if had != has]  # fmt: skip
    if then["validation_rows"] != now["validation_rows"]:
        reasons.append("the held-out rows have changed, so held-out losses are not comparable")
    return reasons


def _check_rows_of_step(then: int | None, new: dict[str, Any], ranks: int, had: int, where: str) -> None:
    """Raises:
    IntegrityError: on another number of ranks, a step would have other rows, and the rest of the epoch too.
    """
    if had == ranks or then == rows_per_step(new, ranks):
        return
    micro = new["per_device_train_batch_size"] * ranks
    fits = then is not None and then % micro == 0
    raise IntegrityError(
        f"{where}: it was trained on {had} ranks, so a step of {ranks} has other rows than before",
        seen=f"{rows_per_step(new, ranks)} rows in a step: per_device_train_batch_size x gradient_accumulation_steps "
        f"x {ranks} ranks",
        allowed=f"{then} rows in a step",
        change=(f"gradient_accumulation_steps: {then // micro}" if then is not None and fits else
                f"settings of these two that make {then} rows") + f", or continue on {had} ranks",
    )  # fmt: skip


def _cpu(machine: Machine) -> str:
    """What determines the rounding of sums on a CPU."""
    return f"{machine.cpu}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
