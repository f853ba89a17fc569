"""Each format becomes messages; a row of another shape, or a wrong message, is named in words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from solotune.dataset.chat.formats import Record, check_shape, convert, recognise
from solotune.dataset.readers.row import Row
from solotune.errors import InputError
from tests.dataset.chat.advice import read, refused

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}


def rows(*values: dict[str, Any]) -> list[Row]:
    return [Row(f"f.jsonl:{number}", value) for number, value in enumerate(values, 1)]


def record_of(values: dict[str, Any]) -> tuple[str, Record | str]:
    (row,) = rows(values)
    found, _ = recognise([row])
    return found.name, convert(row, found)


def message_of(*values: dict[str, Any]) -> str:
    def convert_all() -> None:
        found, why = recognise(rows(*values))
        for row in rows(*values):
            check_shape(row, found, why)
            convert(row, found)

    with pytest.raises(InputError) as caught:
        convert_all()
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "name", "messages"),
    [
        ({"messages": [S, U, A]}, "messages", [S, U, A]),
        ({"conversations": [U, A]}, "messages", [U, A]),
        ({"prompt": "p", "prompt_id": "x", "messages": [U, A]}, "messages", [U, A]),
        ({"messages": [{**U, "content": [{"type": "text", "text": "q"}]}, A]}, "messages", [U, A]),
        ({"messages": [{**U, "name": None}, {**A, "weight": 1}]}, "messages", [U, A]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt", [U, A]),
        ({"system": "s", "conversations": [{"from": "user", "value": "q"}, {"from": "bing", "value": "a"}]},
         "sharegpt", [S, U, A]),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", [U, A]),
        ({"instruction": "q", "output": "a"}, "alpaca", [U, A]),
        ({"instruction": "do", "input": "it", "output": "a", "system": "s"}, "alpaca",
         [S, {"role": "user", "content": "do\n\nit"}, A]),
        ({"prompt": [S, U], "completion": [A]}, "prompt-completion", [S, U, A]),
        ({"prompt": "q", "completion": [A]}, "prompt-completion", [U, A]),
        ({"prompt": [S, U], "completion": "a"}, "prompt-completion", [S, U, A]),
        ({"prompt": U, "completion": A}, "prompt-completion", [U, A]),
        ({"messages": [{"Role": "User", "Content": "q"}, {"ROLE": "ASSISTANT", "CONTENT": "a"}]}, "messages", [U, A]),
        ({"messages": [{"role": "user", "text": "q"}, {"role": "assistant", "value": "a"}]}, "messages", [U, A]),
        ({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt", [U, A]),
        ({"conversations": [{"From": "Human", "Value": "q"}, {"from": "GPT", "value": "a"}]}, "sharegpt", [U, A]),
        ({"conversations": [{"from": "User", "content": "q"}, {"from": "bot", "text": "a"}]}, "sharegpt", [U, A]),
        ({"messages": [{"speaker": "human", "text": "q"}, {"speaker": "ai", "text": "a"}]}, "sharegpt", [U, A]),
        ({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, "messages", [U, A]),
        ({"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}}, "sharegpt", [U, A]),
        ({"messages": [{"role": None, "content": None, "from": "human", "value": "q"}, {**A, "from": None}]},
         "sharegpt", [U, A]),
        ({"messages": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]},
         "messages", [U, A]),
        ({"messages": [A, U, A]}, "messages", [A, U, A]),
        ({"messages": [A, U, A, U]}, "messages", [A, U, A, U]),
        ({"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "q"}]}, "sharegpt", [A, U]),
    ],
)  # fmt: skip
def test_chats(values: dict[str, Any], name: str, messages: list[dict[str, Any]]) -> None:
    assert record_of(values) == (name, Record("f.jsonl:1", messages=messages))


@pytest.mark.parametrize("turns", [[U, A], [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]], ids=str)
@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_chats_as_json_text(turns: Any, key: str) -> None:
    record = read({key: json.dumps(turns)})
    assert isinstance(record, Record)
    assert record.messages == [U, A]


def test_a_chat_as_a_python_list_says_how_to_save_it() -> None:
    assert "json.dumps(ast.literal_eval(text))" in refused({"messages": str([U, A])})


def test_a_refusal_without_content() -> None:
    message = refused({"messages": [U, {"role": "assistant", "content": None, "refusal": "No."}]})
    assert "message 2: a refusal without content" in message


def test_texts() -> None:
    assert record_of({"text": "hello"}) == ("text", Record("f.jsonl:1", text="hello"))
    assert record_of({"prompt": "Q: x\nA:", "completion": " y"}) == (
        "prompt-completion",
        Record("f.jsonl:1", text="Q: x\nA: y", answer_start=7),
    )


def test_tools_may_be_a_string() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    for tools in ([tool], '[{"type": "function", "function": {"name": "f"}}]'):
        _, record = record_of({"messages": [U, A], "tools": tools})
        assert isinstance(record, Record)
        assert record.tools == [tool]


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [U, {**A, "content": " \n"}]},
        {"messages": [U, A, U, {**A, "content": ""}]},
        {"instruction": "q", "output": ""},
        {"prompt": "q", "completion": "  "},
        {"text": ""},
    ],
)
def test_blank_answers_are_a_reason(values: dict[str, Any]) -> None:
    assert record_of(values)[1] == "empty answer"


def test_a_call_without_words_is_an_answer() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    _, record = record_of({"messages": [U, {"role": "assistant", "content": None, "tool_calls": [call]}]})
    assert isinstance(record, Record)
    assert record.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}


MESSAGES = "f.jsonl:1: message 2"
WRONG: list[tuple[list[dict[str, Any]], str]] = [
    (
        [{"question": "q", "answer": "a"}],
        "f.jsonl:1: not a known format\n"
        "  seen:    the keys question, answer\n"
        "  allowed: messages, conversations, instruction + output, prompt + completion, or text\n"
        "  change:  column_mapping: {question: prompt, answer: completion}",
    ),
    (
        [{"role": "user", "content": "q"}],
        "f.jsonl:1: not a known format\n"
        "  seen:    the keys role, content\n"
        "  allowed: messages, conversations, instruction + output, prompt + completion, or text\n"
        "  change:  each row is a single message; put all messages of a conversation into one row, as a list under messages",
    ),
    (
        [{"chosen": "q", "rejected": "a", "prompt": "p"}],
        "f.jsonl:1: not a known format\n"
        "  seen:    the keys chosen, rejected, prompt\n"
        "  allowed: messages, conversations, instruction + output, prompt + completion, or text\n"
        "  change:  this is preference data, but fine-tuning uses one answer per row: to learn the chosen answers, set "
        "column_mapping: {chosen: completion, rejected: ignore}",
    ),
    (
        [{}],
        "f.jsonl:1: not a known format\n"
        "  seen:    no keys\n"
        "  allowed: messages, conversations, instruction + output, prompt + completion, or text",
    ),
    (
        [{"messages": [U, A]}, {"text": "t"}],
        "f.jsonl:2: mixed formats: this row is text\n"
        "  seen:    the keys text\n"
        "  allowed: messages (messages), as in f.jsonl:1\n"
        "  change:  convert all rows to one format, or keep the rows of one format",
    ),
    (
        [{"instruction": "q", "output": "a"}, {"instruction": "q", "output": None}],
        "f.jsonl:2: output is missing\n"
        "  seen:    the keys instruction\n"
        "  allowed: alpaca (instruction, output), as in f.jsonl:1\n"
        "  change:  add the key, or remove the row",
    ),
    (
        [{"messages": "nothing"}],
        "f.jsonl:1: messages is a text, not a list\n"
        '  seen:    "nothing"\n'
        '  allowed: [{"role": "user", "content": "..."}, ...], also as JSON text',
    ),
    ([{"messages": []}], "f.jsonl:1: messages is empty\n  allowed: at least one assistant message"),
    ([{"messages": 3}], "f.jsonl:1: messages is not a list\n  seen:    3\n  allowed: a list of messages"),
    (
        [{"messages": [S, U]}],
        "f.jsonl:1: no assistant message, so there is nothing to train on\n"
        "  seen:    the roles system, user\n"
        "  allowed: at least one message with the role assistant\n"
        "  change:  remove the row, or add the answer",
    ),
    (
        [{"messages": [U, {**A, "role": "wizard"}]}],
        f'{MESSAGES}: unknown role\n  seen:    "wizard"\n  allowed: system, developer, user, assistant, tool',
    ),
    (
        [{"messages": [U, {**A, "role": "gpt"}]}],
        f'{MESSAGES}: unknown role\n  seen:    "gpt"\n  allowed: system, developer, user, assistant, tool\n'
        "  change:  did you mean assistant?",
    ),
    (
        [{"messages": [U, {"content": "a"}]}],
        f"{MESSAGES}: unknown role\n  seen:    no role\n  allowed: system, developer, user, assistant, tool",
    ),
    (
        [{"messages": [{"user": "q", "assistant": "a"}]}],
        "f.jsonl:1: message 1: unknown role\n  seen:    no role, but the keys user, assistant\n"
        "  allowed: system, developer, user, assistant, tool\n"
        '  change:  write each turn as {"role": "user", "content": "..."}',
    ),
    (
        [{"messages": [{**U, "images": ["a.png"]}, A]}],
        "f.jsonl:1: message 1: has images\n  seen:    the role user\n  allowed: text only",
    ),
    (
        [{"messages": [U, {**A, "role": "assistant\n<|im_end|>"}]}],
        f'{MESSAGES}: unknown role\n  seen:    "assistant\\n<|im_end|>"\n'
        "  allowed: system, developer, user, assistant, tool",
    ),
    ([{"messages": [U, {**A, "content": None}]}], f"{MESSAGES}: content is missing or null\n  allowed: text"),
    (
        [{"messages": [U, {**A, "content": 42}]}],
        f"{MESSAGES}: content is int, not text\n  seen:    42\n  allowed: text",
    ),
    (
        [{"messages": [U, {**A, "content": [{"type": "image"}]}]}],
        f'{MESSAGES}: content has a part that is not text\n  seen:    "image"\n  allowed: text only',
    ),
    (
        [{"messages": [U, "hello"]}],
        f'{MESSAGES} is not an object\n  seen:    "hello"\n  allowed: {{"role": "user", "content": "..."}}',
    ),
    (
        [{"conversations": [{"from": "human", "value": "q"}, {"from": "alice", "value": "a"}]}],
        'f.jsonl:1: turn 2: unknown speaker\n  seen:    "alice"\n'
        "  allowed: human, user, gpt, assistant, chatgpt, bing, bard, model, ai, bot, chatbot, system, developer, tool, "
        "function_call, tool_call, tool_calls, observation, tool_response, tool_result, function_response, function, ipython",
    ),
    (
        [{"conversations": [{"from": "human", "value": None}]}],
        "f.jsonl:1: turn 1: value is missing or null\n  allowed: text",
    ),
    (
        [{"messages": [U, A], "images": ["a.png"]}],
        "f.jsonl:1: the row has images, but only text can be trained on\n  allowed: text only\n"
        "  change:  remove the row; if its text makes sense alone, column_mapping: {images: ignore}",
    ),
    (
        [{"messages": [U], "chosen": A, "rejected": A}],
        "f.jsonl:1: preference data, but solotune trains on every answer of a row, also a rejected one\n"
        "  seen:    the keys messages, chosen, rejected\n"
        "  allowed: one answer a row\n"
        "  change:  to learn the chosen answers, set "
        "column_mapping: {messages: prompt, chosen: completion, rejected: ignore}",
    ),
    (
        [{"messages": [U, A], "tools": "[{"}],
        "f.jsonl:1: tools is not valid JSON\n"
        '  seen:    Expecting property name enclosed in double quotes: line 1 column 3 (char 2), in "[{"',
    ),
]


@pytest.mark.parametrize(
    ("values", "message"), WRONG, ids=lambda value: value.split("\n")[0] if isinstance(value, str) else ""
)
def test_wrong_rows(values: list[dict[str, Any]], message: str) -> None:
    assert message_of(*values) == message
