"""What precedes the first step of a run: the stages that may refuse it, and what is recorded of it.

check, read_data, plan, load_model, try_largest_step     called by `train.prepare_run`, which writes nothing
write_initial_files                                      config, machine, plan, rows, split, into the run directory
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solotune import dataset
from solotune.config.run_config import Choice, RunConfig
from solotune.dataset import packing, sampler
from solotune.diagnosis.data_checks import check_rows
from solotune.errors import InputError
from solotune.hardware import doctor
from solotune.hardware.gpu_errors import device_errors
from solotune.hub.model_files import ModelFiles, resolve_model
from solotune.model import frozen_linear, lora
from solotune.model import loading as models
from solotune.planning import plan_inputs
from solotune.run.atomic_io import write_whole
from solotune.run.events import PreflightEvent, ResumeEvent, StartEvent
from solotune.run.output_dir import check_destination
from solotune.run.run_dir import FINGERPRINTS, RunDirectory, nearest_folder
from solotune.runtime import watchdog
from solotune.training import checkpoint, disk_space, preflight, trained_run
from solotune.training import resume as resuming
from solotune.units import format_duration, gib
from solotune.version import __version__

if TYPE_CHECKING:
    from solotune.dataset import Prepared
    from solotune.diagnosis.findings import Finding
    from solotune.diagnosis.run_facts import RunFacts
    from solotune.display.observer import RunObserver
    from solotune.hardware.machine import Machine
    from solotune.model.loading import TrainableModel
    from solotune.planning.planner import Plan
    from solotune.training.preflight import Preflight
    from solotune.training.resume import ResumePoint


@dataclass(frozen=True)
class PreparedRun:
    """A run that passed every check, and of which nothing is written yet."""

    config: RunConfig  # settled for the machine and by the plan
    machine: Machine
    choices: list[Choice]
    model_files: ModelFiles
    tokenizer: Any
    prepared: Prepared
    planned: Plan
    model: TrainableModel
    tried: Preflight | None
    run_facts: RunFacts  # what can be diagnosed before the first step

    def plan_json(self) -> dict[str, Any]:
        return {"predicted": self.planned.to_json(), "preflight": self.tried and asdict(self.tried)}


def check(checked: RunConfig, machine: Machine, resume: bool) -> ModelFiles:
    """The files of the model, after all checks that need no data: machine, run directory, its disk, model folder.

    Raises:
        SolotuneError: one of them refuses the run.
    """
    doctor.require_hardware(checked, machine)
    check_destination(checked.output_dir, checked.source_of("output_dir"), checked.model_name_or_path)
    if not resume:
        RunDirectory.refuse_occupied(checked.output_dir)
    disk_space.require_writable(_folder_of(checked))
    model_files = resolve_model(checked)
    models.check_model(checked, model_files)
    return model_files


def read_data(
    checked: RunConfig, model_files: ModelFiles, resume: bool, display: RunObserver
) -> tuple[Any, Prepared, list[Finding]]:
    """The tokenizer, the rows as examples, and what the rules find in them, which is shown.

    Raises:
        InputError: no tokenizer, rows that cannot be used, or ids beyond the embedding (F05).
    """
    tokenizer = dataset.load_tokenizer(checked, model_files)
    display.phase("reading data")
    run = resuming.continued(checked.output_dir, checked.name) if resume else None
    day = resuming.recorded_day(checked.resume_from_checkpoint, run)
    prepared = dataset.prepare(checked, tokenizer, progress=display.progress, rendered_on=day)
    findings = check_rows(checked, tokenizer, prepared, model_files)
    prepared = prepared.with_findings(finding.to_json() for finding in findings)
    for finding in findings:
        display.note(f"{finding.severity} {finding.code} {finding.slug}: {finding.message}")
        if finding.code == "F05":  # no opinion: its lookup would fail, on a GPU without a word of what is wrong
            raise InputError(finding.message, change=finding.fix, fault="F05")
    return tokenizer, prepared, findings


def plan(
    checked: RunConfig, model_files: ModelFiles, machine: Machine, prepared: Prepared, display: RunObserver
) -> Plan:
    """The plan of a run that fits; `resolved` is the config with what it chose.

    Raises:
        CheckError: it does not fit.
    """
    display.phase("planning")
    planned = plan_inputs.plan_for(checked, machine, prepared, model_files=model_files)
    if not planned.fits:
        raise planned.refusal()
    watchdog.expect(planned.option.seconds.first_step)
    return planned


def load_model(
    checked: RunConfig,
    model_files: ModelFiles,
    machine: Machine,
    tokenizer: Any,
    prepared: Prepared,
    resume: bool,
    display: RunObserver,
) -> TrainableModel:
    """The base with fresh adapters, where the disk has room for what the run will write.

    Raises:
        SolotuneError: the model does not load, or there is no room.
    """
    display.phase("loading model")
    model, folder = trained_run.load_base(checked, machine, model_files.with_weights()), _folder_of(checked)
    before = resuming.continued(checked.output_dir, checked.name) if resume else None
    existing = len(checkpoint.list_checkpoints(before.checkpoints)) if before else 0
    disk_space.require_room(
        disk_space.need_of(checked, model, prepared, tokenizer, existing, disk_space.block_bytes(folder)), folder
    )
    return model


def try_largest_step(
    checked: RunConfig, model: TrainableModel, prepared: Prepared, display: RunObserver
) -> Preflight | None:
    """What the largest step took; None where it is not tried.

    Raises:
        SolotuneError: it fails.
    """
    if checked.preflight is True or (checked.preflight == "auto" and model.device.type == "cuda"):
        display.phase("trying the largest step")
        with device_errors(checked.memory):
            return preflight.preflight(model, prepared.train, prepared.validation, checked, _folder_of(checked))
    return None


def _folder_of(config: RunConfig) -> Path:
    """The nearest folder above the run directory that is there."""
    return nearest_folder(config.output_dir or "runs")


def write_initial_files(
    run: RunDirectory, ready: PreparedRun, marks: Mapping[str, Any], start: ResumePoint | None, display: RunObserver
) -> dict[str, Any]:
    """Writes what is known before the first step, and says it; the run's summary."""
    report = ready.prepared.report
    run.write_config(ready.config)
    made_by = {"solotune": __version__, "choices": [choice._asdict() for choice in ready.choices]}
    run.write_json("environment.json", {**ready.machine.to_json(), **made_by})
    run.write_json(FINGERPRINTS, marks)
    run.write_json("plan.json", ready.plan_json())
    run.write_json("data.json", report.to_json())
    write_whole(run.path / "split.json", ready.prepared.manifest.json_lines())
    summary = _summary(ready.model, ready.config, ready.prepared)
    display.note(_in_words(summary))
    if report.packing:
        display.note(f"packing: {packing.in_words(report.packing)}")
    display.note(_planned_in_words(ready.planned))
    if start is None:
        run.log(StartEvent(step=0, **summary))
    else:
        run.log(ResumeEvent(start.point.step, not start.inexact, start.inexact, start.passed_over))
        for line in start.in_words():
            display.note(line)
    if ready.tried:
        display.note(ready.tried.in_words(ready.planned.option.footprint.peak_bytes))
        run.log(PreflightEvent(**asdict(ready.tried)))
    return summary


