"""Stages before the first step of a run: checks that may refuse it, then the run's initial files.

check, read_data, plan, stop_before_harm, load_model, try_largest_step     called by `train.prepare_run`
write_initial_files     the first that writes: config, machine, plan, data report and split
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solotune import dataset
from solotune.api.evaluate import check_metrics
from solotune.config.run_config import Choice, RunConfig
from solotune.config.write import to_yaml
from solotune.dataset import packing, sampler
from solotune.diagnosis import certain_faults
from solotune.diagnosis.data_checks import check_rows
from solotune.diagnosis.rules import GrowingRun
from solotune.errors import InputError
from solotune.hardware import doctor
from solotune.hardware.gpu_errors import device_errors
from solotune.hub.model_files import ModelFiles, resolve_model
from solotune.model import empty_model, frozen_linear, lora
from solotune.planning import plan_inputs
from solotune.planning.peak_memory import PHASES
from solotune.run.atomic_io import write_whole
from solotune.run.events import PreflightEvent, ResumeEvent, StartEvent
from solotune.run.output_dir import check_destination
from solotune.run.record import RunRecord
from solotune.run.run_dir import FINGERPRINTS, RunDirectory, nearest_folder
from solotune.runtime import watchdog
from solotune.runtime.world import ALONE, World
from solotune.trackers.libraries import require as require_trackers
from solotune.training import checkpoint, disk_space, preflight, trained_run
from solotune.training import resume as resuming
from solotune.training.find_run import CONFIG_NAME, recorded_name
from solotune.units import format_bytes, format_duration, format_step_time
from solotune.version import __version__

if TYPE_CHECKING:
    from solotune.dataset import Prepared
    from solotune.diagnosis.findings import Finding
    from solotune.diagnosis.run_facts import RunFacts
    from solotune.display.observer import RunObserver
    from solotune.hardware.machine import Machine
    from solotune.model.loading import TrainableModel
    from solotune.planning.plan import Plan
    from solotune.training.preflight import Preflight
    from solotune.training.resume import ResumePoint


@dataclass(frozen=True)
class PreparedRun:
    """A run that passed every check; nothing is written yet."""

    config: RunConfig  # resolved for the machine and by the plan
    machine: Machine
    choices: list[Choice]  # settings that solotune chose, and why
    model_files: ModelFiles
    tokenizer: Any
    prepared: Prepared  # training and held-out rows
    plan: Plan
    model: TrainableModel
    preflight: Preflight | None  # measurements of the largest step; None if it was not tried
    fingerprints: dict[str, Any]  # of config, rows and base: see `resume.fingerprints`
    run_facts: RunFacts  # for the diagnosis during the run
    rules: GrowingRun  # the rules on `run_facts`, asked once before the first step

    def plan_json(self) -> dict[str, Any]:
        return {"predicted": self.plan.to_json(), "preflight": self.preflight and asdict(self.preflight)}


def check(config: RunConfig, machine: Machine, resume: bool, world: World = ALONE) -> ModelFiles:
    """Check machine, run directory, disk and model folder: everything that needs no data. Returns the model's files.

    Only rank 0 needs a run directory and trackers.

    Raises:
        SolotuneError: a check failed.
    """
    doctor.require_hardware(machine, base_precision=config.base_precision, optim=config.optim, use_cpu=config.use_cpu)
    if world.is_owner:
        resuming.check_given(config.resume_from_checkpoint)
        require_trackers(config.trackers)
        check_destination(config.output_dir, config.source_of("output_dir"), config.model_name_or_path)
        if not resume:
            RunDirectory.refuse_occupied(config.output_dir)
        disk_space.require_writable(_folder_of(config.output_dir))
    model_files = resolve_model(config)
    empty_model.check_model(config, model_files)
    return model_files


def rendering_day(config: RunConfig, resume: bool) -> str:
    """The date on which the rows of the run to continue were rendered (2026-01-31); that of today for a new run."""
    run = resuming.continued(config.output_dir) if resume else None
    day = resuming.recorded_day(config.resume_from_checkpoint, run)
    return (day or date.today()).isoformat()


def read_data(
    config: RunConfig, model_files: ModelFiles, day: str, display: RunObserver
) -> tuple[Any, Prepared, list[Finding]]:
    """Load the tokenizer, prepare the rows and check them with the rules; findings are shown.

    Args:
        day: see `rendering_day`.

    Raises:
        InputError: no tokenizer, rows that cannot be used, or token ids outside the embedding (F05).
    """
    tokenizer = dataset.load_tokenizer(config, model_files)
    display.phase("reading data")
    prepared = dataset.prepare(config, tokenizer, progress=display.progress, rendered_on=date.fromisoformat(day))
    check_metrics(config, tokenizer, prepared)
    findings = check_rows(config, tokenizer, prepared, model_files)
    prepared = prepared.with_findings(finding.to_json() for finding in findings)
    for finding in findings:
        display.note(f"{finding.word} {finding.code} {finding.slug}: {finding.message} → {finding.fix}")
        if finding.code == "F05":  # the embedding lookup would fail, on a GPU without a clear message
            raise InputError(finding.message, change=finding.fix, fault="F05")
    return tokenizer, prepared, findings


def plan(
    config: RunConfig,
    model_files: ModelFiles,
    machine: Machine,
    prepared: Prepared,
    display: RunObserver,
    local_ranks: int = 1,
) -> Plan:
    """Plan the run. `resolved` of the plan is the config with the settings that the plan chose.

    Args:
        local_ranks: the ranks on this machine.

    Raises:
        CheckError: it does not fit.
    """
    display.phase("planning")
    result = plan_inputs.plan_for(config, machine, prepared, model_files=model_files, local_ranks=local_ranks)
    if not result.fits:
        if machine.ram_limited_by and (result.card.is_cpu or result.lacks_host_memory):
            display.note(machine.ram.in_words())
        raise result.refusal()
    watchdog.expect(result.option.seconds.first_step)
    return result


def stop_before_harm(config: RunConfig, run_facts: RunFacts, is_begun: bool, display: RunObserver) -> GrowingRun:
    """Ask the rules before the first step, and stop for what is certain.

    Args:
        is_begun: the run goes on from a checkpoint (`goes_on`), and is not stopped.

    Raises:
        CheckError: a fault is certain, and `allow_faults` does not name it.
    """
    rules, allowed = GrowingRun(run_facts), certain_faults.allowed_codes(config)
    found = certain_faults.of_run(run_facts, rules.signals())
    refusal = certain_faults.refusal(found, allowed)
    if refusal is not None and not is_begun:
        raise refusal
    if names := ", ".join(f"{finding.code} {finding.slug}" for finding in found if finding.code in allowed):
        display.note(f"allow_faults: training in spite of {names}")
    return rules


def goes_on(config: RunConfig, resume: bool) -> bool:
    """Whether the run continues from a checkpoint on this machine."""
    previous = resuming.continued(config.output_dir) if resume else None
    has_one = previous is not None and bool(checkpoint.list_checkpoints(previous.checkpoints))
    return has_one or config.resume_from_checkpoint is not None


def fetch_weights(model_files: ModelFiles, display: RunObserver) -> ModelFiles:
    """The model's files with its weights; a hub model is downloaded here, once."""
    display.phase("loading model")
    return model_files.with_weights()


