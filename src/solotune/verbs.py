"""The verbs: one function each, what `solotune VERB` calls and what Python calls as `solotune.VERB(...)`.

Each reads like a table of contents of its stage; the work is in the modules, which are nouns (`training`, `evaluation`,
`dataset`), so that `solotune.train` can be the function. Heavy imports are inside the functions: asking for help or for
the list of runs loads no torch. The file is longer than others so that every stage can be read whole in one place.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from solotune import __version__
from solotune.config import SECTIONS, Choice, RunConfig, allowed_values, field_help, load_config, section_of, to_yaml
from solotune.destination import check_destination
from solotune.errors import InputError, IntegrityError, InterruptedRunError, SolotuneError
from solotune.outlet import outlet, stage_of
from solotune.record import (
    FINGERPRINTS,
    LOG,
    STACKS,
    RunDirectory,
    RunSummary,
    list_runs,
    nearest_folder,
    read_json,
    summarised,
    usual_step,
)
from solotune.storage import LogFile, make_folder, whole_folder, write_whole
from solotune.terminal import Display, PlainDisplay, SilentDisplay, clock, make_console, tee

if TYPE_CHECKING:
    from solotune.dataset import DataReport, Prepared
    from solotune.diagnosis.evidence import Diagnosis
    from solotune.diagnosis.explanation import Explanation
    from solotune.diagnosis.subject import Subject
    from solotune.environment import Machine
    from solotune.evaluation import Evaluation
    from solotune.fitness import DoctorReport
    from solotune.model import TrainableModel
    from solotune.planning import Plan
    from solotune.preflight import Preflight
    from solotune.resume import Start
    from solotune.tuned import ChatSession
    from solotune.verification import Verification

ConfigSource = str | Path | Mapping[str, Any] | RunConfig


def doctor() -> DoctorReport:
    """Checks the machine: versions, CUDA, bitsandbytes, memory, disk; each finding with its fix."""
    from solotune import fitness

    return fitness.doctor()


def init(model: str, dataset: str, path: str | Path = "solotune.yaml", force: bool = False) -> Path:
    """Writes a commented config for a model and a data file: every key, its default, its help.

    Raises:
        InputError: the file exists and `force` is not set.
    """
    path = Path(path)
    if path.exists() and not force:
        raise InputError(f"{path}: exists already", change="another name with --output, or --force to replace it")
    config = load_config({"model_name_or_path": model, "dataset": dataset})
    values = dict(line.split("  # ")[0].split(": ", 1) for line in to_yaml(config).splitlines() if ": " in line)
    lines = ["# solotune train " + str(path), "# Lines behind a # hold the defaults: remove the # to change one.", ""]
    for section in SECTIONS:
        lines.append(f"# --- {section}")
        for key in (key for key in RunConfig.model_fields if section_of(key) == section):
            given = key in ("model_name_or_path", "dataset")
            value = values[key] if values[key] != "null" else ""
            lines += [
                f"# {field_help(key)} [{allowed_values(key)}]",
                f"{'' if given else '# '}{key}: {value}".rstrip(),
                "",
            ]
    make_folder(path.parent)
    write_whole(path, "\n".join(lines))
    return path


@dataclass(frozen=True)
class ShownRow:
    """One training row as the model sees it: text pieces, each with whether it is learned and its token ids.

    `tokens` holds the text of each id, for all pieces one after the other; `weights` that of each piece, and nothing
    where all are 1.
    """

    where: str
    pieces: list[tuple[str, bool, list[int]]]
    tokens: list[str]
    weights: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class DataPreview:
    report: DataReport
    shown: list[ShownRow]

    def to_json(self) -> dict[str, Any]:
        """The design's data shape and the shown rows."""
        return {**self.report.to_json(), "shown": [asdict(row) for row in self.shown]}


def data(
    config: ConfigSource, overrides: Iterable[str] = (), show: int = 1, display: Display | None = None
) -> DataPreview:
    """Reads, splits, renders and masks the data as training would; says what is wrong with it and shows some rows."""
    from solotune import dataset

    checked = load_config(config, overrides)
    tokenizer = dataset.load_tokenizer(checked)
    prepared = _prepare(checked, tokenizer, display or SilentDisplay())
    shown = [
        ShownRow(
            row.where,
            [(p["text"], p["supervised"], p["ids"]) for p in row.pieces(tokenizer)],
            dataset.spelled(tokenizer, row.input_ids),
            [] if row.weights is None else [p["weight"] for p in row.pieces(tokenizer)],
        )
        for row in prepared.train[:show]
    ]
    return DataPreview(prepared.report, shown)