def _summary(model: TrainableModel, config: RunConfig, prepared: Prepared) -> dict[str, Any]:
    trainable, parameters = model.num_trainable, model.num_parameters
    own = (config.lora_r, lora.leaf_names(model.lora_layers))
    others = lora.matching_lora_shapes(trainable, model.linear_shapes(), {*lora.USUAL_RANKS, config.lora_r})
    fits = [own, *(fit for fit in others if fit != own)]
    sequences = sampler.pack_sequences(config.batches, prepared.train)
    return {
        "total_steps": sampler.BatchSampler.of(config.batches, len(sequences)).total_steps,
        "train_rows": len(prepared.train),
        "train_sequences": len(sequences),
        "packing_fill": prepared.report.packing["fill"] if prepared.report.packing else None,
        "validation_rows": len(prepared.validation),
        "trainable_parameters": trainable,
        "parameters": parameters,
        "trainable_fits": [{"r": r, "target_modules": names} for r, names in fits],
        "base_bytes": frozen_linear.stored_bytes(model.module),
        "device": model.device.type,
    }


def _in_words(summary: dict[str, Any]) -> str:
    """The parameter count, and what else would print the same count."""
    trainable, parameters = summary["trainable_parameters"], summary["parameters"]
    own, *others = (f"r={fit['r']} on {', '.join(fit['target_modules'])}" for fit in summary["trainable_fits"])
    text = f"{trainable:,} of {parameters:,} parameters are trained ({trainable / parameters:.2%}): {own}"
    return text + (f" (the count alone would also fit {'; '.join(others)})" if others else "")


def _planned_in_words(planned: Plan) -> str:
    """What is expected of the run, in a line."""
    took, peak = planned.option.seconds, planned.option.footprint.peak_bytes
    text = f"plan: {gib(peak)} GiB at the peak (budget {gib(planned.budget.bytes)} GiB), {took.step:.3g} s a step"
    return text + (f", {format_duration(took.total)} in all" if took.total is not None else "")
