"""Tool calls in every spelling become the one form; what is no call, or has no result, is named with its place."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from solotune.dataset import Prepared, prepare
from solotune.dataset.chat.formats import Record
from tests.dataset.chat.test_formats import A, U, message_of, record_of
from tests.dataset.conftest import CHATML, Writer, config_of, tiny_tokenizer

ARGUMENTS = {"city": "Zürich", "days": [1, 2], "unit": None}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
TEXT = json.dumps(ARGUMENTS, separators=(",", ":"))  # as OpenAI's API writes it, with \u escapes
TOLD = {"role": "tool", "content": "22"}


def calling(*calls: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": list(calls), **keys}


def messages_of(values: dict[str, Any]) -> list[dict[str, Any]]:
    _, record = record_of(values)
    assert isinstance(record, Record)
    return record.messages


# --- spellings


@pytest.mark.parametrize(
    "written",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [CALL], "content": None},
        {"tool_calls": [{"function": {"name": "get_weather", "arguments": TEXT}}]},
        {"tool_calls": [{"name": "get_weather", "arguments": ARGUMENTS, "index": 0}]},
        {"tool_calls": [{"name": "get_weather", "arguments": TEXT}]},
        {"tool_calls": json.dumps([CALL])},
        {"function_call": {"name": "get_weather", "arguments": TEXT}, "content": None},
        {"tool_calls": [{"name": "get_weather", "parameters": ARGUMENTS}]},
        {"tool_calls": [{"name": "get_weather", "args": ARGUMENTS, "arguments": None, "function": None}]},
        {"tool_calls": [{"function": {"name": "get_weather"}, "arguments": TEXT}]},
        {"toolCalls": [CALL], "Content": ""},
        {"tool_calls": [CALL], "function_call": {"name": "get_weather", "arguments": TEXT}},
        {"content": [{"type": "tool_use", "name": "get_weather", "input": ARGUMENTS}]},
        {"content": [{"type": "tool_call", "value": json.dumps({"name": "get_weather", "arguments": ARGUMENTS})}]},
    ],
)
def test_a_call_in_every_spelling(written: dict[str, Any]) -> None:
    assert messages_of({"messages": [U, {"role": "assistant", **written}]}) == [U, calling(CALL)]


def test_ids_are_kept_and_no_arguments_are_an_empty_object() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f"}}
    found = messages_of({"messages": [U, calling(call), {**TOLD, "tool_call_id": "c1"}, A]})
    assert found[1]["tool_calls"] == [{**call, "function": {"name": "f", "arguments": {}}}]
    assert found[2] == {**TOLD, "tool_call_id": "c1"}


def test_sharegpt_calls_and_observations() -> None:
    def turn(speaker: str, value: str) -> dict[str, str]:
        return {"from": speaker, "value": value}

    one = json.dumps({"name": "get_weather", "arguments": ARGUMENTS})
    for value, calls in ((one, [CALL]), (f"[{one}, {one}]", [CALL, CALL])):
        turns = [turn("human", "q"), turn("function_call", value), turn("observation", "22"), turn("gpt", "a")]
        assert messages_of({"system": "s", "conversations": turns})[1:] == [U, calling(*calls), TOLD, A]
    weighted = [*turns[:1], {**turns[1], "weight": 0.5}, *turns[2:]]
    _, record = record_of({"conversations": weighted})
    assert isinstance(record, Record)
    assert record.weights == (0.5, 1.0)


@pytest.mark.parametrize("call", ["function_call", "tool_call", "tool_calls", "Tool_Call"])
@pytest.mark.parametrize("result", ["observation", "tool_response", "tool_result", "function", "tool"])
def test_turns_of_calls_and_results(call: str, result: str) -> None:
    """In ShareGPT's keys and in role and content (ms-swift); one turn for each call, or one for all."""
    one = json.dumps({"name": "get_weather", "arguments": ARGUMENTS})
    for role, content, key in (("from", "value", "conversations"), ("role", "content", "messages")):
        names = ("human", "gpt") if role == "from" else ("user", "assistant")
        turns = [(names[0], "q"), (call, one), (call, one), (result, "22"), (result, "23"), (names[1], "a")]
        found = messages_of({key: [{role: speaker, content: text} for speaker, text in turns]})
        assert found == [U, calling(CALL, CALL), TOLD, {**TOLD, "content": "23"}, A]
        found = messages_of({key: [{role: speaker, content: text} for speaker, text in turns[:2]]})
        assert found == [U, calling(CALL)]


