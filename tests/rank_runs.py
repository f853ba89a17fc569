"""Whole runs on several ranks, and what they have written, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from ranks import Ranks, environment, free_port
from safetensors.torch import load_file
from tiny import metrics_of

from solotune.cli.main import main
from solotune.run.run_dir import RunDirectory


def rows(count: int) -> list[dict[str, Any]]:
    """Chats of many lengths; every third one weighs double."""
    rng = np.random.default_rng(0)
    return [
        {
            "messages": [
                {"role": "user", "content": "x" * int(rng.integers(1, 20))},
                {"role": "assistant", "content": "y" * int(rng.integers(1, 12)) + str(i), "weight": 1.0 + (i % 3 == 0)},
            ]
        }
        for i in range(count)
    ]


def without_times(path: Path) -> dict[str, Any]:
    return {name: value for name, value in json.loads(path.read_text()).items() if "second" not in name}


def train_as(size: int, keys: dict[str, Any], folder: Path, *more: str) -> Ranks:
    lines = [f"{key}: {value if isinstance(value, str) else json.dumps(value)}\n" for key, value in keys.items()]
    (folder / "run.yaml").write_text("".join(lines))
    return Ranks(size, lambda rank: main(["train", "run.yaml", *more]), folder)


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in metrics_of(RunDirectory(folder)) if event["event"] == kind]


STEP = ("loss", "token_accuracy", "total_weight", "num_supervised", "num_tokens", "epoch", "learning_rate")


EARLY = {"packing": False, "max_steps": 200, "eval_steps": 4, "save_steps": 4, "learning_rate": 3e-2,
         "gradient_accumulation_steps": 1, "early_stopping_patience": 2, "load_best_model_at_end": True,
         "save_total_limit": 2}  # fmt: skip


def as_figures(run: Path) -> dict[str, Any]:
    """Where a run with an early stop has stopped, which step was best, its checkpoints and held-out losses."""
    evals = events_of(run, "eval")
    losses = {f"loss of step {event['step']}": event["loss"] for event in evals}
    saved = {path.name: 1.0 for path in (run / "checkpoints").iterdir()}
    return {"stopped": evals[-1]["step"], "best": evals[-1]["best_step"], **losses, **saved}


def distance(one: Path, other: Path) -> float:
    """The norm of the difference of two adapters or weight files, by the norm of the second."""
    files = (path if path.is_file() else path / "adapter_model.safetensors" for path in (one, other))
    mine, theirs = (load_file(path) for path in files)
    assert mine.keys() == theirs.keys()
    off, whole = (sum(float(t.double().square().sum()) for t in part) for part in
                  ([mine[name] - theirs[name] for name in theirs], theirs.values()))  # fmt: skip
    return (off / whole) ** 0.5


WITH_SHORT_LIMITS = """\
import sys
from solotune.runtime import early_ranks, heartbeat
early_ranks.GONE_SECONDS = early_ranks.REACH_SECONDS = heartbeat.STOPPED_SECONDS = heartbeat.BLOCKED_SECONDS = 1.0
from solotune.cli import main
sys.exit(main())
"""


class Commands:
    """Ranks as commands of their own, which load libraries first: `python -m solotune`, or another program."""

    def __init__(self, keys: dict[str, Any], folder: Path, size: int = 2, program: Sequence[str] = ("-m", "solotune")):
        lines = [f"{key}: {value if isinstance(value, str) else json.dumps(value)}\n" for key, value in keys.items()]
        (folder / "run.yaml").write_text("".join(lines))
        self.folder, self.size, self.port = folder, size, free_port()
        self.command = [sys.executable, *program, "train", "run.yaml"]
        self.processes = dict[int, subprocess.Popen[bytes]]()

    def start(self, *ranks: int, more: Sequence[str] = ()) -> None:
        for rank in ranks:
            variables = os.environ | environment(rank, self.size, self.port)
            with open(self.folder / f"command-{rank}.txt", "wb") as file:
                command = [*self.command, *more]
                self.processes[rank] = subprocess.Popen(command, env=variables, stdout=file, stderr=file)

    def said(self, rank: int) -> str:
        return (self.folder / f"command-{rank}.txt").read_text()

    def wait_for_imports(self, *ranks: int) -> None:
        """Until these have looked for the others, and load torch."""
        wait_for(lambda: all("/torch/" in Path(f"/proc/{self.processes[rank].pid}/maps").read_text() for rank in ranks))

    def ends(self, *ranks: int, seconds: float = 100.0) -> list[int]:
        until = time.monotonic() + seconds
        return [self.processes[rank].wait(max(0.1, until - time.monotonic())) for rank in ranks]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


def wait_for(is_true: Callable[[], bool], seconds: float = 100) -> None:
    until = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.02)
