"""`solotune evaluate`: compare the tuned model with its base on the held-out rows."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solotune.api.report import keep_result
from solotune.api.types import Overrides
from solotune.config.load import load_config, override_values
from solotune.config.write import yaml_value
from solotune.display.notebook import showing
from solotune.display.observer import RunObserver
from solotune.display.progress import Display
from solotune.errors import InputError, program
from solotune.runtime.library_noise import quiet_libraries

if TYPE_CHECKING:
    from solotune.config.run_config import RunConfig
    from solotune.config.settings import EvaluationSettings
    from solotune.dataset import Prepared
    from solotune.evaluation.compare import Evaluation
    from solotune.evaluation.scores import Score
    from solotune.evaluation.standard_tasks import LoadedTasks, TaskRequest
    from solotune.evaluation.task_scores import TaskScore
    from solotune.model.loading import TrainableModel
    from solotune.training.trained_run import TunedRun


EVALUATION_KEYS = ("metrics", "metrics_rows", "num_samples", "max_new_tokens", "per_device_eval_batch_size")
"""Keys of a run's config that an evaluation may change."""


@quiet_libraries()
def evaluate(
    run: str | Path,
    display: Display | None = None,
    overrides: Overrides = (),
    *,
    tasks: str | Sequence[str] = (),
    include_path: str | Path | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    **keys: Any,
) -> Evaluation:
    """Compare the tuned model of a run with its base on the held-out rows; replaces evaluation.json and
    report.html.

        result = solotune.evaluate("runs/demo", metrics=["choice"])
        print(result.to_json()["difference"], result.metrics["choice"].p_value)

    Args:
        run: a run directory.
        overrides: `key=value` strings, or a mapping of keys: metrics, metrics_rows, num_samples, max_new_tokens and
            per_device_eval_batch_size replace those of the run.
        tasks: standard tasks that both models are also asked, by lm_eval (`pip install solotune[lm-eval]`): names of
            tasks, groups or tags, or task files.
        include_path: a folder with task files of your own. The functions that a task file names are run.
        limit: documents of each task, or (below 1) the share of them.
        num_fewshot: solved examples before each question; default: as the task says.
        chat_template: ask the tasks through the chat template, with the system prompt of the training.
        keys: the same as `overrides`, as keywords; they win.

    Raises:
        InputError: there is no run, it held out no rows, or a metric or task cannot be used.
        IntegrityError: the held-out rows or the base model have changed since the run.
        DeviceError: the GPU failed, or its memory is full.
        StorageError: the disk is full. In a folder that may only be read nothing is replaced, and a note says so.
    """
    from solotune.evaluation.standard_tasks import TaskRequest

    names = tasks.split(",") if isinstance(tasks, str) else tasks
    folder = None if include_path is None else str(include_path)
    asked = TaskRequest([name.strip() for name in names if name.strip()], folder, limit, num_fewshot, chat_template)
    with showing(display) as chosen:
        return _evaluate(run, chosen, overrides, keys, asked)


def _evaluate(
    run: str | Path, display: Display, overrides: Overrides, keys: dict[str, Any], asked: TaskRequest
) -> Evaluation:
    from solotune.hardware.gpu_errors import device_errors
    from solotune.training.trained_run import TunedRun

    found = TunedRun.open(run)
    path = found.directory.path
    config = _with_changes(found.config, overrides, keys, display, path)
    display.choices(found.choices)
    tasks = _load_tasks(asked, found, display) if asked.names else None
    display.phase("reading data")
    prepared = found.prepare()
    if not prepared.validation:
        raise InputError(f"{path}: the run held out no rows", change="train with validation_size above 0")
    display.phase("loading model")
    with device_errors(config.memory):
        model = found.load(display.progress)
        display.choices(found.choices_of(model))
        result = compare(model, found.tokenizer, prepared, config.evaluation, None, display)
        if tasks is not None:
            result = replace(result, tasks=_run_tasks(tasks, model, found, prepared, config, display))
    keep_result(found.directory, "evaluation.json", result.to_json(), display)
    return result