def plan(
    config: ConfigSource, overrides: Iterable[str] = (), gpu: str | None = None, display: Display | None = None
) -> Plan:
    """Bytes and seconds of a run before it runs, and the knobs that are turned for it; needs no GPU and no weights.

    Args:
        gpu: a card by name (h100, 4090, ...) in the place of this machine's.

    Raises:
        InputError: no such card, or a budget that it does not have.
    """
    from solotune import dataset, environment
    from solotune.survey import for_card, plan_for

    display = display or SilentDisplay()
    checked = load_config(config, overrides)
    machine = environment.probe()
    checked, choices = environment.settle(checked, machine if gpu is None else for_card(gpu, machine))
    prepared, notes = None, []
    try:
        display.phase("reading data")
        prepared = dataset.prepare(checked, dataset.load_tokenizer(checked), progress=display.progress)
    except SolotuneError as error:
        notes = [f"the data cannot be read: {error.problem}"]
    display.phase("planning")
    found = plan_for(checked, machine, prepared, gpu)
    return replace(found, choices=[*choices, *found.choices], notes=[*notes, *found.notes])


def _prepare(config: RunConfig, tokenizer: Any, display: Display, rendered_on: date | None = None) -> Prepared:
    """The rows of a config, and in their report what is wrong with them and how they are packed."""
    from solotune import dataset
    from solotune.dataset import findings, pack
    from solotune.dataset.example import lengths_of

    prepared = dataset.prepare(config, tokenizer, progress=display.progress, rendered_on=rendered_on)
    if config.packing:
        prepared.report.packing = pack.account(lengths_of(prepared.train), config.max_length)
    prepared.report.findings = findings.known_or_found(config, tokenizer, prepared)
    return prepared


@dataclass(frozen=True)
class TrainResult:
    run_dir: Path
    summary: dict[str, Any]
    choices: list[Choice]
    evaluation: Evaluation | None

    def to_json(self) -> dict[str, Any]:
        return {
            "run": str(self.run_dir),
            **self.summary,
            "choices": [choice._asdict() for choice in self.choices],
            "evaluation": self.evaluation.to_json() if self.evaluation else None,
        }


def train(
    config: ConfigSource, overrides: Iterable[str] = (), resume: bool = False, display: Display | None = None
) -> TrainResult:
    """The whole run: settle the config, prepare the data, load, train, save the adapter, evaluate base against tuned.

    Args:
        resume: continue the run in `output_dir`, or else the newest run of this config; one that was killed before its
            first checkpoint starts anew.

    Raises:
        SolotuneError: see `solotune.errors`; each kind has its exit code.
    """
    from solotune import fitness, signals

    checked = load_config(config, overrides)
    fitness.require_torch()
    heard = outlet(display or SilentDisplay())
    with signals.heeded():
        try:
            return _train(checked, resume, heard)
        except signals.StopRequested as stop:
            problem = f"stopped while {stage_of(heard)}; nothing to save yet"
            raise InterruptedRunError(stop.number, problem, "start it again") from None


def _train(config: RunConfig, resume: bool, heard: Display) -> TrainResult:
    from solotune import checkpoint, signals, training, watchdog
    from solotune.device_failure import device_failure
    from solotune.diagnosis import message
    from solotune.diagnosis.watch import Watch
    from solotune.resume import fingerprints, open_run

    ready = _get_ready(config, resume, heard)
    checked, prepared, model = ready.config, ready.prepared, ready.model
    marks = fingerprints(checked, prepared, ready.machine)
    run, start = open_run(checked, marks, resume)  # nothing is written before all that can be refused was seen
    log = LogFile(run.path / LOG)
    watchdog.stacks_into(run.path / STACKS)
    try:
        display = tee(heard, PlainDisplay(checked.logging_steps, make_console(cast(TextIO, log))))
        display.note(f"run directory: {run.path}")
        display.choices(ready.choices)
        summary = _record_start(run, ready, marks, start, display)
        watch = Watch(model, ready.subject, display, run)
        point = start.point if start else None
        with signals.held_back():
            tuned = training.train(
                model, prepared.train, prepared.validation, checked, run, tee(display, watch), point, marks
            )
            _write_adapter(run, model, checked, ready.tokenizer)
        result = None
        if prepared.validation:
            display.phase("comparing base and tuned on held-out rows")
            result = _compare(model, ready.tokenizer, prepared, checked, tuned, display)
            run.write_json("evaluation.json", result.to_json())
        peak_bytes = training.peak_bytes(model.device)
        measured = {"peak_bytes": peak_bytes, **usual_step(run.read_metrics())}
        run.write_json("plan.json", {**ready.plan_json(), "measured": measured})
        run.log_metrics("end", step=summary["total_steps"], peak_bytes=peak_bytes)
        found = watch.diagnosis()
        run.write_json("diagnosis.json", found.to_json())
        display.note(f"diagnosis by rules alone: {message.summary(found)}")
        log.close()
        run.seal()
        return TrainResult(run.path, summary, ready.choices, result)
    except signals.StopRequested as stop:
        if not run.adapter.is_dir():
            raise
        problem = f"stopped while {stage_of(heard)}; the adapter is saved"
        raise InterruptedRunError(
            stop.number, problem, f"compare it with its base: solotune evaluate {run.path}"
        ) from None
    except Exception as error:
        error.run_dir = run.path  # type: ignore[attr-defined] - where the command line writes a bug's traceback
        if failure := device_failure(error, checked, run.path, checkpoint.newest(run.checkpoints)):
            run.log_metrics("device_failed", problem=failure.problem, seen=failure.seen)
            raise failure from error
        raise
    finally:
        log.close()
        run.release()


