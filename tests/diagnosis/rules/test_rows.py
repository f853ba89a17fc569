"""S8: each fault of the content of the rows is found, and no other."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from solotune.dataset import DataReport, Example
from solotune.diagnosis.facts.row_facts import RowFacts, RowSettings
from solotune.diagnosis.rules import rules
from solotune.diagnosis.rules.roles import headers_of_foreign_roles
from solotune.diagnosis.run_facts import RunFacts, Settings
from solotune.errors import InputError
from tests.dataset.conftest import chat, tiny_tokenizer
from tests.diagnosis.rules.rows import Bench, answered, each, sentence, talk
from tests.diagnosis.rules.templated import Pair, pairs_of


def test_f34_empty_answers(bench: Bench) -> None:
    found = bench.only("F34", answered(talk(), lambda n, text: "  " if n % 3 == 0 else text))
    assert found.evidence["dropped_as_empty"] == 14
    invisible = answered(talk(), lambda n, text: "\u200b" * (1 + n) if n % 3 == 0 else text)
    assert bench.codes(invisible) == ["F34", "F37"]  # both are true
    exported = bench.only("F34", answered(talk(), lambda n, text: "nan" if n % 5 == 0 else text))
    assert (found.severity, exported.severity) == ("error", "error")
    assert found.affected == pytest.approx(14 / 40)


def test_f34_empty_contents_in_the_rows_of_another_trainer(bench: Bench) -> None:
    """Which a mask may not show; a call has no content, and a row without a label has no answer to judge."""

    def emptied(rows: list[Example], **more: Any) -> list[Example]:
        return [
            replace(r, messages=[r.messages[0], {**r.messages[1], "content": "", **more}]) if n % 3 else r
            for n, r in enumerate(rows)
        ]

    assert bench.only("F34", talk(), "chatml", emptied).severity == "error"
    assert "F34" not in bench.codes(talk(), "chatml", lambda rows: emptied(rows, function_call={"name": "add"}))

    def lost(messages: list[dict[str, Any]]) -> list[str]:
        return bench.codes(
            talk(), "chatml", lambda rows: [replace(r, messages=messages, loss_mask=r.loss_mask & False) for r in rows]
        )

    assert not {"F34", "F35"} & {*lost([]), *lost([{"role": "agent", "content": "a"}])}


@pytest.mark.parametrize("answer", ["None", "n/a", "null", "  "])
def test_f34_what_extraction_finds_where_there_is_nothing_is_a_remark(bench: Bench, answer: str) -> None:
    rows = answered(talk(60), lambda n, text: answer if n % 9 == 0 else text)
    assert bench.only("F34", rows).severity == "warning"


@pytest.mark.parametrize("filler", ["...", "None", "-"])
def test_f34_fillers_among_long_answers(bench: Bench, filler: str) -> None:
    """A fifth of them: no row of an extraction, whose answers are short."""
    long = answered(talk(), lambda n, text: filler if n % 3 == 0 else f"{text} They cost {n} coins and {n + 3} more.")
    assert bench.only("F34", long).severity == "error"
    short = answered(talk(), lambda n, text: filler if n % 3 == 0 else f"item {n}")
    assert [found.severity for found in bench.find(short) if found.code == "F34"] == ["warning"]
    assert not bench.codes(answered(talk(), lambda n, text: "\U0001f44d" if n % 3 == 0 else text))


def test_f35_one_answer_for_all(bench: Bench) -> None:
    assert bench.only("F35", answered(talk(), lambda n, text: "Yes.")).severity == "error"
    refusal = "I am sorry, but I cannot help with that request."
    found = bench.only("F35", answered(talk(), lambda n, text: refusal if n % 3 == 0 else text))
    assert found.severity == "warning" and found.affected == pytest.approx(1 / 3, abs=0.1)
    assert "I am sorry" in found.message
    lost = bench.only("F35", answered(talk(), lambda n, text: refusal if n % 20 else text))
    assert (lost.severity, lost.is_statistic) == ("error", True)


def test_a_frequent_class_is_no_fault(bench: Bench) -> None:
    def told(n: int, text: str) -> str:
        return f"This transaction is {'suspicious, please look at it' if n == 7 else 'in order'}."

    assert [f.severity for f in bench.find(answered(talk(120), told)) if f.code == "F35"] in ([], ["warning"])
    rare = answered(talk(120), lambda n, text: "ham" if n not in (3, 70) else "spam")
    assert [f.severity for f in bench.find(rare) if f.code == "F35"] in ([], ["warning"])


def test_f34_empty_cells_among_labels(bench: Bench) -> None:
    """What a table writes for an empty cell is no class; among numbers it may be a result, and `none` is a class."""

    def found(*classes: str, other: str) -> list[Any]:
        rows = answered(talk(60), lambda n, text: other if n % 3 == 0 else classes[n % len(classes)])
        return [f.severity for f in bench.find(rows) if f.code == "F34"]

    assert found("good", "bad", other="nan") == ["error"]
    assert found("1.5", "22", other="nan") == [] == found("good", "bad", other="none")


def test_f36_turns(bench: Bench) -> None:
    twice = each(talk(), lambda n, m: [*m, m[0], {**m[0], "content": f"And {n}?"}, m[1]] if n % 4 == 0 else m)
    assert "same role" in bench.only("F36", twice).message and bench.only("F36", twice).severity == "warning"
    again = bench.only("F36", each(talk(), lambda n, m: [m[0], *m] if n % 4 == 0 else m))
    assert again.severity == "error" and "the same text" in again.message
    swap = {"user": "assistant", "assistant": "user"}
    exchanged = bench.only("F36", each(talk(), lambda n, m: [{**x, "role": swap[x["role"]]} for x in m]))
    assert "what the user says is not trained on" in exchanged.message
    assert (exchanged.severity, exchanged.affected) == ("error", 1.0)
    assert "role assistant" in exchanged.fix


def test_f36_a_lost_turn(bench: Bench) -> None:
    """An answer after an answer in half of the chats; thoughts before it, or a document and its question, are none."""
    lost = each(talk(turns=2), lambda n, m: [*m[:2], *m[3:]])
    found = bench.only("F36", lost)
    assert (found.severity, found.is_statistic) == ("error", True) and "is missing" in found.message
    (signal,) = signals_of_chats([row["messages"] for row in lost])
    assert (signal.code, signal.kind) == ("F36", "measured")
    thought = {"role": "assistant", "content": "<think>Two are left.</think>"}
    for change in (lambda n, m: [m[0], thought, m[1]], lambda n, m: [{**m[0], "content": f"The list {n}."}, *m]):
        chats = [row["messages"] for row in each(talk(), change)]
        assert [signal.kind for signal in signals_of_chats(chats)] == ["remark"]


def test_f36_a_lost_first_answer(bench: Bench) -> None:
    """The second question is worded as whole chats go on; one on a document before it is worded as a first question."""

    def bargain(n: int, kind: str) -> list[dict[str, Any]]:
        price = f"{n} coins, for figs of the {n % 9}th harvest."
        whole = chat(
            f"How much for {n} sacks of figs?", price, f"Too dear, I offer {n % 7}.", f"{n % 7}? So be it, {n}."
        )
        letter = {"role": "user", "content": f"Dear buyer, on day {n} our ships came in with figs and honey."}
        return {"whole": whole, "lost": [whole[0], *whole[2:]], "letter": [letter, *whole[:2]]}[kind]

    for kind, severity, signal in (("lost", "error", "measured"), ("letter", "warning", "remark")):
        chats = [bargain(n, kind if n % 4 else "whole") for n in range(80)]
        assert bench.only("F36", [{"messages": one} for one in chats]).severity == severity
        assert [found.kind for found in signals_of_chats(chats)] == [signal]


def test_f36_headers_of_foreign_roles(bench: Bench) -> None:
    """Rendered by another tool, with the names of the file."""
    tokenizer = tiny_tokenizer("chatml")

    def rows(user: str, assistant: str) -> list[Example]:
        made = []
        for number, row in enumerate(talk(20)):
            asked, told = (message["content"] for message in row["messages"])
            text = f"<|im_start|>{user}\n{asked}<|im_end|>\n<|im_start|>{assistant}\n{told}<|im_end|>\n"
            ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
            made.append(Example(ids, np.arange(len(ids)) > len(ids) // 2, f"row {number}", []))
        return made

    report = DataReport("text")
    settings = RowSettings(max_length=4096, overflow="truncate", assistant_only_loss=True)
    for user, assistant, count in (("human", "gpt", 20), ("user", "BOT", 20), ("user", "assistant", 0)):
        found = headers_of_foreign_roles(RowFacts(settings, tokenizer, rows(user, assistant), [], report, {}))
        assert (found.evidence["rows_with"] if found else 0) == count
    own = copy.deepcopy(tokenizer)
    own.chat_template = (
        "{% for m in messages %}<|im_start|>{{ {'user': 'human'}.get(m['role'], m['role']) }}\n{{ m['content'] }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert headers_of_foreign_roles(RowFacts(settings, own, rows("human", "assistant"), [], report, {})) is None
    named = [[{**m, "role": {"user": "human", "assistant": "gpt"}[m["role"]]} for m in r["messages"]] for r in talk(20)]
    for train, codes in ((rows("human", "gpt"), ["F36"]), (rows("user", "assistant"), [])):  # the second: translated
        known = RunFacts("test", Settings({}), tokenizer=tokenizer, train=train, conversations=named)
        assert [
            signal.code for rule in rules()["F36"] if not rule.reads_rows for signal in rule.signals(known)
        ] == codes


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


@pytest.mark.parametrize("shift", [-1, 1, 5])
def test_f38_answers_of_another_row(bench: Bench, shift: int) -> None:
    rows = each(talk(60), lambda n, m: [{**x, "content": "Please, " + x["content"]} for x in m])  # no rare word
    answers = [row["messages"][1]["content"] for row in rows]
    found = bench.only("F38", answered(rows, lambda n, text: answers[(n + shift) % 60]))
    assert (found.severity, found.is_statistic) == ("error", True)
    assert found.evidence["shift"] == shift
    assert found.affected is not None and found.affected > 0.9
    assert {-1: "previous row", 1: "next row", 5: "row 5 below"}[shift] in found.message


def test_f39_duplicates(bench: Bench) -> None:
    rows = [
        {"text": sentence(random.Random(n // 2), 150) + sentence(random.Random(100 + n), 150), "pair": n // 2}
        for n in range(40)
    ]
    found = bench.find(rows, "gpt2", max_length=200, split_by="pair")
    assert [f.code for f in found] == ["F24", "F39"]  # both are true
    assert found[1].evidence["equal_after_truncation"] == 15
    assert found[1].severity == "warning" and found[1].affected == pytest.approx(15 / 30, abs=0.1)
    assert bench.only("F39", talk(30) + talk(30)[:14]).severity == "info"
    assert bench.only("F39", talk(30) * 4).severity == "warning"
    assert bench.only("F39", talk(14) * 15).severity == "error"
    whole = bench.only(
        "F39", talk(14) * 15, dataset_exact_deduplication=False
    )  # equally often: nothing has more weight
    assert whole.severity == "error" and "every row is there 15 times" in whole.message
    some = [*talk(40), *talk(40)[:8] * 6]  # eight rows with seven times the weight
    assert bench.only("F39", some, dataset_exact_deduplication=False).severity == "info"
    labels = answered(talk(14), lambda n, text: ("yes", "no")[n % 2]) * 15
    assert bench.only("F39", labels).severity == "warning"


def copies(rows: list[Pair]) -> list[tuple[str, float | None]]:
    chats = [chat(*pair) for pair in rows]
    known = RunFacts("test", Settings({}), conversations=chats)
    return [(s.kind, s.affected) for rule in rules()["F39"] if not rule.reads_rows for s in rule.signals(known)]


def test_f39_copies_beyond_chance() -> None:
    rng = random.Random(0)
    booked, sums, labels = (pairs_of(kind, 100) for kind in ("booking", "arithmetic", "label"))
    for merged in (booked * 2, labels * 3, booked[:8] * 30, [rng.choice(booked[:10]) for _ in range(200)]):
        assert [kind for kind, _ in copies(merged)] == ["measured"]
    assert copies(booked * 4) == [("measured", 0.75)]
    natural = [rng.choice(sums) for _ in range(250)]  # as often as rows that are drawn from a hundred
    weighted = booked[:20] * 6 + booked[20:] + sums
    few_labels = [rng.choice(labels[:20]) for _ in range(300)]
    for healthy in (natural, weighted, few_labels):
        assert [kind for kind, _ in copies(healthy)] == ["remark"]
    assert copies(booked + booked[:10]) == []


def test_f39_a_few_rows_that_are_most_of_the_data() -> None:
    booked = pairs_of("booking", 100)
    assert [kind for kind, _ in copies(booked[:5] * 26 + booked[5:70])] == ["measured"]
    assert [kind for kind, _ in copies(booked[:15] * 13)] == ["measured"]
    greeting = [("Hi!", "Hello!")] * 130 + booked[:60]  # of two words
    assert [kind for kind, _ in copies(greeting)] == ["remark"]


def test_f39_of_another_trainer_whose_copies_were_removed_here(bench: Bench) -> None:
    rows = talk(60)
    tokenizer = tiny_tokenizer("chatml")
    made = bench.prepared(rows, tokenizer)[1].train
    chats = [row["messages"] for row in rows[:12] * 16 + rows[12:]]
    for tool, kinds in (("trl", ["measured"]), ("solotune", [])):
        known = RunFacts("test", Settings({"tool": tool}), tokenizer, train=list(made), conversations=chats)
        assert [s.kind for one in rules()["F39"] if not one.reads_rows for s in one.signals(known)] == kinds


def test_f36_rows_without_an_assistant(bench: Bench) -> None:
    """Of another trainer, whose template writes any role: no rule fails on them."""

    def renamed(rows: list[Example]) -> list[Example]:
        names = {"user": "human", "assistant": "gpt"}
        made = [replace(r, messages=[{**m, "role": names[m["role"]]} for m in r.messages]) for r in rows]
        return [replace(r, loss_mask=np.ones_like(r.loss_mask)) for r in made]

    assert bench.codes(talk(), "chatml", renamed) == []


def test_f36_rows_that_are_refused_for_their_role_names(bench: Bench) -> None:
    named = {"user": "customer", "assistant": "agent"}
    with pytest.raises(InputError) as refusal:
        bench.prepared(
            each(talk(), lambda n, m: [{**x, "role": named[x["role"]]} for x in m]), tiny_tokenizer("chatml")
        )
    assert refusal.value.fault == "F36"
