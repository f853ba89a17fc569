"""The steps and evaluations of a run as a DataFrame."""

from __future__ import annotations

import math
import sys

import pytest

from solotune.errors import CheckError
from solotune.run.events import EvalEvent, StepEvent, to_line
from solotune.run.history import COLUMNS, history_of
from solotune.run.record import RunRecord


def step(number: int, loss: float = 2.0) -> StepEvent:
    return StepEvent(number, 10, number / 5, loss, 0.5, 1e-4, 0.7, 100, 50, 50.0, 0.25, 400.0, 0)


def written(folder, *events):
    (folder / "metrics.jsonl").write_text("".join(map(to_line, events)))
    return RunRecord.read(folder)


def test_a_row_for_each_step_with_its_evaluation(tmp_path):
    score = EvalEvent(2, exact_match=0.25, loss=1.5, stderr=0.1, tokens=90)
    history = history_of(written(tmp_path, step(1), step(2, 1.75), score, step(3)))
    assert tuple(history.columns) == COLUMNS
    assert history.step.tolist() == [1, 2, 3] and history.loss.tolist() == [2.0, 1.75, 2.0]
    assert history.learning_rate.tolist() == [1e-4] * 3 and history.tokens_per_second.tolist() == [400.0] * 3
    assert history.dropna(subset="eval_loss")[["step", "eval_loss", "eval_exact_match"]].values.tolist() == [
        [2, 1.5, 0.25]
    ]
    assert math.isnan(history.eval_loss[0])


def test_a_run_without_a_step_and_an_evaluation_without_its_step(tmp_path):
    assert history_of(written(tmp_path)).empty
    history = history_of(written(tmp_path, EvalEvent(4, 0.0, 1.0, 0.1, 9)))
    assert history.step.tolist() == [4] and history.loss.isna().all()


def test_without_pandas_the_command_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(CheckError) as error:
        history_of(written(tmp_path, step(1)))
    assert error.value.change == "pip install pandas"