@dataclass(frozen=True)
class _Ready:
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


def _get_ready(config: RunConfig, resume: bool, display: Display) -> _Ready:
    """Settles, reads, plans, loads, tries: everything that may refuse a run, in the order of what it costs to ask."""
    from solotune import checkpoint, dataset, disk, fitness, watchdog
    from solotune.device_failure import device_errors
    from solotune.diagnosis import own
    from solotune.model import check_model
    from solotune.preflight import preflight
    from solotune.resume import continued, recorded_day
    from solotune.survey import plan_for
    from solotune.tuned import load_base, settle

    checked, machine, choices = settle(config)
    fitness.require_fit(checked, machine)
    check_destination(checked)
    if not resume:
        RunDirectory.refuse_occupied(checked)
    folder = nearest_folder(checked.output_dir or "runs")
    disk.require_writable(folder)
    check_model(checked)
    tokenizer = dataset.load_tokenizer(checked)
    display.phase("reading data")
    prepared = _prepare(checked, tokenizer, display, recorded_day(checked, resume))
    for finding in prepared.report.findings:
        display.note(f"{finding['severity']} {finding['code']} {finding['slug']}: {finding['message']}")
        if finding["code"] == "F05":  # no opinion: its lookup would fail, on a GPU without a word of what is wrong
            raise InputError(finding["message"], change=finding["fix"], fault="F05")
    display.phase("planning")
    planned = plan_for(checked, machine, prepared)
    if not planned.fits:
        raise planned.refusal()
    checked = planned.settled
    watchdog.expect(planned.option.seconds.first_step)
    display.phase("loading model")
    model = load_base(checked, machine)
    before = continued(checked) if resume else None
    existing = len(checkpoint.numbered(before.checkpoints)) if before else 0
    disk.require_room(disk.need_of(checked, model, prepared, tokenizer, existing, disk.block_bytes(folder)), folder)
    tried = None
    if checked.preflight is True or (checked.preflight == "auto" and model.device.type == "cuda"):
        display.phase("trying the largest step")
        with device_errors(checked):
            tried = preflight(model, prepared.train, prepared.validation, checked, folder)
    choices = [*choices, *planned.choices, *model.choices]
    subject = own.from_prepared(checked, tokenizer, prepared)
    return _Ready(checked, machine, choices, tokenizer, prepared, planned, model, tried, subject)


def _record_start(
    run: RunDirectory, ready: _Ready, marks: Mapping[str, Any], start: Start | None, display: Display
) -> dict[str, Any]:
    """Writes what is known before the first step, and says it; the run's summary."""
    from solotune.dataset import pack

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


def evaluate(run: str | Path, display: Display | None = None) -> Evaluation:
    """Base against tuned on the run's held-out rows; writes evaluation.json anew.

    Raises:
        IntegrityError: the data is no longer what the run held out.
    """
    from solotune import dataset
    from solotune.device_failure import device_errors
    from solotune.resume import day_of
    from solotune.tuned import TunedRun

    display = display or SilentDisplay()
    found = TunedRun.open(run)
    path = found.directory.path
    display.choices(found.choices)
    display.phase("reading data")
    prepared = dataset.prepare(found.config, found.tokenizer, rendered_on=day_of(path))
    recorded = read_json(path / "data.json").get("sha256", {}).get("validation")
    if recorded != prepared.report.to_json()["sha256"]["validation"]:
        raise IntegrityError(
            f"{path}: the held-out rows are not those of the run",
            seen="the data file, its split or the tokenizer has changed since",
            change="put the data back, or train again",
        )
    if not prepared.validation:
        raise InputError(f"{path}: the run held out no rows", change="train with validation_size above 0")
    display.phase("loading model")
    with device_errors(found.config):
        result = _compare(found.load(), found.tokenizer, prepared, found.config, None, display)
    found.directory.write_json("evaluation.json", result.to_json())
    found.directory.seal_again("evaluation.json")
    return result


