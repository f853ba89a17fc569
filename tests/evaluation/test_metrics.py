"""Scores of answers: what each metric counts, the rows it is over, and the user's own function that fails."""

from __future__ import annotations

import math
from typing import Any

import pytest

from solotune.config.metric_specs import metric_specs
from solotune.errors import InputError
from solotune.evaluation.answers import Answered, Question
from solotune.evaluation.generation import Generated
from solotune.evaluation.metrics import MetricScore, make_metrics, measure


def question(reference: str, number: int = 1, group: str | None = None) -> Question:
    return Question(f"a.jsonl:{number}", group or f"g{number}", [1], "Q?", reference, [2], True)


def scored(entry: Any, reference: str, answer: str) -> list[float | None]:
    asked = [question(reference), question('{"a": 1}', 2), question("yes", 3), question("Answer: 7", 4)]
    return [metric(answer, asked[0]) for metric in make_metrics(metric_specs([entry]), asked)]


RECORD = '{"item": "cup", "qty": 2, "tags": ["a", "b"], "city": null}'


@pytest.mark.parametrize(
    ("answer", "valid", "fields"),
    [
        (RECORD, 1.0, 1.0),
        ('{"qty":2,"item":"cup","city":null,"tags":["a","b"]}', 1.0, 1.0),
        ('{"item": "cup", "qty": 2.0, "tags": ["a", "x"], "city": null}', 1.0, 4 / 5),
        ('{"item": "cup", "qty": true, "tags": [], "city": null}', 1.0, 2 / 6),
        ('{"item": "cup", "qty": 2, "tags": ["a", "b"], "city": null, "more": 1}', 1.0, 5 / 6),
        ("{}", 1.0, 0.0),
        (f"Here it is: {RECORD}", 0.0, 0.0),
        ("", 0.0, 0.0),
        ("[" * 5_000, 0.0, 0.0),
    ],
)
def test_json_validity_and_fields(answer: str, valid: float, fields: float) -> None:
    assert scored("json", RECORD, answer) == [valid, pytest.approx(fields)]


def test_rows_whose_reference_is_no_json_are_left_out() -> None:
    assert scored("json", "no record", RECORD) == [None, None]


@pytest.mark.parametrize(
    ("entry", "reference", "answer", "score"),
    [
        ("choice", "yes", "Yes, of course.", 1.0),
        ("choice", "yes", "yesterday", 0.0),
        ({"choice": ["A", "B", "AB"]}, "AB", "**AB**: both", 1.0),
        ({"choice": ["A", "B", "AB"]}, "A", "AB", 0.0),
        ({"choice": ["yes", "no"]}, "yes", "I think yes", 0.0),
        ({"regex": r"Answer: (-?\d+)"}, "So. Answer: 7", "Answer: 7 apples", 1.0),
        ({"regex": r"Answer: (-?\d+)"}, "So. Answer: 7", "Answer: 70", 0.0),
        ({"regex": r"Answer: (-?\d+)"}, "seven", "Answer: 7", None),
        ({"regex": "please|thank"}, "whatever", "thank you", 1.0),
        ({"regex": "please|thank"}, "whatever", "no", 0.0),
    ],
)
def test_choice_and_regex(entry: Any, reference: str, answer: str, score: float | None) -> None:
    assert scored(entry, reference, answer) == [score]


def test_a_metric_that_no_reference_fits_is_refused() -> None:
    with pytest.raises(InputError, match=r"metrics, json: none of 1 held-out rows has such a reference") as caught:
        make_metrics(metric_specs(["json"]), [question("plain")])
    assert caught.value.seen == "'plain'"
    with pytest.raises(InputError, match="51 different references in 51 held-out rows are no choice"):
        make_metrics(metric_specs(["choice"]), [question(f"text {n}", n) for n in range(51)])


def answered(base: list[str], tuned: list[str], groups: list[str] | None = None) -> list[Answered]:
    sides = zip(base, tuned, groups or [None] * len(base), strict=True)  # type: ignore[list-item]
    nothing = Generated([], True)
    return [Answered(question("yes", n, g), nothing, nothing, b, t) for n, (b, t, g) in enumerate(sides)]


def test_right_and_wrong_rows_are_compared_by_mcnemars_test() -> None:
    rows = answered(["no"] * 8 + ["yes"] * 4, ["yes"] * 8 + ["yes"] * 3 + ["no"])
    score = measure(make_metrics(metric_specs(["choice"]), [one.question for one in rows]), rows)["choice"].to_json()
    assert (score["base"], score["tuned"], score["rows"]) == (4 / 12, 11 / 12, 12)
    assert score["p_value"] == pytest.approx(2 * (1 + 9) / 2**9)
    assert score["verdict"] == "better"
    spread = [1.0] * 8 + [0.0] * 3 + [-1.0]
    mean = sum(spread) / 12
    assert score["stderr"]["difference"] == pytest.approx(math.sqrt(sum((d - mean) ** 2 for d in spread) / 11 / 12))


def test_the_groups_of_the_split_are_the_units_of_a_score() -> None:
    groups = [str(row % 4) for row in range(12)]
    rows = answered(["no"] * 12, ["yes"] * 12, groups)
    score = measure(make_metrics(metric_specs(["choice"]), [one.question for one in rows]), rows)["choice"]
    assert (score.p_value, score.verdict) == (2 / 2**4, "inside the noise")


def test_scores_between_0_and_1_are_compared_by_sign_flips() -> None:
    score = MetricScore.of([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.2, 0.3, 0.4, 0.5, 0.6, 0.7], None)
    assert score.p_value == 2 / 2**6
    assert score.verdict == "better"


def test_names_of_scores_are_different() -> None:
    entries = [{"regex": "a"}, {"regex": "b"}, "exact_match", "choice"]
    assert [one.name for one in make_metrics(metric_specs(entries), [question("yes")])] == [
        "regex",
        "regex_2",
        "choice",
    ]
