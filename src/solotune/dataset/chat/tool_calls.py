"""Tool calls of an answer: normalise their several notations to the form that chat templates expect.

    {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}          and "id" if given

Why objects and not JSON text
-----------------------------
OpenAI's API writes `arguments` as JSON text; ShareGPT files have a whole turn of JSON text (`from: function_call`).
Templates expect the object: of the 28 in `trl` that render calls, 16 refuse a text, 4 (Llama 3.1 and 3.2, Qwen 2.5,
gpt-oss) put it through `tojson`, so that the model would learn a quoted string full of backslashes, and 4 (Gemma 4)
write it in another form than their own. So JSON text is parsed here, strictly; text that is not an object is an error.
The one template that takes only text (DeepSeek V3) gets it in `template.py`.

`check_order` matches calls and results: a call without a result, or a result without a call, teaches the model to
invent tool results. A row may end with a call, which is then trained on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from solotune.dataset.readers.json_window import parse_json
from solotune.dataset.readers.row import RowError, short

CALL_KEYS = ("tool_calls", "function_call")  # the second is the older form of the API
_ARGUMENT_KEYS = ("arguments", "parameters", "args", "input", "kwargs")
CALL_ID_KEYS = ("id", "call_id", "tool_call_id")
_FORM = '{"name": "...", "arguments": {...}}'
# a call inside the text of an answer: Hermes' <tool_call>, Llama's <|python_tag|> and <function=f>, Mistral's
# [TOOL_CALLS], Glaive's <functioncall>, ReAct's "Action:"
_WRITTEN_OUT = re.compile(r"tool_?calls?\b|function_?call|<function|python_tag|\bAction:", re.IGNORECASE)


def from_json(place: str, text: str, key: str) -> Any:
    """Parse a value given as JSON text in a row, as strictly as the file.

    Raises:
        RowError: not JSON; a key twice, NaN, a lone surrogate.
    """
    try:
        return parse_json(text)
    except ValueError as error:
        what = f"{key} is not valid JSON"
        raise RowError(f"{place}: {what}", reason=what, seen=f"{error}, in {short(text)}") from None


def calls_of(place: str, message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Normalise the calls under the keys of a message; empty if there are none.

    Raises:
        RowError: they are no calls, or the two keys hold different ones.
    """
    given = [(key, normal_calls(place, message[key], key)) for key in CALL_KEYS if message.get(key)]
    if len(given) == 2 and [c["function"] for c in given[0][1]] != [c["function"] for c in given[1][1]]:
        what = "tool_calls and function_call differ"
        raise RowError(
            f"{place}: {what}", reason=what, allowed="one of them, or both with the same call", change="remove one"
        )
    return given[0][1] if given else []


def arguments_holder(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The object that has the arguments of a call: its function, or the call itself if only that has some."""
    function = function_of(call)
    is_outside = isinstance(function, dict) and function.get(arguments_key(function)) is None
    return call if is_outside and call.get("arguments") is not None else function


def arguments_key(function: Mapping[str, Any]) -> str:
    """The key under which a function has its arguments; other names count only where there are no `arguments`."""
    return next((key for key in _ARGUMENT_KEYS if function.get(key) is not None), "arguments")


def normal_calls(place: str, value: Any, key: str) -> list[dict[str, Any]]:
    """Normalise one call or a list of calls, given as objects or as JSON text, to the form above.

    Args:
        key: key of the value, for messages.

    Raises:
        RowError: the value is not such calls; names the place.
    """
    if isinstance(value, str):
        value = from_json(place, value, key)
    listed = value if isinstance(value, list) else [value]
    if not listed:
        what = f"{key} is empty"
        raise RowError(f"{place}: {what}", reason=what, allowed=_FORM)
    return [_normal(place, call, key) for call in listed]


def function_of(call: Mapping[str, Any]) -> Any:
    """The part of a call that has its name and arguments: under `function`, or the call itself."""
    return call if call.get("function") is None else call["function"]


def _normal(place: str, call: Any, of: str) -> dict[str, Any]:
    function = function_of(call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        what = f"{of} has no function with a name"
        raise RowError(f"{place}: {what}", reason=what, seen=short(call), allowed=_FORM)
    holder = arguments_holder(call)
    key = arguments_key(holder)
    arguments = holder.get(key)
    if isinstance(arguments, str):
        arguments = from_json(place, arguments, key)
    if arguments is None:
        arguments = {}  # a function without parameters
    if not isinstance(arguments, dict):
        what = f"{key} is not an object"
        raise RowError(
            f"{place}: {what}",
            reason=what,
            seen=short(arguments),
            allowed='an object of names and values, or its JSON text: {"city": "Paris"}',
            change="it seems to be JSON encoded twice: decode it once" if isinstance(arguments, str) else None,
        )
    number = next((call[name] for name in CALL_ID_KEYS if call.get(name) is not None), None)
    kept = {} if number is None else {"id": number}
    return {"type": "function", **kept, "function": {"name": name, "arguments": arguments}}


def check_order(places: Sequence[str], messages: Sequence[dict[str, Any]]) -> None:
    """Refuse calls without a result before the conversation goes on, and results without a call.

    With ids (`id` of a call, `tool_call_id` of a result) each call needs its own result; without, one message may hold
    the results of several calls. A result after an answer that writes its call in its text has a call too.
    """
    calls: list[dict[str, Any]] = []  # of the answer that the next tool messages belong to
    results: list[Any] = []  # their tool_call_ids
    caller, answer = "", ""
    for place, message in zip(places, messages, strict=True):
        if message["role"] == "tool":
            results.append(message.get("tool_call_id"))
            if not calls and not _WRITTEN_OUT.search(answer):  # only here: the search of a long answer takes a while
                raise _without_call(place)
            if not _answers(results[-1:], calls):
                raise _of_no_call(place, results[-1], calls)
            continue
        unanswered = [call for call in calls if not _answers(results, [call])]
        if unanswered:
            raise _without_result(caller, unanswered[0], message["role"])
        calls, results, caller = list(message.get("tool_calls", ())), [], place
        answer = message["content"] if message["role"] == "assistant" else ""


def _answers(results: list[Any], calls: list[dict[str, Any]]) -> bool:
    """Whether a result matches one of the calls by id; without ids every result matches."""
    ids = [call.get("id") for call in calls] or [None]
    return any(result is None or None in ids or result in ids for result in results)


def _without_call(place: str) -> RowError:
    return RowError(
        f"{place}: a tool message without a tool call before it",
        reason="tool message without a call",
        allowed="tool messages right after the assistant message with their tool_calls",
        change="add tool_calls to that assistant message, or remove the row",
    )


def _of_no_call(place: str, wanted: Any, calls: list[dict[str, Any]]) -> RowError:
    return RowError(
        f"{place}: its tool_call_id matches no tool call before it",
        reason="tool_call_id of no call",
        seen=short(wanted),
        allowed=", ".join(short(call["id"]) for call in calls),
    )


def _without_result(caller: str, call: dict[str, Any], next_role: str) -> RowError:
    return RowError(
        f"{caller}: a tool call without its result",
        reason="tool call without a result",
        seen=f"a call of {short(call['function']['name'])}, then a message with the role {next_role}",
        allowed="a tool message with its result next, or the end of the row",
        change="add the tool message, or end the row with the call",
    )
