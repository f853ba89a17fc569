"""The trackers, each behind the same three methods: everything that is called of their libraries.

    tracker = LIBRARIES["mlflow"].make()
    tracker.start(config, TrackedRun("demo", folder))      where the run is to be seen, or ""
    tracker.log(25, {"train/loss": 1.83})
    tracker.finish("finished")                             or "failed": an error; "killed": the process is gone

They run in a process of their own (`tracker_process`), so they may fail, wait and never come back. Project, server and
keys come from the variables that each library reads itself (WANDB_PROJECT, MLFLOW_TRACKING_URI, ...), never from the
config: a config is saved and shared. Names of values are those of transformers (`train/loss`, `eval/loss`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from solotune.errors import InputError

Status = Literal["finished", "failed", "killed"]
Config = Mapping[str, Any]
PROJECT = "solotune"  # unless the library's own variable names another one


@dataclass(frozen=True)
class TrackedRun:
    """Which run it is for the tracker."""

    name: str
    id: str  # stays the same if the run is resumed
    folder: Path  # of the run, for the tracker's own files
    resumed_step: int | None = None  # the run continues after this step


class Tracker(Protocol):
    """The door to one library."""

    def start(self, config: Config, run: TrackedRun) -> tuple[str, str]:
        """Begin or continue the run; its id there, and where it is to be seen."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record finite numbers of a step; steps never decrease."""
        ...

    def finish(self, status: Status) -> None:
        """End the run and send what is left."""
        ...


class TensorBoard:
    """Event files in the folder of the run, by tensorboardX: `tensorboard --logdir runs` shows them."""

    def start(self, config: Config, run: TrackedRun) -> tuple[str, str]:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

        purge_step = None if run.resumed_step is None else run.resumed_step + 1  # later steps are hidden
        folder = run.folder / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10)
        if run.resumed_step is None:
            rows = [f"| {key} | {str(value).replace('|', ' ')} |" for key, value in config.items()]
            self._writer.add_text("config", "\n".join(["| key | value |", "|---|---|", *rows]))
        return run.id, f"tensorboard --logdir {folder}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, status: Status) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, online or (WANDB_MODE=offline) as a folder below wandb/."""

    def start(self, config: Config, run: TrackedRun) -> tuple[str, str]:
        import wandb  # pyright: ignore[reportMissingImports]

        # no code, no git remote, no command line and no console: they may hold secrets
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, save_code=False, x_disable_meta=True
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT, name=run.name, id=run.id, resume="allow",
            config=dict(config), settings=settings,
        )  # fmt: skip
        return run.id, self._run.url or str(Path(self._run.dir).parent)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, status: Status) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)


class MLflow:
    """A run of MLflow, on the server of MLFLOW_TRACKING_URI or in a local store."""

    def start(self, config: Config, run: TrackedRun) -> tuple[str, str]:
        import mlflow  # pyright: ignore[reportMissingImports]

        self._mlflow = mlflow
        if not os.environ.get("MLFLOW_EXPERIMENT_ID"):
            mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT)
        known = run.id if run.resumed_step is not None else None
        tags = {"mlflow.source.name": "solotune train"}
        started = mlflow.start_run(run_id=known, run_name=None if known else run.name, tags=None if known else tags)
        if not known:
            mlflow.log_params({key: str(value)[:500] for key, value in config.items()})
        return started.info.run_id, f"{mlflow.get_tracking_uri()} (run {started.info.run_id})"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step, synchronous=True)

    def finish(self, status: Status) -> None:
        self._mlflow.end_run({"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}[status])


class Trackio:
    """A run of Trackio: a local database, or the Space of TRACKIO_SPACE_ID."""

    def start(self, config: Config, run: TrackedRun) -> tuple[str, str]:
        import trackio  # pyright: ignore[reportMissingImports]

        self._trackio = trackio
        project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        trackio.init(project=project, name=run.name, config=dict(config), resume="allow", embed=False)
        return run.id, f"trackio show --project {project}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log(dict(values), step=step)

    def finish(self, status: Status) -> None:
        self._trackio.finish()


@dataclass(frozen=True)
class Library:
    """A tracker's library."""

    module: str
    make: Callable[[], Tracker]


LIBRARIES = {
    "tensorboard": Library("tensorboardX", TensorBoard),
    "wandb": Library("wandb", WeightsAndBiases),
    "mlflow": Library("mlflow", MLflow),
    "trackio": Library("trackio", Trackio),
}


def require(names: Iterable[str]) -> None:
    """Check that the libraries of these trackers are installed; none is imported.

    Raises:
        InputError: one is missing.
    """
    for name in names:
        spec = find_spec(LIBRARIES[name].module)
        if spec is None or spec.origin is None:  # a folder wandb/ in the current one, with runs, is no library
            raise InputError(
                f"report_to: {name}: {LIBRARIES[name].module} is not installed",
                change=f"pip install 'solotune[{name}]', or remove it from report_to",
            )
