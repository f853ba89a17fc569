"""The user's own metric: how its function is called, and what is said of one that cannot be used or fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from solotune.config.metric_specs import metric_specs
from solotune.errors import InputError
from solotune.evaluation.answers import Answered, Question
from solotune.evaluation.generation import Generated
from solotune.evaluation.metrics import make_metrics, measure


def question(reference: str) -> Question:
    return Question("a.jsonl:1", "a.jsonl:1", [1], "Q?", reference, [2], True)


@pytest.fixture
def own(tmp_path: Path):
    def make(text: str, function: str = "score") -> Any:
        path = tmp_path / "own.py"
        path.write_text(text)
        return make_metrics(metric_specs([{"python": f"{path}:{function}"}]), [question("yes")])

    return make


def test_a_function_takes_its_parameters_by_name(own) -> None:
    text = "def score(reference, answer): return answer == reference\n"
    text += "def by_prompt(answer, prompt, *, scale=2): return scale * len(prompt)\n"
    (metric,) = own(text)
    assert (metric.name, metric("yes", question("yes")), metric("no", question("yes"))) == ("score", 1.0, 0.0)
    (metric,) = own(text, "by_prompt")
    assert metric("x", question("yes")) == 4.0


@pytest.mark.parametrize(
    ("text", "problem", "seen"),
    [
        ("def other(answer): return 1\n", "the file has no function score", "own.py"),
        ("score = 3\n", "the file has no function score", "own.py"),
        ("x = 1\nraise RuntimeError('no data')\n", "the file fails when it is read: RuntimeError: no data", "own.py, line 2"),
        ("def score(answer:\n", "the file fails when it is read: SyntaxError", "own.py, line 1"),
        ("import sys\nsys.exit(3)\n", "the file fails when it is read: SystemExit: 3", "own.py, line 2"),
        ("def score(a, b): return 1\n", "the function has other parameters", "a, b"),
        ("def score(reference): return 1\n", "the function has other parameters", "reference"),
        ("def score(answer, /): return 1\n", "the function has other parameters", "answer"),
        ("def score(answer): return 1 / 0\n", "ZeroDivisionError: division by zero", "row a.jsonl:1: answer 'yes', reference 'yes'"),
        ("def score(answer): return float('nan')\n", "gave nan, which is not a finite number", "row a.jsonl:1: answer 'yes'"),
        ("def score(answer): return 'good'\n", "gave 'good', which is not a finite number", "row a.jsonl:1"),
        ("def score(answer): pass\n", "gave None, which is not a finite number", "row a.jsonl:1"),
    ],
)  # fmt: skip
def test_a_function_that_cannot_be_used_is_refused_before_training(own, text: str, problem: str, seen: str) -> None:
    with pytest.raises(InputError) as caught:
        own(text)
    assert problem in caught.value.problem
    assert seen in str(caught.value.seen)


def test_a_function_that_fails_on_an_answer_shows_the_row(own) -> None:
    metrics = own("def score(answer, reference): return 1 / len(answer)\n")
    with pytest.raises(InputError, match="ZeroDivisionError") as caught:
        measure(metrics, [Answered(question("yes"), Generated([], True), Generated([], True), "", "no")])
    assert caught.value.seen == "row a.jsonl:1: answer '', reference 'yes'"
