"""A run that nothing speaks against: what has to be asked before, and what is written before the first step.

ready = get_ready(config, resume=False, display=display)       nothing was written yet
summary = recorded(run, ready, marks, start, display)          config, machine, plan, rows, split
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from solotune import (
    __version__,
    checkpoint,
    dataset,
    disk,
    fitness,
    linear,
    lora,
    preflight,
    survey,
    training,
    tuned,
    watchdog,
)
from solotune import model as models
from solotune import (
    resume as resuming,
)
from solotune.config import Choice, RunConfig
from solotune.dataset import pack
from solotune.destination import check_destination
from solotune.device_failure import device_errors
from solotune.diagnosis import own
from solotune.diagnosis.data_checks import check_rows
from solotune.errors import InputError
from solotune.planning import in_gib
from solotune.record import FINGERPRINTS, RunDirectory, nearest_folder
from solotune.storage import write_whole
from solotune.terminal import clock

if TYPE_CHECKING:
    from solotune.dataset import Prepared
    from solotune.diagnosis.subject import Subject
    from solotune.environment import Machine
    from solotune.model import TrainableModel
    from solotune.planning import Plan
    from solotune.preflight import Preflight
    from solotune.resume import Start
    from solotune.terminal import Display


@dataclass(frozen=True)
class Ready:
    """A run that nothing speaks against, and of which nothing is written yet."""

    config: RunConfig  # settled for the machine and by the plan
    machine: Machine
    choices: list[Choice]
    tokenizer: Any
    prepared: Prepared
    planned: Plan
    model: TrainableModel
    tried: Preflight | None
    subject: Subject  # what can be diagnosed before the first step

    def plan_json(self) -> dict[str, Any]:
        return {"predicted": self.planned.to_json(), "preflight": self.tried and asdict(self.tried)}


def get_ready(config: RunConfig, resume: bool, display: Display) -> Ready:
    """Settles, reads, plans, loads, tries: everything that may refuse a run, in the order of what it costs to ask."""
    checked, machine, choices = tuned.settle(config)
    fitness.require_fit(checked, machine)
    check_destination(checked)
    if not resume:
        RunDirectory.refuse_occupied(checked)
    folder = nearest_folder(checked.output_dir or "runs")
    disk.require_writable(folder)
    models.check_model(checked)
    tokenizer = dataset.load_tokenizer(checked)
    display.phase("reading data")
    day = resuming.recorded_day(checked, resume)
    prepared = dataset.prepare(checked, tokenizer, progress=display.progress, rendered_on=day)
    findings = check_rows(checked, tokenizer, prepared)
    prepared = prepared.with_findings(finding.to_json() for finding in findings)
    for finding in findings:
        display.note(f"{finding.severity} {finding.code} {finding.slug}: {finding.message}")
        if finding.code == "F05":  # no opinion: its lookup would fail, on a GPU without a word of what is wrong
            raise InputError(finding.message, change=finding.fix, fault="F05")
    display.phase("planning")
    planned = survey.plan_for(checked, machine, prepared)
    if not planned.fits:
        raise planned.refusal()
    checked = planned.settled
    watchdog.expect(planned.option.seconds.first_step)
    display.phase("loading model")
    model = tuned.load_base(checked, machine)
    before = resuming.continued(checked) if resume else None
    existing = len(checkpoint.numbered(before.checkpoints)) if before else 0
    disk.require_room(disk.need_of(checked, model, prepared, tokenizer, existing, disk.block_bytes(folder)), folder)
    tried = None
    if checked.preflight is True or (checked.preflight == "auto" and model.device.type == "cuda"):
        display.phase("trying the largest step")
        with device_errors(checked):
            tried = preflight.preflight(model, prepared.train, prepared.validation, checked, folder)
    choices = [*choices, *planned.choices, *model.choices]
    subject = own.from_prepared(checked, tokenizer, prepared, findings)
    return Ready(checked, machine, choices, tokenizer, prepared, planned, model, tried, subject)


def recorded(
    run: RunDirectory, ready: Ready, marks: Mapping[str, Any], start: Start | None, display: Display
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
        display.note(f"packing: {pack.in_words(report.packing)}")
    display.note(_planned_in_words(ready.planned))
    if start is None:
        run.log_metrics("start", step=0, **summary)
    else:
        exact = {"exact": not start.inexact, "inexact": start.inexact, "passed_over": start.passed_over}
        run.log_metrics("resume", step=start.point.step, **exact)
        for line in start.in_words():
            display.note(line)
    if ready.tried:
        display.note(ready.tried.in_words(ready.planned.option.footprint.peak_bytes))
        run.log_metrics("preflight", **asdict(ready.tried))
    return summary


def _summary(model: TrainableModel, config: RunConfig, prepared: Prepared) -> dict[str, Any]:
    trainable, parameters = model.num_trainable, model.num_parameters
    own = (config.lora_r, lora.leaf_names(model.adapted))
    others = lora.explain_count(trainable, model.linear_shapes(), {*lora.USUAL_RANKS, config.lora_r})
    fits = [own, *(fit for fit in others if fit != own)]
    sequences = training.sequences(config, prepared.train)
    return {
        "total_steps": training.Schedule.of(config, len(sequences)).total_steps,
        "train_rows": len(prepared.train),
        "train_sequences": len(sequences),
        "packing_fill": prepared.report.packing["fill"] if prepared.report.packing else None,
        "validation_rows": len(prepared.validation),
        "trainable_parameters": trainable,
        "parameters": parameters,
        "trainable_fits": [{"r": r, "target_modules": names} for r, names in fits],
        "base_bytes": linear.stored_bytes(model.module),
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
    text = f"plan: {in_gib(peak)} at the peak (budget {in_gib(planned.budget.bytes)}), {took.step:.3g} s a step"
    return text + (f", {clock(took.total)} in all" if took.total is not None else "")