def load_model(
    config: RunConfig,
    model_files: ModelFiles,
    machine: Machine,
    tokenizer: Any,
    prepared: Prepared,
    resume: bool,
    display: RunObserver,
    world: World = ALONE,
) -> TrainableModel:
    """Load the base with new adapters, and check that the disk has space for the run's files.

    Raises:
        SolotuneError: the model does not load, or there is not enough disk space.
    """
    model = trained_run.load_base(config, machine, model_files, display.progress, world)
    folder = _folder_of(config.output_dir)
    if not world.is_owner:
        return model
    previous = resuming.continued(config.output_dir) if resume else None
    existing = len(checkpoint.list_checkpoints(previous.checkpoints)) if previous else 0
    disk_space.require_room(
        disk_space.need_of(config, model, prepared, tokenizer, existing, disk_space.block_bytes(folder)), folder
    )
    return model


def try_largest_step(
    config: RunConfig, model: TrainableModel, prepared: Prepared, display: RunObserver, world: World = ALONE
) -> Preflight | None:
    """Run the largest step once and measure it; None if the config skips it. Only rank 0 saves a checkpoint of it.

    Raises:
        SolotuneError: the step failed.
    """
    if config.preflight is True or (config.preflight == "auto" and model.device.type == "cuda"):
        display.phase("trying the largest step")
        with device_errors(config.memory):
            folder = _folder_of(config.output_dir) if world.is_owner else None
            return preflight.preflight(model, prepared.train, prepared.validation, config, folder)
    return None


