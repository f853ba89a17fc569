"""S8: each fault of the content of the rows is found, and no other."""

from __future__ import annotations

import random
from typing import Any

import pytest

from solotune.diagnosis.rules import rules
from solotune.diagnosis.run_facts import RunFacts, Settings
from tests.dataset.conftest import chat
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
    exchanged = bench.only("F36", each(talk(), lambda n, m: [{**x, "role": swap[x["role"]]} for x in m]))
    assert "what the user says is not trained on" in exchanged.message
    assert "role assistant" in exchanged.fix


GREETED = chat("Hello?", "Welcome to the shop!", "Any figs?", "Two.", "Thanks")[1:]
HEALTHY_TURNS = {
    "a greeting first, thanks last": lambda n, m: [*GREETED[:1], *m, *GREETED[-1:]],
    "an interview": lambda n, m: [m[1], m[0], m[3], m[2]],
    "a system turn in front": lambda n, m: [{"role": "system", "content": "Sell."}, *GREETED[:1], *m, *GREETED[-1:]],
}


@pytest.mark.parametrize("change", HEALTHY_TURNS.values(), ids=HEALTHY_TURNS)
def test_chats_that_begin_with_the_assistant_are_healthy(bench: Bench, change: Any) -> None:
    rows = each(talk(turns=2), change)
    assert bench.codes(rows) == []
    assert not signals_of_chats([row["messages"] for row in rows])


CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "stock", "arguments": {"kind": "figs"}}}],
}


@pytest.mark.parametrize("ends_with_answer", [True, False])
def test_a_call_its_result_and_the_answer_are_healthy(ends_with_answer: bool) -> None:
    after = [{"role": "tool", "content": '{"count": 2}'}, {"role": "assistant", "content": "Yes, two."}]
    chats = [[*chat(f"Any figs {n}?"), CALL, *(after if ends_with_answer else [])] for n in range(24)]
    assert not signals_of_chats(chats)
    twice = [[*one, CALL, one[-1]] for one in chats]
    assert [signal.code for signal in signals_of_chats([[one[0], *one] for one in twice])] == ["F36"]


def signals_of_chats(chats: list[list[dict[str, Any]]]) -> list[Any]:
    """Signals of F34 and F36 where only the conversations are known."""
    known = RunFacts("test", Settings({}, {}), conversations=chats)
    asked = [found for code in ("F34", "F36") for found in rules()[code] if not found.reads_rows]
    return [signal for found in asked for signal in found.signals(known)]


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
