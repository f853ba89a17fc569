"""The field's standard tasks, by lm-evaluation-harness: base and tuned are asked the same documents. Extra: lm-eval.

    asked = TaskRequest(("arc_easy", "mine"), include_path="tasks")
    loaded = load_tasks(asked)                   before the model: a mistake is known before anything takes long
    scores = run_tasks(loaded, model, ...)       TaskScore of each metric: see `task_scores`

lm_eval names and reads tasks, makes prompts, scores answers; solotune lends the loaded model (`lm_eval_model`), with
its adapters off and on, and tests the difference. Metrics, few-shot examples and seeds are lm_eval's, so scores are
those that its own command line gives.

The files of a task can name Python functions (`!function`), which run when the task is loaded. So only lm_eval's own
tasks and those of a folder or file that the user names are loaded. Tasks that run code which the model has written
(`unsafe_code`) are refused.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from ruamel.yaml import YAML

from solotune.errors import InputError
from solotune.evaluation.task_scores import Group, LoggedTask, Metric, TaskScore, score_tasks
from solotune.hardware.gpu_errors import stage
from solotune.model.loading import TrainableModel
from solotune.model.lora import adapters_off
from solotune.regular_files import read_text
from solotune.units import first_line

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

LIBRARY, EXTRA = "lm_eval", "lm-eval"
MOST_TASK_FILE_BYTES = 1 << 20
_OFFLINE = (
    "OfflineModeIsEnabled",
    "LocalEntryNotFoundError",
    "ConnectionError",
    "ConnectError",
    "DatasetNotFoundError",
)
_SHOWN = 300  # characters of an error


@dataclass(frozen=True)
class TaskRequest:
    """Which tasks, and how they are asked; the names are those of lm_eval's command line.

    Args:
        names: tasks, groups or tags of lm_eval, or YAML files of tasks.
        include_path: a folder with task files of the user.
        limit: documents of each task; below 1, the share of them.
        num_fewshot: solved examples before each question; None: as the task says.
        is_chat: prompts go through the chat template.
    """

    names: Sequence[str]
    include_path: str | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    is_chat: bool = False

    def __post_init__(self) -> None:
        """Raises:
        InputError: a value that cannot be used.
        """
        if not self.names:
            given = {"--include-path": self.include_path, "--limit": self.limit, "--num-fewshot": self.num_fewshot}
            given |= {"--apply-chat-template": self.is_chat or None}
            for name, value in given.items():
                if value is not None:
                    raise InputError(
                        f"{name} is for tasks of lm_eval, and none is named", change="--tasks arc_easy,..."
                    )
        if self.limit is not None and not (0 < self.limit < 1 or (self.limit >= 1 and self.limit % 1 == 0)):
            allowed = "a number of documents (1 or more), or a share of them (above 0, below 1)"
            raise InputError("--limit: no documents can be chosen", seen=self.limit, allowed=allowed)
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise InputError("--num-fewshot: must not be negative", seen=self.num_fewshot)
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise InputError("--include-path: no such folder", seen=self.include_path)


@dataclass
class LoadedTasks:
    """Tasks of lm_eval with their documents, by name."""

    request: TaskRequest
    tasks: dict[str, Any]
    groups: list[Group] = field(default_factory=list)


# --- load


def load_tasks(request: TaskRequest) -> LoadedTasks:
    """Load the tasks with their documents.

    Raises:
        InputError: lm_eval is not installed, there is no such task, its file is broken, its data cannot be read, it has
            no documents, or it cannot be used here.
    """
    if find_spec(LIBRARY) is None:
        raise InputError("--tasks: lm_eval is not installed", change=f"pip install 'solotune[{EXTRA}]'")
    manager = _manager(request)
    loaded = LoadedTasks(request, {})
    for name in dict.fromkeys(request.names):
        found = _loaded(manager, name)
        loaded.tasks |= found["tasks"]
        for group in found.get("groups", {}).values():
            tasks = [task.task_name for task in group.get_all_tasks()]
            loaded.groups += [
                Group(group.name, one.metric, one.filter_list, tasks, one.weight_by_size)
                for one in group.aggregate_metric_list or ()
            ]
    for name, task in loaded.tasks.items():
        _check(name, task)
        _set_fewshot(task, request.num_fewshot)
    return loaded


def _manager(request: TaskRequest) -> TaskManager:
    """lm_eval's index of tasks; without its own 14,000, which take 10 s to read, if the user's files are enough.

    Raises:
        InputError: there is no such task, or it runs code of the model.
    """
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    names = [name for name in request.names if not _is_file(name)]
    manager = TaskManager(include_path=request.include_path, include_defaults=False)
    if not all(name in manager.all_subtasks for name in names):
        manager = TaskManager(include_path=request.include_path)
    for name in names:
        if name not in manager.all_tasks:
            raise _unknown(name, manager, request.include_path)
        if (manager.task_index[name].cfg or {}).get("unsafe_code"):  # known before its data is downloaded
            raise _unsafe(name)
    return manager


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()


def _unknown(name: str, manager: TaskManager, folder: str | None) -> InputError:
    """The error for a name that is no task: perhaps its file is broken, which lm_eval passes over in silence."""
    near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
    change = f"did you mean {' or '.join(near)}?" if near else None
    known = {str(entry.yaml_path) for entry in manager.task_index.values()}
    for path in sorted(Path(folder).glob("**/*.yaml")) if folder else ():
        if str(path) not in known and (problem := _yaml_problem(path)):
            seen, change = f"{path}, {problem}", change or "correct that file"
            return InputError(f"--tasks {name}: no such task, but a file that cannot be read", seen=seen, change=change)
    where = f"{folder} and lm_eval" if folder else "lm_eval"
    listed = "lm-eval ls tasks lists lm_eval's own; a folder of yours needs --include-path"
    return InputError(f"--tasks {name}: no such task in {where}", change=change or listed)


def _yaml_problem(path: Path) -> str | None:
    try:
        YAML(typ="rt").load(read_text(path, MOST_TASK_FILE_BYTES))
    except Exception as error:  # the parser raises many classes
        mark = getattr(error, "problem_mark", None)
        return (f"line {mark.line + 1}: " if mark else "") + (getattr(error, "problem", None) or first_line(error))
    return None


def _loaded(manager: TaskManager, name: str) -> dict[str, Any]:
    """A task, or the tasks of a group or tag.

    Raises:
        InputError: lm_eval cannot load it.
    """
    said = list[str]()
    try:
        with _silent(said):
            return dict(manager.load([name]))
    except Exception as error:  # of the task's code, of its data, of YAML, of the hub
        seen = "; ".join([first_line(error, with_type=True), *said[-1:]])[:_SHOWN]
        if isinstance(error, StopIteration) or (isinstance(error, IndexError) and "size 0" in str(error)):
            raise _no_documents(name) from error
        if any(type(cause).__name__ in _OFFLINE for cause in _causes(error)):
            change = "allow access to the hub (HF_HUB_OFFLINE), or correct dataset_path in the task's file"
            raise InputError(f"--tasks {name}: its data cannot be loaded", seen=seen, change=change) from error
        raise InputError(f"--tasks {name}: lm_eval cannot load this task", seen=seen, change=_fix_of(error)) from error


def _fix_of(error: BaseException) -> str:
    """What to do about a task that cannot be loaded."""
    if isinstance(error, ModuleNotFoundError):
        return f"pip install {error.name}, or the extra of lm_eval that the task's README names"
    return "correct the task's file: its metrics, its functions"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _check(name: str, task: Any) -> None:
    """Raises:
    InputError: the task cannot be used.
    """
    if getattr(task, "UNSAFE_CODE", False):
        raise _unsafe(name)
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"--tasks {name}: this task has images or sound; solotune trains on text")
    if not len(task.eval_docs):
        raise _no_documents(name)


def _no_documents(name: str) -> InputError:
    return InputError(f"--tasks {name}: the task has no documents", change="correct its data, or process_docs")


def _unsafe(name: str) -> InputError:
    return InputError(
        f"--tasks {name}: this task runs code that the model writes, which solotune does not do",
        change="export the run, and use lm-eval run --confirm_run_unsafe_code on a machine made for it",
    )


def _set_fewshot(task: Any, number: int | None) -> None:
    """As `lm_eval.simple_evaluate`: a task that says 0 stays at 0."""
    own = task.get_config("num_fewshot")
    if number is not None and own != 0:
        task.set_config("num_fewshot", number)
    elif own is None:
        task.set_config("num_fewshot", 0)


class _Said(logging.Handler):
    """Collects what lm_eval logs."""

    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(" ".join(record.getMessage().split()))


@contextlib.contextmanager
def _silent(said: list[str]) -> Iterator[None]:
    """Collect the warnings of lm_eval, and keep its progress bars, which cannot be switched off, from the screen."""
    logger, handler = logging.getLogger(LIBRARY), _Said(said)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


# --- run


@stage("evaluating")
def run_tasks(
    loaded: LoadedTasks,
    model: TrainableModel,
    tokenizer: Any,
    *,
    stops: Sequence[int],
    batch_size: int,
    system_prompt: str | None = None,
    rendered_on: date | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    note: Callable[[str], None] = lambda text: None,
) -> list[TaskScore]:
    """Ask both models all documents, and compare them.

    Args:
        stops: ids that end an answer.
        system_prompt: of the prompts, if they go through the chat template.
        rendered_on: the date that the chat template sees as today.
        progress: called with what is done, all of it, and what it is.
        note: called with what the user has to know.

    Raises:
        InputError: a task cannot score the answers, or base and tuned were not asked the same.
    """
    from solotune.evaluation.lm_eval_model import LmEvalModel

    was_training = model.module.training
    model.module.eval()

    def ask(name: str, side: Literal["base", "tuned"]) -> dict[str, Any]:
        def shown(done: int, total: int) -> None:
            progress(done, total, f"{name}, {side}")

        lm, said = LmEvalModel(model, tokenizer, batch_size, stops, rendered_on, shown), list[str]()
        found = _results(lm, name, loaded, system_prompt, said)
        if side == "tuned" and any("runcat" in line for line in said):
            note(f"{name}: what is longer than the model's {lm.max_length:,} tokens is cut at its beginning")
        return found

    logged = []
    try:
        for name, task in loaded.tasks.items():
            tuned = ask(name, "tuned")
            with adapters_off(model.module):
                base = ask(name, "base")
            logged.append(_logged(name, task, base, tuned))
    finally:
        model.module.train(was_training)
    return score_tasks(logged, loaded.groups)


def _results(lm: Any, name: str, loaded: LoadedTasks, system_prompt: str | None, said: list[str]) -> dict[str, Any]:
    """What lm_eval finds of one model on one task; its warnings are added to `said`.

    Raises:
        InputError: the task cannot score the answers.
    """
    from lm_eval import evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED  # pyright: ignore[reportMissingImports]

    request, task = loaded.request, loaded.tasks[name]
    random.seed(DEFAULT_RANDOM_SEED)  # as `lm_eval.simple_evaluate`; both models get the same prompts
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    try:
        with _silent(said):
            return evaluate(
                lm=lm,
                task_dict={"tasks": {name: task}},
                limit=request.limit,  # pyright: ignore[reportArgumentType]  # a share too
                bootstrap_iters=0,  # the errors are ours
                log_samples=True,
                system_instruction=system_prompt if request.is_chat else None,
                apply_chat_template=request.is_chat,
                fewshot_as_multiturn=request.is_chat,
            )
    except Exception as error:
        if error is lm.failure or isinstance(error, InputError):
            raise
        seen = "; ".join([first_line(error, with_type=True), *said[-1:]])[:_SHOWN]
        raise InputError(
            f"--tasks {name}: the task cannot score the answers", seen=seen, change=_fix_of(error)
        ) from error


def _logged(name: str, task: Any, base: dict[str, Any], tuned: dict[str, Any]) -> LoggedTask:
    from lm_eval.api.registry import AGGREGATION_REGISTRY  # pyright: ignore[reportMissingImports]

    names = {function: known for known, function in AGGREGATION_REGISTRY.items()}
    directions = tuned["higher_is_better"].get(name, {})
    metrics = {
        metric: Metric(_name_of(function, names), directions.get(metric), function)
        for metric, function in task.aggregation().items()
    }
    values = {key: (value, tuned["results"][name].get(key)) for key, value in base["results"][name].items()}
    return LoggedTask(name, base["samples"][name], tuned["samples"][name], values, metrics)


def _name_of(function: Any, names: dict[Any, str]) -> str:
    try:
        return names.get(function, "")
    except TypeError:  # an object that cannot be hashed
        return ""