def verify(run: str | Path) -> Verification:
    """Looks whether every file of a run is what the run wrote, and every parameter a number.

    Raises:
        InputError: no run there.
    """
    from solotune import verification

    return verification.verify(run)


def diagnose(
    target: ConfigSource,
    deep: bool = False,
    budget: float | None = None,
    dataset: str | None = None,
    config: str | Path | None = None,
    overrides: Iterable[str] = (),
    display: Display | None = None,
) -> Diagnosis:
    """Names the culprit, or says healthy, or says undecided and what would decide; written into a run's diagnosis.json.

    Args:
        target: a config, a run directory, or a folder that another trainer wrote.
        deep: probe longer, on more batches.
        budget: seconds for the probes; 0 asks the rules alone.
        dataset: of a foreign folder: the data that it was trained on.
        config: of a foreign folder: the file that made it.

    Raises:
        InputError: the target is none of these.
    """
    from solotune.diagnosis import examination
    from solotune.diagnosis.target import open_run, subject_of

    display = display or SilentDisplay()
    display.phase("reading what is there")
    found = examination.examine(subject_of(target, overrides, config, dataset), deep, budget, display.phase)
    if run := open_run(target):
        run.write_json("diagnosis.json", found.to_json())
        run.seal_again("diagnosis.json")
    return found


def explain(code: str) -> Explanation:
    """What a fault (F17, pad-masks-terminator) or a suspect (S4) is, how it is recognised and how it is mended.

    Raises:
        InputError: there is no such fault; the nearest are in the message.
    """
    from solotune.diagnosis.explanation import explained

    return explained(code)


def chat(run: str | Path) -> ChatSession:
    """Loads a run's model to talk to.

    Raises:
        InputError: no run there, or nothing saved in it yet.
    """
    from solotune.tuned import ChatSession, TunedRun

    return ChatSession(TunedRun.open(run))


def runs(root: str | Path = "runs") -> list[RunSummary]:
    """The runs below `root`, oldest first."""
    return [summarised(run) for run in list_runs(root)]


def _summary(model: TrainableModel, config: RunConfig, prepared: Prepared) -> dict[str, Any]:
    from solotune import linear, lora, training

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
    from solotune.planning import in_gib

    took, peak = planned.option.seconds, planned.option.footprint.peak_bytes
    text = f"plan: {in_gib(peak)} at the peak (budget {in_gib(planned.budget.bytes)}), {took.step:.3g} s a step"
    return text + (f", {clock(took.total)} in all" if took.total is not None else "")


def _compare(
    model: TrainableModel, tokenizer: Any, prepared: Prepared, config: RunConfig, tuned: Any, display: Display
):
    from solotune import evaluation

    return evaluation.compare(
        model,
        tokenizer,
        prepared.validation,
        rendered_on=prepared.report.day,
        batch_size=config.per_device_eval_batch_size,
        num_samples=config.num_samples,
        max_new_tokens=config.max_new_tokens,
        tuned=tuned,
        progress=lambda done, total: display.progress(done, total, "rows"),
    )


def _write_adapter(run: RunDirectory, model: TrainableModel, config: RunConfig, tokenizer: Any) -> None:
    from solotune import checkpoint, lora

    with whole_folder(run.adapter) as folder:
        peft_config = lora.peft_config(config, model.adapted, model.module)
        checkpoint.write_adapter(folder, lora.state_dict(model.adapted), peft_config)
        for name, content in _tokenizer_files(tokenizer):
            folder.write(name, content)


def _tokenizer_files(tokenizer: Any) -> Iterator[tuple[str, bytes]]:
    """(name, content) of what transformers writes of a tokenizer; it writes by itself, so elsewhere at first."""
    with tempfile.TemporaryDirectory(prefix="solotune-") as scratch:
        tokenizer.save_pretrained(scratch)
        for path in sorted(path for path in Path(scratch).rglob("*") if path.is_file()):
            yield path.relative_to(scratch).as_posix(), path.read_bytes()
