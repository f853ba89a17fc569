"""The verbs: one function each, what `solotune VERB` calls and what Python calls as `solotune.VERB(...)`.

Each reads like a table of contents of its stage; the work is in the modules, which are nouns (`training`, `evaluation`,
`dataset`), so that `solotune.train` can be the function. Heavy imports are inside the functions: asking for help or for
the list of runs loads no torch. The file is longer than others so that every stage can be read whole in one place.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from solotune.config import SECTIONS, Choice, RunConfig, allowed_values, field_help, load_config, section_of, to_yaml
from solotune.errors import InputError, IntegrityError, InterruptedRunError, SolotuneError
from solotune.outlet import outlet, stage_of
from solotune.record import (
    LOG,
    STACKS,
    RunDirectory,
    RunSummary,
    list_runs,
    read_json,
    summarised,
    usual_step,
)
from solotune.storage import LogFile, make_folder, whole_folder, write_whole
from solotune.terminal import Display, PlainDisplay, SilentDisplay, make_console, tee

if TYPE_CHECKING:
    from solotune.dataset import DataReport, Prepared
    from solotune.diagnosis.evidence import Diagnosis
    from solotune.diagnosis.explanation import Explanation
    from solotune.evaluation import Evaluation
    from solotune.fitness import DoctorReport
    from solotune.model import TrainableModel
    from solotune.planning import Plan
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
    from solotune.diagnosis.data_checks import check_rows

    checked = load_config(config, overrides)
    tokenizer = dataset.load_tokenizer(checked)
    prepared = dataset.prepare(checked, tokenizer, progress=(display or SilentDisplay()).progress)
    found = check_rows(checked, tokenizer, prepared)
    prepared = prepared.with_findings(finding.to_json() for finding in found)
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
    from solotune import beginning, checkpoint, signals, training, watchdog
    from solotune.device_failure import device_failure
    from solotune.diagnosis import message
    from solotune.diagnosis.watch import Watch
    from solotune.resume import fingerprints, open_run

    ready = beginning.get_ready(config, resume, heard)
    checked, prepared, model = ready.config, ready.prepared, ready.model
    marks = fingerprints(checked, prepared, ready.machine)
    run, start = open_run(checked, marks, resume)  # nothing is written before all that can be refused was seen
    log = LogFile(run.path / LOG)
    watchdog.stacks_into(run.path / STACKS)
    try:
        display = tee(heard, PlainDisplay(checked.logging_steps, make_console(cast(TextIO, log))))
        display.note(f"run directory: {run.path}")
        display.choices(ready.choices)
        summary = beginning.recorded(run, ready, marks, start, display)
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
