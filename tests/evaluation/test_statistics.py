"""Standard errors over groups, and paired tests."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from solotune.evaluation.compare import Evaluation
from solotune.evaluation.scores import Score
from solotune.evaluation.statistics import (
    independent,
    loss_difference_p,
    mcnemar_p,
    ratio_and_stderr,
    sign_flip_p,
    student_p,
    verdict,
)


def test_copies_of_a_row_add_no_certainty():
    rng = np.random.default_rng(0)
    sums, weights = rng.normal(5, 1, 40).tolist(), [3.0] * 40
    once = ratio_and_stderr(sums, weights)
    groups = [str(row) for row in range(40)] * 3
    assert ratio_and_stderr(sums * 3, weights * 3, groups) == pytest.approx(once)
    assert ratio_and_stderr(sums * 3, weights * 3)[1] < 0.6 * once[1]  # as if the copies were rows of their own


def test_one_group_has_no_standard_error():
    assert ratio_and_stderr([1.0, 2.0], [1.0, 1.0], ["a", "a"]) == (1.5, math.inf)


def test_standard_error_over_groups_is_the_spread_of_many_samples():
    rng = np.random.default_rng(1)
    ratios, errors = [], []
    for _ in range(400):
        level_G = rng.normal(0, 1, 50)
        groups = [str(g) for g in range(50) for _ in range(4)]
        sums = (2 + np.repeat(level_G, 4) + rng.normal(0, 0.3, 200)).tolist()
        ratio, stderr = ratio_and_stderr(sums, [1.0] * 200, groups)
        ratios.append(ratio)
        errors.append(stderr)
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.1)


def test_p_of_few_groups_counts_all_sign_flips():
    values = [0.5, -0.2, 0.9, 0.3]
    flips = [abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in product((1, -1), repeat=4)]
    assert sign_flip_p(values) == sum(flip >= sum(values) - 1e-9 for flip in flips) / 16


def test_five_groups_are_never_significant_and_six_can_be():
    assert sign_flip_p([1.0] * 5) == 2 / 2**5
    assert sign_flip_p([1.0] * 6) == 2 / 2**6
    assert sign_flip_p([1.0] * 60, [str(row % 5) for row in range(60)]) == 2 / 2**5


def test_false_alarms_stay_at_the_level():
    rng = np.random.default_rng(2)
    groups = [str(row // 3) for row in range(90)]
    alarms = {"grouped": 0, "by row": 0}
    for _ in range(300):
        differences = (np.repeat(rng.standard_t(3, 30), 3) + 0.2 * rng.normal(size=90)).tolist()
        alarms["grouped"] += sign_flip_p(differences, groups) < 0.05
        alarms["by row"] += sign_flip_p(differences) < 0.05
    assert alarms["grouped"] <= 300 * 0.05 + 2 * math.sqrt(300 * 0.05 * 0.95)
    assert alarms["by row"] > 60  # what the groups are for


@pytest.mark.parametrize(("degrees", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776)])
def test_students_t_at_its_tabled_5_percent(degrees: int, t: float):
    assert student_p(t, degrees) == student_p(-t, degrees) == pytest.approx(0.05, abs=5e-5)


def test_few_groups_are_tested_by_their_spread_and_not_by_their_rows():
    groups = [str(row // 10) for row in range(40)]
    agree, scatter = ([-0.5, -0.6, -0.55, -0.5], [-0.5, 0.4, -0.9, -0.6])
    p_agree, p_scatter = (
        loss_difference_p([shift for shift in shifts for _ in range(10)], [1.0] * 40, groups)
        for shifts in (agree, scatter)
    )
    assert p_agree < 0.001
    assert p_scatter > 0.2 > 0.05 > sign_flip_p([shift for shift in scatter for _ in range(10)])


def test_equal_groups_have_no_spread_to_test_by():
    assert loss_difference_p([-1.0] * 4, [1.0] * 4, list("aabb")) == 2 / 2**2


def test_false_alarms_of_few_groups_stay_at_the_level():
    rng = np.random.default_rng(3)
    groups, alarms = [str(row // 5) for row in range(20)], 0
    for _ in range(600):
        differences = (np.repeat(rng.normal(size=4), 5) + 0.3 * rng.normal(size=20)).tolist()
        alarms += loss_difference_p(differences, [1.0] * 20, groups) < 0.05
    assert alarms <= 600 * 0.05 + 2 * math.sqrt(600 * 0.05 * 0.95)


def test_exact_match_of_single_rows_is_mcnemars_exact_test():
    base = [True] * 10 + [False] * 9 + [True] * 1
    tuned = [True] * 10 + [True] * 9 + [False] * 1
    assert mcnemar_p(base, tuned) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar_p(base, base) == 1.0
    assert sign_flip_p([int(t) - int(b) for b, t in zip(base, tuned, strict=True)]) == mcnemar_p(base, tuned)


def test_exact_match_of_groups_counts_groups():
    base, tuned = [False] * 20, [True] * 20
    assert mcnemar_p(base, tuned) < 1e-5
    assert mcnemar_p(base, tuned, [str(row % 4) for row in range(20)]) == 2 / 2**4


def test_groups_are_the_units_unless_there_is_only_one():
    assert independent(list("aaabbb")) == list("aaabbb")
    assert independent(list("aaaaaa")) is None
    assert independent(list("abcdefgh")) is None  # each row is a group of its own


@pytest.mark.parametrize(
    ("difference", "p", "said"),
    [(-0.1, 0.01, "better"), (0.1, 0.01, "worse"), (-0.1, 0.2, "inside the noise"), (0.0, 0.0, "inside the noise")],
)
def test_verdict(difference: float, p: float, said: str):
    assert verdict(difference, p) == said


def evaluation(base: list[float], tuned: list[float]) -> Evaluation:
    scores = [
        Score(sum(each) / len(each), 0.1, 9, 0.0, 0.0, len(each), tuple(each), (1.0,) * len(each), (False,) * len(each))
        for each in (base, tuned)
    ]
    return Evaluation(*scores, [])


@pytest.mark.parametrize(
    ("base", "tuned", "said"),
    [
        ([2.0, 2.4] * 4, [0.5, 0.7] * 4, "tuned is better than base on held-out rows: its loss per token is lower by 1.6000 ± 0.0378 (paired test, p = 0.0078)"),
        ([0.5, 0.7] * 4, [2.0, 2.4] * 4, "tuned is worse than base on held-out rows: its loss per token is higher by 1.6000 ± 0.0378 (paired test, p = 0.0078)"),
        ([2.0, 2.4] * 4, [2.2, 2.2] * 4, "no clear difference between tuned and base on held-out rows (paired test, p = 1.00)"),
        ([2.0], [0.5], "no clear difference between tuned and base on held-out rows (paired test, p = 1.00)"),
    ],
)  # fmt: skip
def test_the_verdict_says_which_is_better_as_far_as_the_rows_can_tell(base, tuned, said: str):
    assert evaluation(base, tuned).verdict_in_words == said