def _load_tasks(asked: TaskRequest, found: TunedRun, display: Display) -> LoadedTasks:
    """The tasks with their documents.

    Raises:
        InputError: one cannot be used.
    """
    from solotune.evaluation.standard_tasks import load_tasks

    display.phase("loading tasks")
    has_template = found.tokenizer.chat_template is not None
    if asked.is_chat and not has_template:
        raise InputError("--apply-chat-template: the model of this run has no chat template", change="leave it out")
    loaded = load_tasks(asked)
    if found.prompt_format == "chat" and has_template and not asked.is_chat:
        why = "the tasks are asked as plain text, but the run was trained on chats"
        display.note(f"{why}: --apply-chat-template asks them through the chat template")
    return loaded


def _run_tasks(
    tasks: LoadedTasks,
    model: TrainableModel,
    found: TunedRun,
    prepared: Prepared,
    config: RunConfig,
    display: Display,
) -> list[TaskScore]:
    from solotune.evaluation.generation import stop_ids
    from solotune.evaluation.standard_tasks import run_tasks

    return run_tasks(
        tasks,
        model,
        found.tokenizer,
        stops=stop_ids(model, found.tokenizer, (row.last_loss_token for row in prepared.validation)),
        batch_size=config.evaluation.batch_size,
        system_prompt=found.shared_system_prompt,
        rendered_on=prepared.report.day,
        progress=display.progress,
        note=display.note,
    )


def _with_changes(
    config: RunConfig, overrides: Overrides, keys: dict[str, Any], display: Display, path: Path
) -> RunConfig:
    """The run's config with the user's changes, without code that only the run names.

    Raises:
        InputError: a key that is not one of `EVALUATION_KEYS`, or a wrong value.
    """
    named = override_values(overrides) if not isinstance(overrides, Mapping) else dict(overrides)
    changed = {**named, **keys}
    if others := sorted(changed.keys() - set(EVALUATION_KEYS)):
        raise InputError(
            f"evaluate: {others[0]} cannot be changed after the run",
            seen=str(changed[others[0]])[:100],
            allowed=", ".join(EVALUATION_KEYS),
        )
    if changed:
        return load_config(config, (), changed)
    if (named := python_metrics_of_a_file(config)) is None:
        return config
    display.note(f"{named}; left out. To measure them: {program()} evaluate {path} {shlex.quote(_as_override(config))}")
    return config.replaced("evaluate", metrics=[one for one in config.metrics if not _is_python(one)])


def check_metrics(config: RunConfig, tokenizer: Any, prepared: Prepared) -> None:
    """Try the metrics of a run before it begins, on the references of a few held-out rows.

    Raises:
        InputError: one cannot be used, only a file names its code, or no rows are held out.
    """
    from solotune.evaluation.compare import check_metrics

    if config.metrics and not prepared.validation:
        raise InputError("metrics: there are no held-out rows to measure on", change="set validation_size above 0")
    if (named := python_metrics_of_a_file(config)) is not None:
        where = f"{config.source_of('metrics')}, {named}"
        raise InputError(where, change=f"name it on the command line: {shlex.quote(_as_override(config))}")
    check_metrics(tokenizer, prepared.validation, config.evaluation, prepared.report.day)


def python_metrics_of_a_file(config: RunConfig) -> str | None:
    """The python metrics that only a config file names, in words: it may be copied from somewhere, so its code is not
    run. None: there are none, or the user names them himself, on the command line or in Python."""
    found = [spec for spec in config.evaluation.metrics if spec.kind == "python"]
    if not found or config.source_of("metrics") in ("command line", "python"):
        return None
    return f"metrics: {', '.join(map(str, found))}: code that only a config file names is not run"


def _is_python(entry: Any) -> bool:
    return isinstance(entry, dict) and "python" in entry


def _as_override(config: RunConfig) -> str:
    return f"metrics={yaml_value(config.metrics)}"


def compare(
    model: TrainableModel,
    tokenizer: Any,
    prepared: Prepared,
    settings: EvaluationSettings,
    tuned: Score | None,
    display: RunObserver,
) -> Evaluation:
    """Compare base and tuned on the held-out rows; `tuned`: the score at the end of training, if known."""
    from solotune.evaluation.compare import compare as compare_scores

    return compare_scores(
        model,
        tokenizer,
        prepared.validation,
        settings,
        training_rows=prepared.train,
        rendered_on=prepared.report.day,
        tuned=tuned,
        progress=display.progress,
    )
