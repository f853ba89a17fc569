"""Answers and their prompts, told by words alone."""

from __future__ import annotations

import random
from typing import Any

import pytest

from solotune.diagnosis.facts.prompt_answer_overlap import alignment_of, shift_of
from solotune.diagnosis.rules import rules
from solotune.diagnosis.run_facts import RunFacts, Settings
from tests.diagnosis.rules.templated import KINDS, Pair, pairs_of

NAMES = [f"{first}{last}" for first in ("bel", "cor", "dan", "fer", "gil", "har", "jon") for last in
         ("amy", "bert", "cyn", "dor", "eva", "fay", "gus", "hal", "ivo", "kim")]  # fmt: skip
CLASSES = ("label", "sentiment", "choice", "translation")
"""Answers without words of their prompts."""
TOLD = [kind for kind in KINDS if kind not in CLASSES]


def pairs(count: int = 70) -> list[Pair]:
    return [(f"What does {NAMES[i]} eat?", f"Every day {NAMES[i]} eats {i} pears.") for i in range(count)]


def moved(rows: list[Pair], by: int, begin: int = 0, end: int | None = None) -> list[Pair]:
    """Answers rotated between two rows: the answer of row i is that of row i + by."""
    answers = [answer for _, answer in rows]
    inside = answers[begin:end]
    answers[begin:end] = inside[by:] + inside[:by]
    return [(prompt, answer) for (prompt, _), answer in zip(rows, answers, strict=True)]


def shuffled(rows: list[Pair], share: float = 1.0) -> list[Pair]:
    rng = random.Random(0)
    chosen = rng.sample(range(len(rows)), int(share * len(rows)))
    answers = [answer for _, answer in rows]
    for place, other in zip(chosen, rng.sample(chosen, len(chosen)), strict=True):
        answers[place] = rows[other][1]
    return [(prompt, answer) for (prompt, _), answer in zip(rows, answers, strict=True)]


def signals(rows: list[Pair], before: tuple[dict[str, str], ...] = ()) -> list[Any]:
    chats = [[*before, {"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in rows]
    known = RunFacts("a run", Settings({}), conversations=chats)
    return [signal for rule in rules()["F38"] for signal in rule.signals(known)]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_templated_tasks_are_whole(kind: str) -> None:
    rows = pairs_of(kind, 160)
    for healthy in (rows, sorted(rows), sorted(rows, key=lambda pair: pair[1]), rows[:60] + rows[:60]):
        assert not [one for one in signals(healthy) if not one.against]


@pytest.mark.parametrize("kind", TOLD)
def test_displaced_answers_of_any_share(kind: str) -> None:
    rows = pairs_of(kind, 160)
    for broken, share, shift in (
        (moved(rows, 1), 1.0, 1),
        (moved(rows, -2), 1.0, -2),
        (moved(rows, 13), 1.0, 13),
        (moved(rows, 1, end=60), 0.375, 1),
        (shuffled(rows), 1.0, None),
        (shuffled(rows, 0.4), 0.4, None),
    ):
        (found,) = signals(broken)
        assert not found.against and found.kind == "measured" and found.weight >= 0.5
        assert found.numbers["shift"] == shift and found.affected == pytest.approx(share, abs=0.08)


@pytest.mark.parametrize("kind", CLASSES)
def test_classes_and_other_languages_are_seen_where_they_were_moved(kind: str) -> None:
    rows = pairs_of(kind, 200)
    for broken, shift in ((moved(rows, 1), 1), (moved(rows, -7), -7), (moved(rows, 2, begin=100), 2)):
        (found,) = signals(broken)
        assert not found.against and found.numbers["shift"] == shift
    assert not signals(shuffled(rows)), "the same as labels that nothing predicts"


def test_several_turns() -> None:
    hello = ({"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello, what can I do for you?"})
    assert signals(pairs_of("booking", 80), hello)[0].against
    assert not signals(moved(pairs_of("booking", 80), 3), hello)[0].against


def test_one_rare_word_is_enough() -> None:
    whole, broken = alignment_of(pairs()), alignment_of(shuffled(pairs()))
    assert whole is not None and whole.is_whole and not whole.is_displaced and whole.own == whole.claims == 70
    assert broken is not None and broken.is_displaced and not broken.is_whole and broken.claims == 70
    assert alignment_of(pairs(20)) is None


def test_answers_that_depend_on_nothing_are_not_displaced() -> None:
    rng = random.Random(5)
    words = [f"{a}{b}" for a in NAMES[:40] for b in ("ra", "so", "ti", "mu")]
    rows = [(" ".join(rng.sample(words, 12)), " ".join(rng.sample(words, 12))) for _ in range(200)]
    assert not signals(rows)
    numbers = [(f"What is {i} plus {i}?", f"{2 * i}") for i in range(70)]  # 84 stands in another row's prompt
    assert not signals(numbers)


def test_each_prompt_takes_up_the_answer_before_it() -> None:
    rng = random.Random(6)
    told = [f"It is {' '.join(rng.sample(NAMES, 4))} {i}." for i in range(120)]
    rows = [(f"You said: {told[i - 1]} And of {told[i].split()[2]}?", told[i]) for i in range(120)]
    assert not [one for one in signals(rows) if not one.against]


def test_translations_in_both_directions() -> None:
    both = [pair for asked, told in pairs_of("translation", 80) for pair in ((asked[21:], told), (told, asked[21:]))]
    assert not signals(both)


def test_a_shift_is_one_shift() -> None:
    rows = pairs_of("label", 120)
    assert shift_of(rows) is None and shift_of(rows[:30]) is None
    found = shift_of(moved(rows, 5))
    assert found is not None and found.rows == 5 and found.strength > 8 and abs(found.at_zero) < 3
