"""The verbs: one function each, what `solotune VERB` calls and what Python calls as `solotune.VERB(...)`.

Each reads like a table of contents of its stage; the work is in the modules, which are nouns (`training`, `evaluation`,
`dataset`), so that `solotune.train` can be the function. Heavy imports are inside the functions: asking for help or for
the list of runs loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solotune.config import SECTIONS, Choice, RunConfig, allowed_values, field_help, load_config, section_of, to_yaml
from solotune.errors import InputError, IntegrityError
from solotune.record import RunDirectory, latest_run_of, list_runs, read_json, storage_errors, whole_folder, write_whole
from solotune.terminal import Display, PlainDisplay, SilentDisplay, make_console, tee

if TYPE_CHECKING:
    from solotune.checkpoint import Checkpoint
    from solotune.dataset import DataReport, Example, Prepared
    from solotune.environment import DoctorReport, Machine
    from solotune.evaluation import Evaluation
    from solotune.model import TrainableModel

ConfigSource = str | Path | Mapping[str, Any] | RunConfig

# Changing one of these between a checkpoint and its resumption cannot change what is learned.
FREE_TO_CHANGE = {
    *(key for key in RunConfig.model_fields if section_of(key) in ("run", "evaluation")),
    "gradient_checkpointing",
}


def doctor() -> DoctorReport:
    """Checks the machine: versions, CUDA, bitsandbytes, memory, disk; each finding with its fix."""
    from solotune import environment

    return environment.doctor()


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
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "\n".join(lines))
    return path


@dataclass(frozen=True)
class ShownRow:
    """One training row as the model sees it: text pieces, each with whether it is learned and its token ids."""

    where: str
    pieces: list[tuple[str, bool, list[int]]]


@dataclass(frozen=True)
class DataPreview:
    report: DataReport
    shown: list[ShownRow]

    def to_json(self) -> dict[str, Any]:
        """The design's data shape and the shown rows."""
        return {**self.report.to_json(), "shown": [asdict(row) for row in self.shown]}


def data(config: ConfigSource, overrides: Iterable[str] = (), show: int = 1) -> DataPreview:
    """Reads, splits, renders and masks the data as training would, and shows `show` rows with their masks."""
    from solotune import dataset

    checked = load_config(config, overrides)
    tokenizer = dataset.load_tokenizer(checked)
    prepared = dataset.prepare(checked, tokenizer)
    return DataPreview(prepared.report, [_shown(row, tokenizer) for row in prepared.train[:show]])