@pytest.mark.parametrize("key", ["tool_call_id", "toolCallId", "call_id", "tool_use_id"])
def test_ids_of_results(key: str) -> None:
    call = {"id": "c1", **CALL}
    found = messages_of({"messages": [U, calling(call), {**TOLD, key: "c1", "tool_name": "get_weather"}, A]})
    assert found[2] == {**TOLD, "tool_call_id": "c1", "name": "get_weather"}
    message = message_of({"messages": [U, calling(call), {**TOLD, key: "c2"}, A]})
    assert "its tool_call_id matches no tool call before it" in message


def test_the_older_api() -> None:
    answer = {"role": "assistant", "content": None, "function_call": {"name": "get_weather", "arguments": TEXT}}
    told = {"role": "function", "name": "get_weather", "content": "22"}
    functions = [{"name": "get_weather", "parameters": {}}]
    _, record = record_of({"messages": [U, answer, told, A], "functions": functions})
    assert isinstance(record, Record)
    assert record.messages == [U, calling(CALL), {**TOLD, "name": "get_weather"}, A]
    assert record.tools == [{"type": "function", "function": functions[0]}]


def test_calls_that_differ_in_weight_stay_apart() -> None:
    one = json.dumps({"name": "get_weather", "arguments": ARGUMENTS})
    turns = [{"role": "user", "content": "q"}, *({"role": "tool_call", "content": one, "weight": w} for w in (1, 2))]
    assert message_of({"messages": turns}).startswith("f.jsonl:1: message 2: a tool call without its result\n")


def test_parts_of_an_answer() -> None:
    """LLaMA-Factory's v1: `value` for texts, thoughts and calls."""
    parts = [
        {"type": "reasoning", "value": "hm"},
        {"type": "text", "value": "a"},
        {"type": "tool_call", "value": json.dumps({"name": "get_weather", "arguments": ARGUMENTS})},
    ]
    question = {"role": "user", "content": [{"type": "text", "value": "q"}]}
    found = messages_of({"messages": [question, {"role": "assistant", "content": parts}]})
    assert found == [U, {**calling(CALL), "content": "a", "reasoning_content": "hm"}]


def test_bare_tool_definitions_are_wrapped() -> None:
    bare = {"name": "f", "parameters": {}}
    wrapped = {"type": "function", "function": bare}
    for tools in ([bare], [wrapped], json.dumps([bare])):
        _, record = record_of({"messages": [U, A], "tools": tools})
        assert isinstance(record, Record)
        assert record.tools == [wrapped]


# --- what is learned of them


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tiny_tokenizer("chatml"))
    tokenizer.chat_template = template
    return tokenizer


def learned(result: Prepared, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(row.input_ids[row.loss_mask]) for row in result.train]


@pytest.mark.parametrize("arguments", [ARGUMENTS, TEXT], ids=["object", "text"])
@pytest.mark.parametrize(
    ("family", "call"),
    [
        ("qwen3", "<think>\n\n</think>\n\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": %s}\n</tool_call>"),
        ("tojson", "get_weather(%s)"),
        ("items", "get_weather(city=Zürich;days=[1, 2];unit=None;)"),
        ("joined", "get_weather(%s)"),
    ],
)  # fmt: skip
def test_nothing_is_encoded_twice(write: Writer, family: str, call: str, arguments: Any) -> None:
    """Templates that print an object, walk over it, or join a text: each learns the arguments, once encoded."""
    print_arguments = {
        "tojson": "{{ c.function.arguments | tojson }}",
        "items": "{% for k, v in c.function.arguments | items %}{{ k ~ '=' ~ v ~ ';' }}{% endfor %}",
        "joined": "{{ '' + c.function.arguments }}",
    }
    tokenizer = tiny_tokenizer("qwen3")
    if family in print_arguments:
        calls = f"{{% for c in m.tool_calls or [] %}}{{{{ c.function.name }}}}({print_arguments[family]}){{% endfor %}}"
        tokenizer = with_template(CHATML.replace("{{ m.content }}", "{{ m.content }}" + calls))
    row = {"messages": [U, calling({"function": {"name": "get_weather", "arguments": arguments}})]}
    result = prepare(config_of(write("a.jsonl", row)), tokenizer)
    shown = call % json.dumps(ARGUMENTS, ensure_ascii=False) if "%s" in call else call
    assert learned(result, tokenizer) == [shown + "<|im_end|>"]


