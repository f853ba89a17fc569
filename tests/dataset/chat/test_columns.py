"""System prompts, tools, earlier turns and context in columns of their own are read in every format, or refused there."""

from __future__ import annotations

import json
from typing import Any

import pytest

from solotune.dataset.chat.formats import Record
from solotune.errors import InputError
from tests.dataset.chat.advice import after_advice, mappings_in, read, refused
from tests.dataset.chat.test_formats import A, S, U

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CHATS: list[dict[str, Any]] = [
    {"messages": [U, A]},
    {"conversations": [U, A]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"instruction": "q", "output": "a"},
    {"instruction": "q", "input": "", "output": "a"},
    {"prompt": [U], "completion": [A]},
    {"prompt": "q", "completion": [A]},
    {"prompt": [U], "completion": "a"},
]
TEXTS: list[dict[str, Any]] = [{"prompt": "q", "completion": "a"}, {"text": "a"}]


def chat_of(values: dict[str, Any], mapping: dict[str, str] | None = None) -> Record:
    record = read(values, mapping)
    assert isinstance(record, Record)
    return record


# --- system prompts


@pytest.mark.parametrize("chat", CHATS, ids=str)
@pytest.mark.parametrize("key", ["system", "system_prompt", "sys", "System Prompt", "systemPrompt", "system_message"])
def test_a_system_column_stands_in_front_of_each_chat(chat: dict[str, Any], key: str) -> None:
    assert chat_of({**chat, key: "s"}).messages == [S, U, A]


@pytest.mark.parametrize("chat", CHATS, ids=str)
def test_a_mapped_system_column_in_every_format(chat: dict[str, Any]) -> None:
    assert chat_of({**chat, "persona": "s"}, {"persona": "system"}).messages == [S, U, A]


@pytest.mark.parametrize("blank", [None, "", " \n"])
def test_a_blank_system_column_is_no_turn(blank: str | None) -> None:
    for chat in CHATS:
        assert chat_of({**chat, "system": blank}).messages == [U, A]


@pytest.mark.parametrize("written", [[{"text": "s"}], {"parts": [{"text": "s"}]}, {"text": "s"}, ["s"]], ids=str)
def test_a_system_prompt_in_parts(written: Any) -> None:
    record = read({"messages": [U, A], "system": written})
    assert isinstance(record, Record)
    assert record.messages == [S, U, A]
    assert "system is not text" in refused({"messages": [U, A], "system": [{"image": "x"}]})


def test_a_chat_with_a_system_turn_of_its_own() -> None:
    assert chat_of({"system": "s ", "messages": [S, U, A]}).messages == [S, U, A]
    assert chat_of({"system": "s", "messages": [{**S, "content": " "}, U, A]}).messages == [S, U, A]
    values = {"sys": "other", "messages": [S, U, A]}
    assert refused(values) == (
        "f.jsonl:1: sys differs from the system turn that the chat begins with\n"
        '  seen:    "other" and "s"\n'
        "  allowed: one system prompt for a chat\n"
        "  change:  to use the chat's own, set column_mapping: {sys: ignore}; or remove that turn"
    )
    assert after_advice(values).messages == [S, U, A]
    assert "differ" in refused({"sys": "s", "system": "other", "messages": [U, A]})
    assert "system is not text" in refused({"system": 3, "messages": [U, A]})


# --- tools


@pytest.mark.parametrize("key", ["tools", "tool_defs", "functions", "tool_definitions", "toolDefs"])
@pytest.mark.parametrize(
    "written",
    [[TOOL], json.dumps([TOOL]), TOOL, json.dumps(TOOL), [json.dumps(TOOL)], [TOOL["function"]], TOOL["function"]],
    ids=str,
)
def test_tools_under_each_name_in_each_form(key: str, written: Any) -> None:
    for chat in CHATS:
        assert chat_of({**chat, key: written}).tools == [TOOL]


