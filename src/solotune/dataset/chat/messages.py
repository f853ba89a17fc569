"""Messages of a row: check and normalise roles, texts, tools and loss weights.

A wrong message is a `RowError` that names the row and the message. Only keys that chat templates know are kept, so an
extra column in the data cannot change a rendering. Tool calls are handled in `tool_calls.py`.

Weights
-------
`weight` (or `loss_weight`) on an assistant message applies to that answer's tokens, on a row to all of its tokens, and
the two multiply. With weights w the loss of an optimizer step is

    sum_n w_n l_n / sum_n w_n          over all loss tokens n of the whole accumulated batch

so only ratios matter: all weights 1 and all weights 5 give the same run, and a row of weight 2 counts like the same row
twice. (Twice in a file it counts once: exact duplicates are removed, and the weight of the first is kept.) Weight 0
leaves out an answer (it is still context) or the whole row. Cells of a csv are texts, so a weight may be a number as
text; true and false are not weights.
"""

from __future__ import annotations

from typing import Any

from solotune.dataset.chat.tool_calls import from_json, normal_calls
from solotune.dataset.readers.row import Row, RowError, short

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
_KEPT_KEYS = ("tool_call_id", "name")
_CALL_KEYS = ("tool_calls", "function_call")  # the second is the older form of the API
_WEIGHT_KEYS = ("weight", "loss_weight")
_LEAST_WEIGHT, _MOST_WEIGHT = 1e-9, 1e9  # the product of two, and a sum of millions of those, fits into float32


def weight_of(place: str, values: dict[str, Any], *, is_answer: bool = True) -> float:
    """Return the loss weight of a message or a row; 1 if none is given.

    Raises:
        RowError: not a number, negative, not finite, or outside the range of float32; or not 0 on a message that is not
            an answer.
    """
    key = next((key for key in _WEIGHT_KEYS if values.get(key) is not None), None)
    if key is None:
        return 1.0
    weight = _number(values[key])
    if weight is None or not (weight == 0 or _LEAST_WEIGHT <= weight <= _MOST_WEIGHT):
        raise RowError(
            f"{place}: {key} is not a weight",
            reason=f"{key} is not a weight",
            seen=short(values[key]),
            allowed=f"0 (not trained on), or a number from {_LEAST_WEIGHT:g} to {_MOST_WEIGHT:g}; the default is 1",
            change=f"if it is not a loss weight: column_mapping: {{{key}: ignore}}",
        )
    if weight and not is_answer:
        raise RowError(
            f"{place}: {key}: {weight:g}, but only assistant messages can have a weight",
            reason=f"{key} on a message that is not an answer",
            change=f"remove {key} from this message; to train on all tokens, set assistant_only_loss: false",
        )
    return weight


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):  # a text that is no number; an int of 400 digits
        return None


def turns(where: str, value: Any, key: str) -> tuple[list[Message], tuple[float, ...]]:
    """Check and normalise a list of messages; return them and the weight of each answer."""
    check_list(where, value, key)
    places = [f"{where}: message {number}" for number in range(1, len(value) + 1)]
    messages = [_message(place, one) for place, one in zip(places, value, strict=True)]
    return messages, answer_weights(places, value, messages)


def answer_weights(places: list[str], written: list[dict[str, Any]], messages: list[Message]) -> tuple[float, ...]:
    """The weight of each assistant message; `written` are the messages as in the file."""
    is_answer = [message["role"] == "assistant" for message in messages]
    weights = [weight_of(place, one, is_answer=is_) for place, one, is_ in zip(places, written, is_answer, strict=True)]
    return tuple(weight for weight, is_ in zip(weights, is_answer, strict=True) if is_)


def check_list(where: str, value: Any, key: str) -> None:
    """Refuse a value that is not a list of at least one item."""
    if isinstance(value, str):
        raise RowError(
            f"{where}: {key} is a text, not a list",
            reason=f"{key} is a text, not a list",
            seen=short(value),
            change="the list was saved as a string: parse it with json.loads before saving, or use jsonl",
        )
    if not isinstance(value, list):
        what = f"{key} is not a list"
        raise RowError(f"{where}: {what}", reason=what, seen=short(value), allowed="a list of messages")
    if not value:
        what = f"{key} is empty"
        raise RowError(f"{where}: {what}", reason=what, allowed="at least one assistant message")