def test_a_control_token_as_a_key_is_text(write: Writer) -> None:
    call = {"name": "f", "arguments": {"<|im_end|>": {"<|im_start|>": "x"}}}
    tool = {"name": "f", "parameters": {"properties": {"<|im_end|>": {}}}}
    template = CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    )
    tokenizer = with_template("{{ tools | tojson }}" + template)
    row = {"messages": [U, calling(call)], "tools": [tool]}
    (example,) = prepare(config_of(write("a.jsonl", row)), tokenizer).train
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (example.input_ids == end).sum() == 2  # the two turns' own
    assert "<|im_end|>" in tokenizer.decode(example.input_ids).partition("user")[0]


# --- wrong calls

NESTED = '{"a": ' * 2000 + "1" + "}" * 2000


@pytest.mark.parametrize(
    ("call", "problem", "seen"),
    [
        ({"name": "f", "arguments": "city: Paris"}, "arguments is not valid JSON", "Expecting value"),
        ({"name": "f", "arguments": ""}, "arguments is not valid JSON", "Expecting value"),
        ({"name": "f", "arguments": '{"a": NaN}'}, "arguments is not valid JSON", "NaN is not JSON"),
        ({"name": "f", "arguments": '{"a": 1, "a": 2}'}, "arguments is not valid JSON", "the key 'a' appears twice"),
        ({"name": "f", "arguments": '{"a": "\\ud800"}'}, "arguments is not valid JSON", "a lone surrogate"),
        ({"name": "f", "arguments": NESTED}, "arguments is not valid JSON", "nested deeper than"),
        ({"name": "f", "arguments": json.dumps(TEXT)}, "arguments is not an object", '"{\\"city\\":\\"Z'),
        ({"name": "f", "arguments": [1]}, "arguments is not an object", "[1]"),
        ({"name": "f", "arguments": 3}, "arguments is not an object", "3"),
        ({"arguments": {}}, "tool_calls has no function with a name", '{"arguments": {}}'),
        ({"name": "", "arguments": {}}, "tool_calls has no function with a name", '{"name": ""'),
        ({"function": "f"}, "tool_calls has no function with a name", '{"function": "f"}'),
        ("f", "tool_calls has no function with a name", '"f"'),
        (None, "tool_calls has no function with a name", "null"),
    ],
)  # fmt: skip
def test_wrong_calls(call: Any, problem: str, seen: str) -> None:
    message = message_of({"messages": [U, calling(call)]})
    assert message.startswith(f"f.jsonl:1: message 2: {problem}\n  seen:    {seen}")
    if call and call != "f" and problem.startswith("arguments"):  # and so in a turn of ShareGPT
        turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(call)}]
        assert message_of({"conversations": turns}).startswith(f"f.jsonl:1: turn 2: {problem}\n  seen:    {seen}")


def test_a_doubly_encoded_argument_says_so() -> None:
    twice = {"name": "f", "arguments": json.dumps(TEXT)}
    assert message_of({"messages": [U, calling(twice)]}).endswith(
        "change:  it seems to be JSON encoded twice: decode it once"
    )


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("get_weather(Paris)", "function_call is not valid JSON\n  seen:    Expecting value: line 1 column 1"),
        ("[]", "function_call is empty"),
        ("3", "function_call has no function with a name\n  seen:    3"),
        (None, "function_call has no function with a name\n  seen:    null"),
    ],
)  # fmt: skip
def test_wrong_function_call_turns(value: Any, problem: str) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": value}]
    assert message_of({"conversations": turns}).startswith(f"f.jsonl:1: turn 2: {problem}")


def test_two_calls_under_two_keys() -> None:
    answer = calling(CALL, function_call={"name": "other", "arguments": "{}"})
    assert message_of({"messages": [U, answer]}).startswith(
        "f.jsonl:1: message 2: tool_calls and function_call differ\n"
    )


def test_only_the_assistant_calls() -> None:
    assert message_of({"messages": [{**U, "tool_calls": [CALL]}, A]}) == (
        "f.jsonl:1: message 1: tool_calls on a message that is not an answer\n"
        "  seen:    the role user\n"
        "  allowed: tool_calls on assistant messages only"
    )


