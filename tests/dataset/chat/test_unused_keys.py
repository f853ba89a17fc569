"""Each key that nothing reads is counted where it is; keys that are read, refused or blank are not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from solotune.dataset import prepare
from solotune.dataset.chat.formats import convert, recognise
from solotune.dataset.chat.messages import MEDIA_KEYS
from solotune.dataset.chat.reasoning import THOUGHT_KEYS
from solotune.dataset.chat.unused_keys import UnusedKeys
from solotune.dataset.chat.weights import MESSAGE_KEYS
from solotune.dataset.readers.row import Row
from solotune.errors import InputError
from tests.dataset.chat.test_columns import CHATS, TEXTS, TOOL
from tests.dataset.chat.test_formats import A, S, U
from tests.dataset.conftest import Door, Writer, config_of, tiny_tokenizer

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
FILLED = {"a": None, "b": "", "c": " \n", "d": [], "e": {}, "f": {"g": None, "h": [None, ""]}}


def unused(*rows: dict[str, Any]) -> list[str]:
    """`thinking_time in 1 of 2 assistant messages` for each key."""
    counts = UnusedKeys()
    for number, values in enumerate(rows, 1):
        row = Row(f"f.jsonl:{number}", values)
        found, _ = recognise([row])
        convert(row, found)
        counts.add(row, found)
    return [f"{one['key']} in {one['count']} of {one['of']} {one['in']}" for one in counts.to_json()]


@pytest.mark.parametrize("row", [*CHATS, *TEXTS], ids=str)
def test_keys_of_rows(row: dict[str, Any]) -> None:
    read = {"id": "x_1", "conversation_id": 3, "weight": 2, "train": True}
    assert unused({**row, **read, **FILLED}) == []
    assert unused({**row, "topic": "fruit", "score": 0}, row) == ["score in 1 of 2 rows", "topic in 1 of 2 rows"]
    assert unused({**row, "conversation": [1], "train": "the 9:15"}) == [
        "conversation in 1 of 1 rows",
        "train in 1 of 1 rows",
    ]


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"messages": [U, A], "prompt": "p", "text": "t", "context": "c"}, ["context", "prompt", "text"]),
        ({"instruction": "q", "output": "a", "text": "t"}, ["text"]),
        ({"prompt": "q", "completion": "a", "input": "i", "instruction": "x"}, ["input", "instruction"]),
        ({"text": "a", "input": "i", "context": "c", "images": ["i"]}, ["context", "images", "input"]),
        ({"messages": [U, A], "conversations": [U, A], "label": "x"}, ["conversations", "label"]),
    ],
)
def test_keys_of_another_format(row: dict[str, Any], names: list[str]) -> None:
    assert unused(row) == [f"{name} in 1 of 1 rows" for name in names]


def test_keys_of_messages() -> None:
    answer = {**A, "id": "m1", "timestamp": 3, "thinking": "hm", "weight": 1, "name": "n", **FILLED}
    turns = [{**S, "tools": [TOOL]}, {**U, "id": "m0"}, answer, U, A]
    expected = [
        "id in 1 of 2 assistant messages",
        "timestamp in 1 of 2 assistant messages",
        "id in 1 of 2 user messages",
    ]
    assert unused({"messages": turns}) == expected
    assert unused({"conversations": turns}) == expected
    assert unused({"prompt": turns[:2], "completion": turns[2:]}) == expected
    sharegpt = [
        {"from": "human", "value": "q", "lang": "en"},
        {"from": "gpt", "value": "a", "markdown": None, "text": "x"},
    ]
    assert unused({"conversations": sharegpt}) == ["text in 1 of 1 assistant messages", "lang in 1 of 1 user messages"]
    earlier = [U, {**A, "lang": "en"}]
    assert unused({"instruction": "q", "output": "a", "history": earlier}) == ["lang in 1 of 1 assistant messages"]


@pytest.mark.parametrize(
    "answer",
    [
        {"tool_calls": [{**CALL, "id": "c", "index": 1, "function": {**CALL["function"], "strict": True}}]},
        {"tool_calls": json.dumps([{**CALL, "index": 1, "function": {**CALL["function"], "strict": True}}])},
    ],
    ids=str,
)
def test_keys_of_tool_calls(answer: dict[str, Any]) -> None:
    assert unused({"messages": [U, {**A, **answer}]}) == [
        "strict in 1 of 1 functions of tool calls",
        "index in 1 of 1 tool calls",
    ]


def test_keys_of_calls_in_turns_and_parts() -> None:
    call = json.dumps({"name": "f", "arguments": {"x": 1}, "why": "y"})
    turns = [{"from": "human", "value": "q"}, {"from": "tool_call", "value": call}]
    assert unused({"conversations": turns}) == ["why in 1 of 1 tool calls"]
    parts = [
        {"type": "thinking", "thinking": "hm", "signature": "x"},
        {"type": "text", "text": "a", "citations": [1], "annotations": []},
        {"type": "tool_use", "id": "c", "name": "f", "input": {"x": 1}, "cache_control": {"type": "ephemeral"}},
    ]
    assert unused({"messages": [U, {"role": "assistant", "content": parts}]}) == [
        "cache_control in 1 of 3 content parts",
        "citations in 1 of 3 content parts",
        "signature in 1 of 3 content parts",
    ]


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_each_known_key_of_a_message_is_read_or_refused(role: str) -> None:
    """A key that the counter calls read has a reader that looks at it."""
    known = [*THOUGHT_KEYS, *MESSAGE_KEYS, *MEDIA_KEYS, "tools", "functions", "tool_calls", "function_call"]
    for key in known:
        told = {"role": role, "content": "x", key: {"odd": "value"}}
        with pytest.raises(InputError):
            unused({"messages": [told, U, A]})


def test_a_new_key_in_each_row_does_not_fill_the_memory() -> None:
    found = unused(*({"text": "a", f"key{n}": n, "k" * 999: 1} for n in range(700)))
    assert len(found) <= 501
    assert found[0] == "k" * 57 + "... in 700 of 700 rows"
    assert found[1] == "other keys in 201 of 700 rows"


# --- in the report


def test_the_report_names_them(write: Writer) -> None:
    rows = [
        {"messages": [U, {**A, "content": f"a{n}", "id": n}], "id": n, "topic": "t", "shop": n % 2} for n in range(4)
    ]
    own = write("own.jsonl", {"messages": [{**U, "content": "other"}, {**A, "lang": "en"}], "seen": 1})
    config = config_of(
        write("a.jsonl", *rows), eval_dataset=str(own), split_by=None, column_mapping={"topic": "ignore"}
    )
    report = prepare(config, tiny_tokenizer("chatml")).report
    assert report.unused_in_words() == (
        "id in 4 of 5 assistant messages, shop in 4 of 5 rows, lang in 1 of 5 assistant messages, seen in 1 of 5 rows"
    )
    assert report.to_json()["unused_keys"] == {"id": 4, "shop": 4, "lang": 1, "seen": 1}
    assert report.to_json()["unused"][0] == {"key": "id", "in": "assistant messages", "count": 4, "of": 5}


@pytest.mark.parametrize("mapping", [{}, {"shop": "conversation_id"}])
def test_the_column_of_split_by_is_read(write: Writer, mapping: dict[str, str]) -> None:
    rows = [{"text": f"a{n}", "shop": n % 2} for n in range(4)]
    config = config_of(write("a.jsonl", *rows), split_by="shop", validation_size=2, column_mapping=mapping)
    assert prepare(config, tiny_tokenizer("chatml")).report.unused == []


def test_rows_that_are_dropped_are_not_counted(write: Writer) -> None:
    rows = [{"messages": [U, A], "topic": "t"}, {"messages": [U], "topic": "t", "other": 1}]
    report = prepare(config_of(write("a.jsonl", *rows), on_bad_row="drop"), tiny_tokenizer("chatml")).report
    assert report.unused_in_words() == "topic in 1 of 1 rows"


def test_a_long_list_is_cut_in_the_line(write: Writer) -> None:
    report = prepare(
        config_of(write("a.jsonl", {"text": "a", **{f"k{n:02}": 1 for n in range(20)}})), tiny_tokenizer("chatml")
    ).report
    assert report.unused_in_words().endswith("k11 in 1 of 1 rows, and 8 more keys")
    assert len(report.to_json()["unused_keys"]) == 20


def test_data_prints_one_line(door: Door, write: Writer) -> None:
    rows = [{"messages": [U, {**A, "content": f"a{n}", "lang": "en"}]} for n in range(4)]
    content = door(str(write("a.jsonl", *rows))).content
    assert content["unused_keys"] == {"lang": 4}
    assert "\nnot used  lang in 4 of 4 assistant messages\n" in door.text(str(write("a.jsonl", *rows)))