def test_tools_in_the_system_turn() -> None:
    told = {**S, "tools": json.dumps([TOOL])}
    record = chat_of({"messages": [told, U, A]})
    assert (record.tools, record.messages) == ([TOOL], [S, U, A])
    assert chat_of({"messages": [told, U, A], "functions": [TOOL]}).tools == [TOOL]
    assert "tools and functions differ" in refused({"messages": [U, A], "tools": [TOOL], "functions": [{"name": "g"}]})
    assert "tools on a message that is not an answer" in refused({"messages": [{**U, "tools": [TOOL]}, A]})
    assert "tools on an answer" in refused({"messages": [U, {**A, "tools": [TOOL]}]})


@pytest.mark.parametrize("written", [3, [1], {"a": 1}, "f(x)"], ids=str)
def test_what_is_no_tools(written: Any) -> None:
    values = {"messages": [U, A], "tool_defs": written}
    assert refused(values).startswith("f.jsonl:1: tool_defs is not ")
    assert after_advice(values).tools is None


# --- earlier turns

EARLIER = [{"role": "user", "content": "h"}, {"role": "assistant", "content": "g"}]


@pytest.mark.parametrize("key", ["history", "chat_history", "History"])
@pytest.mark.parametrize("written", [[["h", "g"]], json.dumps([["h", "g"]]), EARLIER, [["h", "g"], ["", " "]]], ids=str)
def test_history_is_earlier_turns(key: str, written: Any) -> None:
    record = chat_of({"instruction": "q", "output": "a", "system": "s", key: written})
    assert (record.messages, record.weights) == ([S, *EARLIER, U, A], ())
    mapped = chat_of({"instruction": "q", "output": "a", "past": written}, {"past": "history"})
    assert mapped.messages == [*EARLIER, U, A]


def test_history_keeps_the_weights_of_its_answers() -> None:
    earlier = [EARLIER[0], {**EARLIER[1], "train": False}]
    assert chat_of({"instruction": "q", "output": "a", "history": earlier}).weights == (0.0, 1.0)


@pytest.mark.parametrize("blank", [None, [], "", [["", ""]], [[None, None]]], ids=str)
def test_no_history(blank: Any) -> None:
    for chat in [*CHATS, *TEXTS]:
        read({**chat, "history": blank})
    assert chat_of({"instruction": "q", "output": "a", "history": blank}).messages == [U, A]


@pytest.mark.parametrize(
    "written", ["they spoke before", [["a"]], [["a", 1]], [["a", "b", "c"]], 3, {"a": "b"}], ids=str
)
def test_what_is_no_history(written: Any) -> None:
    values = {"instruction": "q", "output": "a", "history": written}
    assert refused(values).startswith("f.jsonl:1: history is not a list of earlier turns\n")
    assert after_advice(values).messages == [U, A]


# --- context, and Alpaca's blank parts


@pytest.mark.parametrize(
    ("parts", "prompt"),
    [
        ({"instruction": "", "input": "q"}, "q"),
        ({"instruction": " \n", "input": "q"}, "q"),
        ({"instruction": "q", "input": " \n"}, "q"),
        ({"instruction": "q", "input": None}, "q"),
        ({"instruction": "do", "input": "q"}, "do\n\nq"),
        ({"instruction": "do", "context": "q"}, "do\n\nq"),
        ({"instruction": "do", "input": "", "Context": "q"}, "do\n\nq"),
        ({"instruction": "do", "input": "q", "context": "q"}, "do\n\nq"),
        ({"instruction": "", "context": "q"}, "q"),
        ({"instruction": None, "input": "q"}, "q"),
        ({"instruction": "do", "context": ["p", "", "q"]}, "do\n\np\n\nq"),
    ],
)
def test_alpaca_prompts_have_no_blank_lines(parts: dict[str, Any], prompt: str) -> None:
    assert chat_of({**parts, "output": "a"}).messages == [{"role": "user", "content": prompt}, A]


def test_an_input_that_is_no_text_is_not_dropped() -> None:
    assert "input is int, not text" in refused({"instruction": "q", "input": 0, "output": "a"})
    both = {"instruction": "q", "input": "x", "context": "y", "output": "a"}
    assert refused(both).startswith("f.jsonl:1: input and context are both given\n")
    assert after_advice(both).messages[0]["content"] == "q\n\nx"