def _shown(row: Example, tokenizer: Any) -> ShownRow:
    pieces: list[tuple[str, bool, list[int]]] = []
    start = 0
    for end in range(1, len(row.input_ids) + 1):
        if end == len(row.input_ids) or row.supervised[end] != row.supervised[start]:
            ids = row.input_ids[start:end].tolist()
            pieces.append((tokenizer.decode(ids), bool(row.supervised[start]), ids))
            start = end
    return ShownRow(row.where, pieces)


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
    from solotune import dataset, training

    display = display or SilentDisplay()
    checked, machine, choices = _settled(load_config(config, overrides))
    display.phase("reading data")
    tokenizer = dataset.load_tokenizer(checked)
    prepared = dataset.prepare(checked, tokenizer)
    run, start = _open_run(checked, prepared, resume)
    log = open(run.path / "log.txt", "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed with the run
    try:
        display = tee(display, PlainDisplay(checked.logging_steps, make_console(log)))
        display.note(f"run directory: {run.path}")
        display.phase("loading model")
        model = _load_model(checked, machine)
        choices += model.choices
        display.choices(choices)
        run.write_config(checked)
        run.write_json("environment.json", {**machine.to_json(), "choices": [c._asdict() for c in choices]})
        run.write_json("data.json", prepared.report.to_json())
        summary = _summary(model, checked, prepared, training.Schedule.of(checked, len(prepared.train)).total_steps)
        display.note(_in_words(summary))
        run.log_metrics("start", step=start.step if start else 0, **summary)
        tuned = training.train(
            model, prepared.train, prepared.validation, checked, run, display, start, _fingerprints(checked, prepared)
        )
        _write_adapter(run, model, checked, tokenizer)
        result = None
        if prepared.validation:
            display.phase("comparing base and tuned on held-out rows")
            result = _compare(model, tokenizer, prepared.validation, checked, tuned, display)
            run.write_json("evaluation.json", result.to_json())
        run.log_metrics("end", step=summary["total_steps"], peak_bytes=training.peak_bytes(model.device))
        return TrainResult(run.path, summary, choices, result)
    except Exception as error:
        error.run_dir = run.path  # type: ignore[attr-defined] - where the command line writes a bug's traceback
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

    display = display or SilentDisplay()
    directory = RunDirectory.open(run)
    config, machine, choices = _settled(load_config(directory.path / "config.yaml"))
    display.choices(choices)
    display.phase("reading data")
    tokenizer = _run_tokenizer(directory, config)
    prepared = dataset.prepare(config, tokenizer)
    recorded = read_json(directory.path / "data.json").get("sha256", {}).get("validation")
    if recorded != prepared.report.to_json()["sha256"]["validation"]:
        raise IntegrityError(
            f"{directory.path}: the held-out rows are not those of the run",
            seen="the data file, its split or the tokenizer has changed since",
            change="put the data back, or train again",
        )
    if not prepared.validation:
        raise InputError(f"{directory.path}: the run held out no rows", change="train with validation_size above 0")
    display.phase("loading model")
    model = _tuned_model(directory, config, machine)
    result = _compare(model, tokenizer, prepared.validation, config, None, display)
    directory.write_json("evaluation.json", result.to_json())
    return result


class ChatSession:
    """A conversation with a run's model; the same prompt can be put to its base."""

    def __init__(self, run: str | Path) -> None:
        from solotune import evaluation

        directory = RunDirectory.open(run)
        self._config, machine, self.choices = _settled(load_config(directory.path / "config.yaml"))
        self._tokenizer = _run_tokenizer(directory, self._config)
        self._model = _tuned_model(directory, self._config, machine)
        self._stops = evaluation.stop_ids(self._model, self._tokenizer, [])
        self.model_name = f"{self._config.model_name_or_path} + {directory.path.name}"
        self.history: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forgets the conversation."""
        self.history = []

    def reply(self, text: str, base: bool = False, on_text: Callable[[str], None] | None = None) -> str:
        """The answer to `text`; with `base` the base model's, which is not added to the history.

        Args:
            on_text: called with each piece of the answer as it comes.
        """
        from contextlib import nullcontext

        from transformers import TextStreamer

        from solotune import dataset, evaluation, lora

        asked = [*self.history, {"role": "user", "content": text}]
        streamer = None
        if on_text is not None:
            streamer = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
            streamer.on_finalized_text = lambda text, stream_end=False: on_text(text)
        with lora.adapters_off(self._model.module) if base else nullcontext():
            ids = evaluation.generate(
                self._model,
                dataset.render_prompt(self._tokenizer, asked),
                self._config.max_new_tokens,
                self._stops,
                streamer,
            )
        answer = self._tokenizer.decode(ids, skip_special_tokens=True).strip()
        if not base:
            self.history = [*asked, {"role": "assistant", "content": answer}]
        return answer


def chat(run: str | Path) -> ChatSession:
    """Loads a run's model to talk to."""
    return ChatSession(run)


@dataclass(frozen=True)
class RunSummary:
    """One line of `solotune runs`; what a run has not got to is None."""

    name: str
    path: Path
    status: str  # finished, running or unfinished
    steps: int
    total_steps: int | None
    train_loss: float | None
    base_loss: float | None
    tuned_loss: float | None
    exact_match: float | None
    tokens_per_second: float | None
    peak_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def runs(root: str | Path = "runs") -> list[RunSummary]:
    """The runs below `root`, oldest first."""
    return [_run_summary(run) for run in list_runs(root)]


def _run_summary(run: RunDirectory) -> RunSummary:
    events = run.read_metrics()
    steps = [event for event in events if event.get("event") == "step"]
    speeds = sorted(step["tokens_per_second"] for step in steps)
    path = run.path / "evaluation.json"
    found = read_json(path) if path.is_file() else {}
    finished = any(event.get("event") == "end" for event in events)
    return RunSummary(
        name=run.path.name,
        path=run.path,
        status="finished" if finished else "running" if run.is_locked() else "unfinished",
        steps=steps[-1]["step"] if steps else 0,
        total_steps=steps[-1]["total_steps"] if steps else None,
        train_loss=steps[-1]["loss"] if steps else None,
        base_loss=found["base"]["loss"] if found else None,
        tuned_loss=found["tuned"]["loss"] if found else None,
        exact_match=found["scores"]["exact_match"]["tuned"] if found else None,
        tokens_per_second=speeds[len(speeds) // 2] if speeds else None,
        peak_bytes=max((step["peak_bytes"] for step in steps), default=None),
    )


def _settled(config: RunConfig) -> tuple[RunConfig, Machine, list[Choice]]:
    """The config with what the machine decides, the machine, and those decisions."""
    from solotune import environment

    machine = environment.probe()
    settled, choices = environment.settle(config, machine)
    return settled, machine, choices


def _load_model(config: RunConfig, machine: Machine) -> TrainableModel:
    import torch

    from solotune import environment
    from solotune.model import load_model

    device = torch.device(environment.device_of(config, machine))
    return load_model(config, device, getattr(torch, environment.dtype_of(config)))


def _tuned_model(run: RunDirectory, config: RunConfig, machine: Machine) -> TrainableModel:
    """The run's base with its adapter, or with its newest checkpoint's while it has not finished."""
    from solotune import checkpoint, lora

    folder = run.adapter if run.adapter.is_dir() else checkpoint.newest(run.checkpoints)
    if folder is None:
        raise InputError(f"{run.path}: nothing was saved yet", change="train it to its end, or --resume it")
    tensors = checkpoint.read_adapter(folder)
    model = _load_model(config, machine)
    lora.load_state_dict(model.adapted, tensors, str(folder))
    return model


def _run_tokenizer(run: RunDirectory, config: RunConfig) -> Any:
    """The tokenizer that lies beside the adapter, so that its template is the one trained with."""
    from solotune import dataset

    beside = {"model_name_or_path": str(run.adapter), "chat_template_path": None}
    return dataset.load_tokenizer(config.replaced("run", **beside) if run.adapter.is_dir() else config)


def _open_run(config: RunConfig, prepared: Prepared, resume: bool) -> tuple[RunDirectory, Checkpoint | None]:
    from solotune import checkpoint

    explicit = Path(config.resume_from_checkpoint).expanduser() if config.resume_from_checkpoint else None
    if resume and config.output_dir is None and explicit is None and (latest := latest_run_of(config)):
        config = config.replaced("newest run of this config", output_dir=str(latest.path))
    run = RunDirectory.create(config, resume=resume)
    try:
        folder = explicit or (checkpoint.newest(run.checkpoints) if resume else None)
        start = checkpoint.load(folder) if folder else None
        if start is not None:
            _check_unchanged(start.state["fingerprints"], _fingerprints(config, prepared), str(folder))
        if resume:
            run.forget_after(start.step if start else -1)
    except BaseException:
        run.release()
        raise
    return run, start


def _fingerprints(config: RunConfig, prepared: Prepared) -> dict[str, Any]:
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


def _summary(model: TrainableModel, config: RunConfig, prepared: Prepared, total_steps: int) -> dict[str, Any]:
    from solotune import linear, lora

    trainable, parameters = model.num_trainable, model.num_parameters
    adapted = lora.leaf_names(model.adapted)
    fits = lora.explain_count(trainable, model.linear_shapes(), {*lora.USUAL_RANKS, config.lora_r})
    if (config.lora_r, adapted) not in fits:
        fits.insert(0, (config.lora_r, adapted))
    return {
        "total_steps": total_steps,
        "train_rows": len(prepared.train),
        "validation_rows": len(prepared.validation),
        "lora_r": config.lora_r,
        "trainable_parameters": trainable,
        "parameters": parameters,
        "trainable_fits": [{"r": r, "target_modules": names} for r, names in fits],
        "base_bytes": linear.stored_bytes(model.module),
        "device": model.device.type,
    }


def _in_words(summary: dict[str, Any]) -> str:
    """The parameter count, and what else would print the same count."""
    trainable, parameters, r = (summary[key] for key in ("trainable_parameters", "parameters", "lora_r"))
    own, *others = sorted(summary["trainable_fits"], key=lambda fit: fit["r"] != r)
    text = f"{trainable:,} of {parameters:,} parameters are trained ({trainable / parameters:.2%}): "
    text += f"r={own['r']} on {', '.join(own['target_modules'])}"
    return text + (f" (the count alone would also fit {len(others)} other choices)" if others else "")


def _compare(
    model: TrainableModel, tokenizer: Any, rows: list[Example], config: RunConfig, tuned: Any, display: Display
):
    from solotune import evaluation

    return evaluation.compare(
        model,
        tokenizer,
        rows,
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
        tokenizer.save_pretrained(folder)