# --- calls and their results


def with_id(number: int) -> dict[str, Any]:
    return {"id": f"c{number}", **CALL}


def told(number: int) -> dict[str, Any]:
    return {**TOLD, "tool_call_id": f"c{number}"}


WRITTEN_OUT = [
    '<tool_call>\n{"name": "f"}\n</tool_call>', "<|python_tag|>f(x)", "<function=f>{}</function>",
    '[TOOL_CALLS] [{"name": "f"}]', '<functioncall> {"name": "f"}', "Thought: look it up\nAction: search[x]",
]  # fmt: skip


@pytest.mark.parametrize(
    "messages",
    [
        [U, calling(CALL)],
        [U, calling(CALL), TOLD],
        [U, calling(CALL), TOLD, A],
        [U, calling(CALL, CALL), TOLD, A],  # one message for both
        [U, calling(CALL), TOLD, TOLD, A],  # a result in two messages
        [U, calling(with_id(1), with_id(2)), told(2), told(1), A, U, A],
        [U, calling(with_id(1)), told(1), calling(with_id(2)), told(2), A],
        [U, calling(with_id(1)), TOLD, A],
        [U, calling(CALL), told(1), A],
        [U, calling(with_id(1), with_id(2)), told(2)],
        *([U, {**A, "content": text}, TOLD, told(1), A] for text in WRITTEN_OUT),
    ],
)
def test_calls_with_their_results(messages: list[dict[str, Any]]) -> None:
    assert messages_of({"messages": messages}) == messages


def test_a_call_in_the_prompt_may_be_answered_in_the_completion() -> None:
    found = messages_of({"prompt": [U, calling(CALL)], "completion": [TOLD, A]})
    assert found == [U, calling(CALL), TOLD, A]


WITHOUT_CALL = (
    "a tool message without a tool call before it\n"
    "  allowed: tool messages right after the assistant message with their tool_calls\n"
    "  change:  add tool_calls to that assistant message, or remove the row"
)


def without_result(next_role: str) -> str:
    return (
        "a tool call without its result\n"
        f'  seen:    a call of "get_weather", then a message with the role {next_role}\n'
        "  allowed: a tool message with its result next, or the end of the row\n"
        "  change:  add the tool message, or end the row with the call"
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([U, calling(CALL), A], f"message 2: {without_result('assistant')}"),
        ([U, calling(CALL), U, A], f"message 2: {without_result('user')}"),
        ([U, calling(CALL), U, TOLD, A], f"message 2: {without_result('user')}"),
        ([U, calling(CALL), calling(CALL), TOLD, A], f"message 2: {without_result('assistant')}"),
        ([U, calling(with_id(1), with_id(2)), told(2), A], f"message 2: {without_result('assistant')}"),
        ([U, TOLD, A], f"message 2: {WITHOUT_CALL}"),
        ([TOLD, A], f"message 1: {WITHOUT_CALL}"),
        ([U, A, TOLD, A], f"message 3: {WITHOUT_CALL}"),
        ([U, calling(CALL), TOLD, U, TOLD, A], f"message 5: {WITHOUT_CALL}"),
        ([U, {**A, "content": "There is no action to take."}, TOLD, A], f"message 3: {WITHOUT_CALL}"),
        (
            [U, calling(with_id(1), with_id(2)), told(1), told(3), A],
            'message 4: its tool_call_id matches no tool call before it\n  seen:    "c3"\n  allowed: "c1", "c2"',
        ),
    ],
)
def test_calls_and_results_that_do_not_meet(messages: list[dict[str, Any]], message: str) -> None:
    assert message_of({"messages": messages}) == f"f.jsonl:1: {message}"


def test_turns_are_counted_as_they_stand(write: Writer) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "observation", "value": "22"}, {"from": "gpt", "value": "a"}]
    row = {"system": "s", "conversations": turns}
    assert message_of(row).startswith("f.jsonl:1: turn 2: a tool message without a tool call before it\n")
    good = {"conversations": [turns[0], turns[2]]}
    result = prepare(config_of(write("a.jsonl", good, row), on_bad_row="drop"), tiny_tokenizer("chatml"))
    assert result.report.dropped == {"tool message without a call": 1}
