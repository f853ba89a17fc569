"""Reasoning is learned under each of its names; what cannot be read is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from solotune.dataset.chat.formats import Record
from tests.dataset.chat.advice import after_advice, read, refused
from tests.dataset.chat.test_formats import A, U

THOUGHT = {**A, "reasoning_content": "hm"}


def messages_of(*messages: dict[str, Any], **columns: Any) -> list[dict[str, Any]]:
    record = read({"messages": list(messages), **columns})
    assert isinstance(record, Record)
    return record.messages


@pytest.mark.parametrize(
    "written",
    [
        {"thinking": "hm"},
        {"reasoning": "hm"},
        {"reasoning_content": "hm"},
        {"thought": "hm"},
        {"thoughts": "hm"},
        {"thoughts": ["h", "m"]},
        {"reasoningContent": "hm"},
        {"Thinking": "hm"},
        {"thinking": "hm", "reasoning": " hm\n"},
        {"thinking": "hm", "reasoning": None, "reasoning_content": ""},
        {"reasoning_details": [{"type": "reasoning.text", "text": "h", "index": 0}, {"type": "reasoning.text", "text": "m"}]},
        {"reasoning": "hm", "reasoning_details": [{"type": "reasoning.summary", "summary": "hm"}]},
        {"thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "x"}]},
        {"content": [{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "a"}]},
        {"content": [{"type": "reasoning", "text": "hm"}, {"type": "output_text", "text": "a"}], "reasoning": "hm"},
    ],
)  # fmt: skip
def test_a_thought_under_each_name(written: dict[str, Any]) -> None:
    found = messages_of(U, {**A, **written})
    assert [
        {**message, "reasoning_content": message.get("reasoning_content", "").strip()} for message in found[1:]
    ] == [THOUGHT]


def test_sharegpt_turns_have_thoughts_too() -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "thinking": "hm"}]
    record = read({"conversations": turns})
    assert isinstance(record, Record)
    assert record.messages == [U, THOUGHT]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([U, {**A, "thinking": "hm", "reasoning": "oh"}], "message 2: reasoning and thinking hold different reasoning\n"),
        ([U, {**A, "content": [{"type": "thinking", "thinking": "hm"}], "thinking": "oh"}],
         "message 2: reasoning_content and content hold different reasoning\n"),
        ([{**U, "thinking": "hm"}, A], "message 1: thinking on a message that is not an answer\n"),
        ([U, {**A, "thinking": True}], "message 2: thinking is not text\n  seen:    true\n"),
        ([U, {**A, "reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]}],
         "message 2: reasoning_details is not text\n"),
        ([U, {**A, "thinking": {"tokens": 3}}], "message 2: thinking is not text\n"),
    ],
)  # fmt: skip
def test_thoughts_that_cannot_be_read(messages: list[dict[str, Any]], message: str) -> None:
    assert refused({"messages": messages}).startswith(f"f.jsonl:1: {message}")


# --- in a column of its own


@pytest.mark.parametrize("key", ["thinking", "reasoning", "Reasoning Content", "thought"])
@pytest.mark.parametrize(
    "values", [{"instruction": "q", "output": "a"}, {"messages": [U, A]}, {"prompt": [U], "completion": [A]}], ids=str
)
def test_a_thought_beside_the_only_answer(values: dict[str, Any], key: str) -> None:
    record = read({**values, key: "hm"})
    assert isinstance(record, Record)
    assert record.messages == [U, THOUGHT]


def test_a_thought_that_the_answer_holds_already() -> None:
    answer = {**A, "content": "<think>\nhm\n</think>\na"}
    assert messages_of(U, answer, U, A, reasoning="hm") == [U, answer, U, A]


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"messages": [U, A, U, A], "thinking": "hm"}, "thinking in a row whose chat has 2 answers"),
        ({"messages": [U, THOUGHT], "thinking": "oh"}, "thinking in a row whose chat has 1 answer"),
        ({"messages": [U, A], "reasoning": "on"}, "reasoning is not a reasoning"),
        ({"messages": [U, A], "thinking": False}, "thinking is not a reasoning"),
        ({"messages": [U, A], "reasoning": 4.5}, "reasoning is not a reasoning"),
        ({"messages": [U, A], "thinking": {"a": 1}}, "thinking is not text"),
        ({"messages": [U, A], "thinking": "hm", "thought": "oh"}, "thinking and thought hold different reasoning"),
        ({"text": "a", "thinking": "hm"}, "thinking in a row of plain text"),
    ],
)  # fmt: skip
def test_a_thought_without_its_place_can_be_left_out(columns: dict[str, Any], problem: str) -> None:
    assert refused(columns).startswith(f"f.jsonl:1: {problem}")
    after_advice(columns, number=-1)


def test_a_thought_beside_plain_texts_becomes_part_of_a_chat() -> None:
    values = {"prompt": "q", "completion": "a", "thinking": "hm"}
    assert after_advice(values).messages == [U, THOUGHT]
    assert after_advice(values, number=1).text == "qa"
    held = read({**values, "completion": "<think>hm</think>a"})
    assert isinstance(held, Record)
