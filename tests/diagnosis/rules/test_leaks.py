"""S9: leaks of held-out rows are found, and rows of one task, which naturally share passages, are none."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from solotune.diagnosis.rules.leaks import leaked_rows
from tests.dataset.conftest import chat, tiny_tokenizer
from tests.diagnosis.rules.rows import Bench, find, sentence, talk
from tests.diagnosis.rules.templated import KINDS, Pair, facts_of, pairs_of

NUM_HELD = 40
SURE = "Sure! Here is what you asked for. I hope that it helps you, and do ask if anything is unclear. "


def sides(kind: str, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    pairs = pairs_of(kind, 240 + NUM_HELD, seed)
    return pairs[NUM_HELD:], pairs[:NUM_HELD]


def edited(text: str, rng: random.Random) -> str:
    words = text.split()
    for _ in range(max(1, len(words) // 12)):
        words[rng.randrange(len(words))] = "moreover"
    return " ".join(words)


def test_f43_validation_rows_of_training(bench: Bench) -> None:
    config, result = bench.prepared(talk(), tiny_tokenizer("chatml"))
    found = find(config, tiny_tokenizer("chatml"), result.train, result.train[:10], result.report)
    assert [(f.code, f.severity, f.affected) for f in found] == [("F43", "error", 1.0)]
    assert bench.only("F43", talk(), validation_size=0).severity == "info"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_templated_tasks_are_no_leak(kind: str, seed: int) -> None:
    train, held = sides(kind, seed)
    assert leaked_rows(facts_of(train, held)) is None
    small = leaked_rows(facts_of(train[:60], held[:12]))
    assert small is None, small


def test_a_common_beginning_and_short_answers_are_no_leak() -> None:
    pairs = [(sentence(random.Random(n), 9), SURE + sentence(random.Random(500 + n), 9)) for n in range(120)]
    assert leaked_rows(facts_of(pairs[30:], pairs[:30])) is None
    short = [(sentence(random.Random(n), 9), ("Yes.", "No, thanks.", "Maybe later.")[n % 3]) for n in range(120)]
    assert leaked_rows(facts_of(short[30:], short[:30])) is None


COPIES: dict[str, Callable[[Pair, random.Random], Pair]] = {
    "exact": lambda pair, rng: pair,
    "other case and spaces": lambda pair, rng: (pair[0].upper(), "  ".join(pair[1].lower().split()) + " "),
    "another prompt": lambda pair, rng: (f"Please do this: {edited(edited(pair[0], rng), rng)}", pair[1]),
    "edited": lambda pair, rng: (edited(pair[0], rng), edited(pair[1], rng)),
}


@pytest.mark.parametrize("share", [0.1, 0.4])
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", ["weather", "booking"])
def test_f44_copies_of_training_rows(kind: str, how: str, share: float) -> None:
    train, held = sides(kind)
    rng = random.Random(share)
    count = int(share * NUM_HELD)
    found = leaked_rows(facts_of(train, [COPIES[how](rng.choice(train), rng) for _ in range(count)] + held[count:]))
    assert found is not None and found.severity == "error" and found.is_statistic
    assert found.affected == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("kind", ["label", "sentiment", "choice", "translation", "arithmetic", "sql"])
def test_f44_exact_copies_of_rows_that_are_alike_anyway(kind: str) -> None:
    train, held = sides(kind)
    assert leaked_rows(facts_of(train, [*train[:12], *held[12:]])) is not None


def test_f44_passages_on_both_sides(bench: Bench) -> None:
    rng = random.Random(3)
    passages = [sentence(rng, 40) for _ in range(20)]
    turns = [(sentence(rng, 9), f"{passages[n // 2]} {sentence(rng, 9)}", *talk(1, seed=n)) for n in range(40)]
    rows = [
        {"messages": chat(asked, told) + more["messages"], "doc": n // 2} for n, (asked, told, more) in enumerate(turns)
    ]
    found = bench.only("F44", rows)
    assert found.severity == "error"
    assert found.evidence["rows_with"] >= 4
    assert "split_by" in found.fix
    assert bench.codes(rows, split_by="doc") == []
    # ids that say it, and ids that do not
    assert bench.codes([{**row, "id": f"c0DE{n // 2:02}_{n % 2}"} for n, row in enumerate(rows)]) == []
    assert bench.only("F44", [{**row, "id": f"2024_{n:02}"} for n, row in enumerate(rows)])


def test_one_document_under_several_questions(bench: Bench) -> None:
    rng = random.Random(3)
    documents = [sentence(rng, 40) for _ in range(20)]
    rows = [{"messages": chat(f"{documents[n // 2]} {sentence(rng, 40)}?", sentence(rng, 20))} for n in range(40)]
    assert bench.codes(rows) == []