def _folder_of(output_dir: str | None) -> Path:
    """The nearest existing folder above the run directory."""
    return nearest_folder(output_dir or "runs")


def write_initial_files(
    run: RunDirectory,
    ready: PreparedRun,
    fingerprints: Mapping[str, Any],
    resume_point: ResumePoint | None,
    display: RunObserver,
) -> dict[str, Any]:
    """Write and show what is known before the first step; returns the run's summary (`events.StartEvent`)."""
    report = ready.prepared.report
    write_whole(run.path / "config.yaml", to_yaml(ready.config))
    created_by = {
        "solotune": __version__,
        # a resumed run keeps its name: it may be continued by the copy of the config in its folder
        CONFIG_NAME: recorded_name(RunRecord(run.path, ())) or ready.config.name,
        "choices": [choice._asdict() for choice in ready.choices],
        **_world_size(ready.config),
    }
    run.write_json("environment.json", {**ready.machine.to_json(), **created_by})
    run.write_json(FINGERPRINTS, fingerprints)
    run.write_json("plan.json", ready.plan_json())
    run.write_json("data.json", report.to_json())
    write_whole(run.path / "split.json", ready.prepared.manifest.json_lines())
    run_summary = summary(ready)
    if ready.config.ranks > 1:
        batches = ready.config.batches
        rows = batches.batch_size * batches.accumulation * batches.ranks
        parts = f"{batches.batch_size} x {batches.accumulation} on each of {batches.ranks} ranks"
        display.note(f"ranks: {batches.ranks}; a step has {rows} {'packs' if batches.packing else 'rows'} ({parts})")
    display.note(_parameters_in_words(run_summary))
    for line in ready.model.adapter_coverage().in_words():
        display.note(line)
    for name, words in report.notes().items():
        display.note(f"{name}: {words}")
    if report.packing:
        display.note(f"packing: {packing.in_words(report.packing)}")
    display.note(_plan_in_words(ready.plan))
    display.planned(ready.plan.option.footprint.peak_bytes)
    if resume_point is None:
        run.log(StartEvent(step=0, **run_summary))
    else:
        run.log(
            ResumeEvent(
                resume_point.point.step,
                not resume_point.inexact,
                resume_point.inexact,
                resume_point.passed_over,
                **_world_size(ready.config),
            )
        )
        for line in resume_point.in_words():
            display.note(line)
    if ready.preflight:
        planned = ready.plan.option.footprint.peaks
        display.note(ready.preflight.in_words(planned.training, planned.evaluation))
        run.log(PreflightEvent(**asdict(ready.preflight)))
    return run_summary


def summary(ready: PreparedRun) -> dict[str, Any]:
    """Rows, steps and parameters of the run; `trainable_fits` lists the adapters with the same parameter count."""
    model, config, prepared = ready.model, ready.config, ready.prepared
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
        "adapters": model.adapter_coverage().to_json(),
        **_world_size(config),
    }


def _world_size(config: RunConfig) -> dict[str, Any]:
    """The ranks of a run that has several, for its records."""
    return {"world_size": config.ranks} if config.ranks > 1 else {}


def _parameters_in_words(summary: dict[str, Any]) -> str:
    """`Trainable parameters: 1,843,200 of 136,358,208 (1.35 %): r=16 on q_proj, k_proj`."""
    trainable, total = summary["trainable_parameters"], summary["parameters"]
    adapter = summary["trainable_fits"][0]  # the run's own; the others only have the same count
    share = f"{trainable:,} of {total:,} ({100 * trainable / total:.2f} %)"
    return f"Trainable parameters: {share}: r={adapter['r']} on {', '.join(adapter['target_modules'])}"


def _plan_in_words(plan: Plan) -> str:
    """Predicted memory and time in one line."""
    seconds, used = plan.option.seconds, plan.option.footprint
    phase = f" of {PHASES[used.moment]}" if used.is_of_evaluation else ""
    memory = f"{format_bytes(used.peak_bytes)} peak memory{phase} (budget {format_bytes(plan.budget.bytes)})"
    text = f"plan: {memory}, {format_step_time(seconds.step)} per step"
    return text + (f", {format_duration(seconds.total)} in total" if seconds.total is not None else "")
