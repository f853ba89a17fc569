"""The best evaluation beyond noise: which adapter stays, when a run stops, and the same after a resume."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import metrics_of, random_rows

from solotune.display.observer import SilentObserver
from solotune.evaluation import scores
from solotune.evaluation.scores import score_of
from solotune.model import lora
from solotune.model.loading import load_model
from solotune.run.run_dir import RunDirectory
from solotune.training import checkpoint, loop

ROWS = random_rows(24)
HELD_OUT = random_rows(12, seed=1)
LOWER = {1: -0.5, 2: -0.48, 3: -0.9, 4: -0.88, 5: -0.9, 6: -0.2}
"""Evaluation -> how much lower the held-out losses are per token. The third is a new best; others are noise, or worse."""


@pytest.fixture
def curve(monkeypatch: pytest.MonkeyPatch):
    """Held-out losses that follow `LOWER` by the step's number, each row with noise of its own."""

    def score(model: Any, rows: Any, *rest: Any) -> scores.Score:
        number = NOW[0]
        noise = np.random.default_rng(number).normal(0, 0.1, len(rows))
        losses = [(4 + LOWER[number] + more) * row.total_weight for row, more in zip(rows, noise, strict=True)]
        return score_of(rows, losses, [False] * len(rows))

    monkeypatch.setattr(scores, "score", score)


NOW = [0]


class Steps(SilentObserver):
    """Counts the steps, which are the numbers of the evaluations; may ask for a stop; keeps the notes."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at, self.notes = stop_at, []

    def step(self, event: Any) -> None:
        NOW[0] = event.step

    def evaluated(self, event: Any, num_rows: int) -> None:
        if event.step == self.stop_at:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


def trained(
    config: Any, folder: Any, observer: Steps, point: Any = None, resume: bool = False
) -> tuple[Any, Any, RunDirectory]:
    run = RunDirectory.create(str(folder), resume=resume or point is not None)
    try:
        model = load_model(config, torch.device("cpu"), torch.float32)
        marks = {"validation_rows": "the same"}
        score = loop.train(model, ROWS, HELD_OUT, config, run, observer, point, marks)
        return {name: part.clone() for name, part in lora.state_dict(model.lora_layers).items()}, score, run
    finally:
        run.release()


@pytest.fixture
def config(tiny_config):
    def make(**keys: object):
        plain = {"max_steps": 6, "eval_steps": 1, "save_steps": 1, "gradient_accumulation_steps": 1}
        return tiny_config(**{**plain, **keys})

    return make


def equal(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def evals(run: RunDirectory) -> list[tuple[int, int | None]]:
    return [(e["step"], e.get("best_step")) for e in metrics_of(run) if e["event"] == "eval"]


def test_a_new_best_is_better_beyond_noise_and_its_adapter_is_kept(config, curve, tmp_path) -> None:
    observer = Steps()
    kept, score, run = trained(config(load_best_model_at_end=True), tmp_path / "best", observer)
    assert evals(run) == [(1, 1), (2, 1), (3, 3), (4, 3), (5, 3), (6, 3)]
    third = checkpoint.load(run.checkpoints / "step-000003")
    assert equal(kept, third.adapter)
    assert not equal(kept, checkpoint.load(run.checkpoints / "step-000006").adapter)
    assert score.loss == next(e["loss"] for e in metrics_of(run) if e["event"] == "eval" and e["step"] == 3)
    assert observer.notes == [
        f"the adapter of step 3 is kept, held-out loss {score.loss:.4f}: no later one is better beyond noise"
    ]


def test_patience_ends_the_run_and_the_last_step_is_saved(config, curve, tmp_path) -> None:
    observer = Steps()
    keys = {"early_stopping_patience": 2, "save_steps": 4, "load_best_model_at_end": False}
    kept, _, run = trained(config(**keys), tmp_path / "run", observer)
    assert evals(run)[-1] == (5, 3)
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == ["step-000004", "step-000005"]
    assert equal(kept, checkpoint.load(run.checkpoints / "step-000005").adapter)
    assert observer.notes == [
        "stopped early after step 5 of 6: 2 evaluations in a row are not better than step 3 beyond noise "
        "(early_stopping_patience)"
    ]
    resumed = Steps()
    again, _, run = trained(config(**keys), run.path, resumed, checkpoint.load(run.checkpoints / "step-000005"))
    assert equal(kept, again) and resumed.notes == observer.notes
    assert len(evals(run)) == 5


@pytest.mark.parametrize("stop_at", [2, 5])
def test_a_resumed_run_keeps_the_adapter_that_the_whole_run_keeps(config, curve, tmp_path, stop_at: int) -> None:
    """Killed after an evaluation, before its checkpoint; with saves that come at other steps than the best."""
    keys = {"load_best_model_at_end": True, "early_stopping_patience": 3, "save_steps": 2}
    kept, score, whole = trained(config(**keys), tmp_path / "whole", Steps())
    with pytest.raises(KeyboardInterrupt):
        trained(config(**keys), tmp_path / "run", Steps(stop_at))
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    point = checkpoint.load(newest) if newest else None
    run = RunDirectory.create(str(tmp_path / "run"), resume=True)
    run.truncate_metrics(point.state["metrics"] if point else None)
    run.release()
    again, same, run = trained(config(**keys), tmp_path / "run", Steps(), point, resume=True)
    assert equal(kept, again)
    assert (same.loss, same.row_losses, same.row_hits) == (score.loss, score.row_losses, score.row_hits)
    assert evals(run) == evals(whole)


def test_other_held_out_rows_forget_the_best(config, curve, tmp_path) -> None:
    settings = config(load_best_model_at_end=True)
    _, _, run = trained(settings, tmp_path / "run", Steps())
    point = checkpoint.load(run.checkpoints / "step-000003")
    assert point.state["best"] == {"step": 3, "evaluations_since": 0}
    point.state["fingerprints"]["validation_rows"] = "others"
    _, _, run = trained(settings, run.path, Steps(), point)
    assert evals(run)[-3:] == [(4, 4), (5, 4), (6, 4)]


def test_without_these_keys_a_checkpoint_has_no_best(config, curve, tmp_path) -> None:
    _, _, run = trained(config(), tmp_path / "run", Steps())
    assert not (run.checkpoints / "step-000003" / checkpoint.BEST).exists()
    assert {best for _, best in evals(run)} == {None}