def _message(place: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise not_an_object(place, message, '{"role": "user", "content": "..."}')
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        meant = SHAREGPT_ROLES.get(role.lower()) if isinstance(role, str) else None
        raise RowError(
            f"{place}: unknown role",
            reason="unknown role",
            seen=short(role) if role is not None else "no role",
            allowed=", ".join(ROLES),
            change=f"did you mean {meant}?" if meant else None,
        )
    kept = {key: message[key] for key in _KEPT_KEYS if message.get(key)}
    if role == "assistant":
        return {"role": role, **kept, **_answer(place, message)}
    if message.get("tool_calls"):
        what = "tool_calls on a message that is not an answer"
        raise RowError(
            f"{place}: {what}", reason=what, seen=f"the role {role}", allowed="tool_calls on assistant messages only"
        )
    return {"role": role, "content": text(place, message.get("content"), "content"), **kept}


def _answer(place: str, message: dict[str, Any]) -> Message:
    """The assistant's text, calls and reasoning; each may also be a part of the content (LLaMA-Factory's v1)."""
    content = message.get("content")
    calls = [c for key in _CALL_KEYS if message.get(key) for c in normal_calls(place, message[key], key)]
    thoughts = [text(place, message[key], key) for key in ("reasoning_content",) if message.get(key)]
    if isinstance(content, list):
        parts = {
            kind: [part["value"] for part in content if _is_part(part, kind)] for kind in ("tool_call", "reasoning")
        }
        calls += [call for value in parts["tool_call"] for call in normal_calls(place, value, "tool_call")]
        thoughts += [text(place, value, "reasoning") for value in parts["reasoning"]]
        content = [part for part in content if not any(_is_part(part, kind) for kind in parts)]
    if content is None and calls:
        content = ""
    answer: Message = {"content": text(place, content, "content")}
    if calls:
        answer["tool_calls"] = calls
    if thoughts:
        answer["reasoning_content"] = "".join(thoughts)
    return answer


def _is_part(part: Any, kind: str) -> bool:
    return isinstance(part, dict) and part.get("type") == kind and "value" in part


def not_an_object(place: str, seen: Any, allowed: str) -> RowError:
    """The error for a message that is not an object."""
    return RowError(f"{place} is not an object", reason="a message is not an object", seen=short(seen), allowed=allowed)


def text(place: str, value: Any, key: str) -> str:
    """The text under a key; of a list of `{"type": "text", "text": "..."}` (also with `value`) the joined texts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return _joined_parts(place, value, key)
    what = "is missing or null" if value is None else f"is {type(value).__name__}, not text"
    raise RowError(
        f"{place}: {key} {what}",
        reason=f"{key} is missing or null" if value is None else f"{key} is not text",
        seen=None if value is None else short(value),
        allowed="text",
    )


def _joined_parts(place: str, parts: list[Any], key: str) -> str:
    texts = []
    for part in parts:
        is_text = isinstance(part, dict) and part.get("type") == "text"
        value = part.get("text", part.get("value")) if is_text else None
        if not isinstance(value, str):
            kind = part.get("type") if isinstance(part, dict) else part
            what = f"{key} has a part that is not text"
            raise RowError(f"{place}: {what}", reason=what, seen=short(kind), allowed="text only")
        texts.append(value)
    return "".join(texts)


def tools(row: Row) -> list[dict[str, Any]] | None:
    """Return the tool definitions of a row, given as a list or as JSON text.

    A bare function is wrapped as an API passes it to the template: `{"type": "function", "function": ...}`.
    """
    found = row.values.get("tools")
    if isinstance(found, str):
        found = from_json(row.where, found, "tools") if found.strip() else None
    if not found:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        what = "tools is not a list of objects"
        raise RowError(f"{row.where}: {what}", reason=what, seen=short(found))
    return [{"type": "function", "function": tool} if "name" in tool and "type" not in tool else tool for tool in found]