def test_a_context_beside_question_and_answer_is_kept() -> None:
    values = {"question": "q", "context": "c", "answer": "a"}
    kept = [{"role": "user", "content": "q\n\nc"}, A]
    assert after_advice(values).messages == kept
    to_texts = {"question": "prompt", "answer": "completion"}
    assert refused(values, to_texts).startswith("f.jsonl:1: context in a row of plain text, which cannot use it\n")
    assert after_advice(values, to_texts).messages == kept
    assert after_advice(values, to_texts, number=1).text == "qa"
    assert chat_of(values, {"question": "instruction", "answer": "output"}).messages == kept
    several = {**values, "context": ["c", "d"]}
    assert after_advice(several).messages == after_advice(several, to_texts).messages
    assert after_advice(several).messages[0]["content"] == "q\n\nc\n\nd"
    assert "part of a chat" not in refused({**values, "context": {"title": "t"}}, to_texts)
    held = chat_of({**values, "question": "c q"}, to_texts)
    assert held.text == "c qa"


# --- what a format has no place for


@pytest.mark.parametrize(
    "column", [{"system": "s"}, {"tools": [TOOL]}, {"history": [["h", "g"]]}, {"reasoning": "hm"}], ids=str
)
def test_columns_beside_plain_text(column: dict[str, Any]) -> None:
    for text in TEXTS:
        values = {**text, **column}
        assert refused(values).startswith(
            f"f.jsonl:1: {next(iter(column))} in a row of plain text, which cannot use it\n"
        )
        assert after_advice(values, number=-1).text == ("qa" if "prompt" in text else "a")
    record = after_advice({**TEXTS[0], **column})
    assert record.is_chat
    assert record.tools or len(record.messages) > 2 or "reasoning_content" in record.messages[1]


@pytest.mark.parametrize("name", ["chat_template_kwargs", "enable_thinking", "reasoning_effort"])
@pytest.mark.parametrize("value", [{"enable_thinking": False}, False, "low"], ids=str)
def test_arguments_of_the_template(name: str, value: Any) -> None:
    for chat in [*CHATS, *TEXTS]:
        values = {**chat, name: value}
        assert refused(values).startswith(f"f.jsonl:1: {name} is for the chat template, and rows cannot set it\n")
        after_advice(values)
        read({**chat, name: None})


@pytest.mark.parametrize("chat", [chat for chat in CHATS if "instruction" not in chat], ids=str)
def test_history_beside_a_list_of_messages(chat: dict[str, Any]) -> None:
    values = {**chat, "history": [["h", "g"]]}
    assert refused(values).startswith("f.jsonl:1: history in a row that has a list of messages\n")
    assert after_advice(values).messages == [U, A]


# --- a column that was mapped to a name is wanted


@pytest.mark.parametrize("chat", [*CHATS, *TEXTS], ids=str)
@pytest.mark.parametrize(
    "name",
    ["messages", "conversations", "instruction", "input", "output", "prompt", "completion", "text", "system", "tools",
     "history", "reasoning_content", "weight", "train", "id", "conversation_id", "parent_id"],
)  # fmt: skip
def test_each_target_is_read_or_refused_in_each_format(chat: dict[str, Any], name: str) -> None:
    if name in chat or (name == "messages" and "conversations" in chat):
        return
    given = {
        "tools": [TOOL],
        "history": [["h", "g"]],
        "weight": 2,
        "train": True,
        "messages": [S, U, A],
        "conversations": [S, U, A],
    }
    values, mapping = {**chat, "mine": given.get(name, "x")}, {"mine": name}
    if name in ("weight", "train", "id", "conversation_id", "parent_id"):
        read(values, mapping)
        return
    try:
        record = read(values, mapping)
    except InputError:
        ways = mappings_in(refused(values, mapping))
        assert ways
        assert all(isinstance(read(values, way), Record) for way in ways)
        return
    assert isinstance(record, Record)
    plain = chat_of(chat)
    assert (record.messages, record.tools, record.text) != (plain.messages, plain.tools, plain.text), "not silent"
