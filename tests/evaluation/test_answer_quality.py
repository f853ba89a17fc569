"""What answers are like: do they end, repeat themselves, copy training answers?"""

from __future__ import annotations

import numpy as np
import pytest

from solotune.dataset import Example
from solotune.evaluation.answer_quality import answer_quality, repetition
from solotune.evaluation.answers import Answered, Question
from solotune.evaluation.generation import Generated


def answered(base: Generated, tuned: Generated, reference: list[int]) -> Answered:
    return Answered(Question("a:1", "a:1", [1], "Q?", "R", reference, True), base, tuned, "", "")


def training_row(prompt: list[int], answer: list[int]) -> Example:
    mask = np.arange(len(prompt) + len(answer)) >= len(prompt)
    return Example(np.asarray([*prompt, *answer], np.int32), mask, "t:1", [])


def test_repetition_is_the_share_of_4_grams_said_before() -> None:
    assert repetition([1, 2, 3]) is None
    assert repetition(list(range(10))) == 0
    assert repetition([7] * 13) == pytest.approx(1 - 1 / 10)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 - 4 / 5)


def test_copied_answers_are_seen_and_copied_prompts_are_not() -> None:
    known, other = list(range(20, 36)), list(range(50, 66))
    rows = [training_row(other, known), training_row([1, 2], [9] * 3)]
    copied, own = Generated(known, True), Generated(other, False)
    found = answer_quality([answered(own, copied, known[:8] + other[:8])], rows)
    assert found is not None
    assert (found["rows"], found["training_rows"]) == (1, 2)
    assert found["tuned"] == {"stop_rate": 1.0, "repetition": 0.0, "overlap": 1.0}
    assert found["base"] == {"stop_rate": 0.0, "repetition": 0.0, "overlap": 0.0}
    assert found["reference"] == {"stop_rate": None, "repetition": 0.0, "overlap": pytest.approx(1 / 9)}


def test_the_order_of_tokens_counts() -> None:
    known = list(range(20, 28))
    found = answer_quality(
        [answered(Generated(known[::-1], True), Generated(known, True), [])], [training_row([1], known)]
    )
    assert found is not None
    assert (found["base"]["overlap"], found["tuned"]["overlap"], found["reference"]["overlap"]) == (0.0, 1.0, None)


def test_nothing_is_said_without_answers() -> None:
    assert answer_quality([], []) is None
