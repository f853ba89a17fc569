"""A row of no known format is refused with a mapping that reads it, and that keeps what stands beside the answer."""

from __future__ import annotations

from typing import Any

import pytest

from solotune.dataset.chat.format_hints import unknown_format
from solotune.dataset.readers.row import Row
from tests.dataset.chat.advice import after_advice, mappings_in, refused
from tests.dataset.chat.test_formats import A, S, U

CHAT, TURNS = [U, A], [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize("names", ["question answer", "query response", "input output", "Prompt Completion",
                                   "problem solution", "user assistant", "instruction response", "source target",
                                   "Question Answer"])  # fmt: skip
def test_questions_and_answers(names: str) -> None:
    question, answer = names.split()
    record = after_advice({question: "q", answer: "a", "id": 3})
    assert record.text == "qa" if not record.is_chat else record.messages == CHAT


@pytest.mark.parametrize(
    ("beside", "messages"),
    [
        ({"context": "c"}, [{**U, "content": "q\n\nc"}, A]),
        ({"Passage": "c"}, [{**U, "content": "q\n\nc"}, A]),
        ({"schema": "c", "title": "t"}, [{**U, "content": "q\n\nc"}, A]),
        ({"system_prompt": "s"}, [S, U, A]),
        ({"history": [["h", "g"]]}, [{**U, "content": "h"}, {**A, "content": "g"}, U, A]),
        ({"thinking": "hm"}, [U, {**A, "reasoning_content": "hm"}]),
        ({"Complex_CoT": "hm"}, [U, {**A, "reasoning_content": "hm"}]),
        ({"cot": "hm", "context": "c"}, [{**U, "content": "q\n\nc"}, {**A, "reasoning_content": "hm"}]),
    ],
    ids=str,
)
@pytest.mark.parametrize("names", ["question answer", "Question Response", "instruction response", "prompt response"])
def test_what_stands_beside_is_kept(names: str, beside: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    question, answer = names.split()
    assert after_advice({question: "q", answer: "a", **beside}).messages == messages


@pytest.mark.parametrize("key", ["Messages", "conversation", "dialog", "dialogue", "chat", "turns"])
@pytest.mark.parametrize("turns", [CHAT, TURNS], ids=["role", "from"])
def test_chats_under_other_names(key: str, turns: Any) -> None:
    assert after_advice({key: turns}).messages == CHAT


def test_requests_and_replies_as_lists_of_messages() -> None:
    assert after_advice({"input": [U], "output": [A], "latency": 1.2}).messages == CHAT
    assert after_advice({"contents": [{"role": "user", "parts": [{"text": "q"}]},
                                      {"role": "model", "parts": [{"text": "a"}]}],
                         "systemInstruction": {"parts": [{"text": "s"}]}}).messages == [S, U, A]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "change"),
    [
        ({"dialogue": ["q", "a"]}, "dialogue is a list of texts, which does not say who speaks"),
        ({"title": "t", "mapping": {"a": {}}}, "write what mapping holds as texts"),
        ({"context": "c", "question": "q", "answers": {"text": ["a"]}}, "write what answers holds as texts"),
        ({"a b": "x"}, "rename your columns"),
    ],
)
def test_what_no_mapping_can_read(values: dict[str, Any], change: str) -> None:
    message = refused(values)
    assert f"change:  {change}" in message
    assert "header" not in message


def test_a_table_may_lack_its_header() -> None:
    assert "add one: prompt,completion" in str(unknown_format(Row("f.csv:2", {"How many?": "3", "0": "4"})))


@pytest.mark.parametrize("key", ["Text", "content", "body"])
def test_texts_under_other_names(key: str) -> None:
    assert after_advice({key: "a", "url": "u"}).text == "a"


def test_alpaca_in_another_case() -> None:
    assert after_advice({"Instruction": "q", "Input": "", "Output": "a"}).messages == CHAT


@pytest.mark.parametrize(
    "column", ["user input", "a: b", "#1", "yes", "-", "mon premier été", 'a"b', "a,b", "x}", " x"]
)
def test_columns_that_yaml_has_to_quote(column: str) -> None:
    message = refused({column: [U, A], "question": "q", "rejected": None, "answer": "a"})
    assert mappings_in(message) == [{"question": "prompt", "answer": "completion"}]
    values = {"messages": [U, A], column: "s"}
    message = refused(values, {column: "text"})
    assert mappings_in(message) == [{column: "ignore"}]
