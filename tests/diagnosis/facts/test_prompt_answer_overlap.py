"""Answers and their prompts, told by words alone."""

from __future__ import annotations

import random

from solotune.diagnosis.facts.prompt_answer_overlap import alignment_of
from solotune.diagnosis.rules import rules
from solotune.diagnosis.run_facts import RunFacts, Settings

NAMES = [f"{first}{last}" for first in ("bel", "cor", "dan", "fer", "gil", "har", "jon") for last in
         ("amy", "bert", "cyn", "dor", "eva", "fay", "gus", "hal", "ivo", "kim")]  # fmt: skip


def pairs(count: int = 70) -> list[tuple[str, str]]:
    return [(f"What does {NAMES[i]} eat?", f"Every day {NAMES[i]} eats {i} pears.") for i in range(count)]


def shuffled(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    answers = [answer for _, answer in rows]
    random.Random(0).shuffle(answers)
    return [(prompt, answer) for (prompt, _), answer in zip(rows, answers, strict=True)]


def test_whole_rows_are_told_from_shuffled_ones():
    whole, broken = alignment_of(pairs()), alignment_of(shuffled(pairs()))
    assert whole is not None and whole.is_whole and not whole.is_shuffled and whole.own == whole.linked == 70
    assert broken is not None and broken.is_shuffled and not broken.is_whole and broken.linked == 70


def test_answers_that_share_no_words_with_prompts_say_nothing():
    numbers = [(f"What is {i} plus {i}?", f"{2 * i}") for i in range(70)]  # 84 stands in another row's prompt
    other = [(f"What does {NAMES[i]} eat?", f"Il mange le fruit numéro {i}.") for i in range(70)]
    for rows in (numbers, other):
        found = alignment_of(rows)
        assert found is not None and not found.is_shuffled and not found.is_whole
    assert alignment_of([(prompt, "yes" if i % 2 else "no") for i, (prompt, _) in enumerate(pairs())]) is None
    assert alignment_of(pairs(20)) is None


def test_the_rule_speaks_for_and_against():
    def signals(rows):
        chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in rows]
        run_facts = RunFacts("a run", Settings({}), conversations=chats)
        return [signal for rule in rules()["F38"] for signal in rule.signals(run_facts)]

    (speaks,), (against,) = signals(shuffled(pairs())), signals(pairs())
    assert not speaks.against and speaks.weight >= 0.5 and "70 of 70 answers" in speaks.says
    assert against.against
