"""S8: each fault of the content of the rows is found, and no other."""

from __future__ import annotations

import random

import pytest

from tests.diagnosis.rules.rows import Bench, answered, each, sentence, talk


def test_f34_empty_answers(bench: Bench) -> None:
    found = bench.only("F34", answered(talk(), lambda n, text: "  " if n % 3 == 0 else text))
    assert found.evidence["dropped_as_empty"] == 14
    invisible = answered(talk(), lambda n, text: "\u200b" * (1 + n) if n % 3 == 0 else text)
    assert bench.codes(invisible) == ["F34", "F37"]  # both are true
    assert bench.only("F34", answered(talk(), lambda n, text: "nan" if n % 5 == 0 else text))


def test_f35_one_answer_for_all(bench: Bench) -> None:
    assert bench.only("F35", answered(talk(), lambda n, text: "Yes.")).severity == "error"
    refusal = "I am sorry, but I cannot help with that request."
    found = bench.only("F35", answered(talk(), lambda n, text: refusal if n % 3 == 0 else text))
    assert found.severity == "warning"
    assert "I am sorry" in found.message


def test_f36_turns(bench: Bench) -> None:
    twice = each(talk(), lambda n, m: [*m, m[0], {**m[0], "content": f"And {n}?"}, m[1]] if n % 4 == 0 else m)
    assert "same role" in bench.only("F36", twice).message
    swap = {"user": "assistant", "assistant": "user"}
    swapped = each(talk(turns=2), lambda n, m: [{**x, "role": swap[x["role"]]} for x in m])
    assert "swapped" in bench.only("F36", swapped).message


@pytest.mark.parametrize("shift", [-1, 1])
def test_f38_answers_of_the_neighbour(bench: Bench, shift: int) -> None:
    rows = each(talk(60), lambda n, m: [{**x, "content": "Please, " + x["content"]} for x in m])  # no rare word
    answers = [row["messages"][1]["content"] for row in rows]
    found = bench.only("F38", answered(rows, lambda n, text: answers[(n + shift) % 60]))
    assert found.evidence["matches_own"] < found.evidence["rows_compared"] / 4
    assert ("previous" if shift == -1 else "next") in found.message


def test_f39_duplicates(bench: Bench) -> None:
    rows = [
        {"text": sentence(random.Random(n // 2), 150) + sentence(random.Random(100 + n), 150), "pair": n // 2}
        for n in range(40)
    ]
    found = bench.find(rows, "gpt2", max_length=200, split_by="pair")
    assert [f.code for f in found] == ["F24", "F39"]  # both are true
    assert found[1].evidence["equal_after_truncation"] == 15
    assert bench.only("F39", talk(30) + talk(30)[:14]).severity == "info"
    assert bench.only("F39", talk(30) * 4).severity == "warning"
