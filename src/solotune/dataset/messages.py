"""One message, and what stands beside the messages of a row: roles, texts, tools, weights.

A wrong one is a `RowError` that names the row and, in it, the message. Only what chat templates know is kept of a
message, so that a column more in the data cannot change a rendering.

A weight says how much is learned of something: `weight` (or `loss_weight`) on an assistant message counts for that
answer's tokens, on a row for all of its tokens, and the two multiply. With weights w the loss of an optimizer step is

    sum_n w_n l_n / sum_n w_n          over all supervised tokens n of the whole accumulated batch

so only ratios matter: all weights 1 and all weights 5 are the same training, and a row of weight 2 is that row given
twice. (Given twice in a file it counts once: exact duplicates are removed, and the first one's weight is kept.)
Weight 0 leaves out an answer (it is still read, as context) or the whole row. Cells of a csv are texts, so a number
may be one; true and false are none.
"""

from __future__ import annotations

import json
from typing import Any

from solotune.dataset.row import Row, RowError

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
}
_KEPT_KEYS = ("tool_calls", "tool_call_id", "name", "reasoning_content")
_WEIGHT_KEYS = ("weight", "loss_weight")
_LEAST_WEIGHT, _MOST_WEIGHT = 1e-9, 1e9  # the product of two, and a sum of millions of those, fits into float32


def weight_of(place: str, values: dict[str, Any], *, is_answer: bool = True) -> float:
    """How much a message or a row counts in the loss; 1 where nothing is said.

    Raises:
        RowError: not a number, negative, not finite, or out of float32's reach; or not 0 on a message that is not an
            answer.
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
            allowed=f"0 (not learned), or a number from {_LEAST_WEIGHT:g} to {_MOST_WEIGHT:g}; 1 is the usual one",
            change=f"a column that means something else: column_mapping: {{{key}: ignore}}",
        )
    if weight and not is_answer:
        raise RowError(
            f"{place}: {key}: {weight:g}, but only assistant messages are learned",
            reason=f"{key} on a message that is not an answer",
            change=f"remove {key} from it; to learn every token, assistant_only_loss: false",
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
    """The messages of a list, and the weight of each answer among them."""
    check_list(where, value, key)
    places = [f"{where}: message {number}" for number in range(1, len(value) + 1)]
    messages = [_message(place, one) for place, one in zip(places, value, strict=True)]
    return messages, answer_weights(places, value, messages)


def answer_weights(places: list[str], written: list[dict[str, Any]], messages: list[Message]) -> tuple[float, ...]:
    """The weight of each assistant message; `written` are the messages as they stand in the file."""
    is_answer = [message["role"] == "assistant" for message in messages]
    weights = [weight_of(place, one, is_answer=is_) for place, one, is_ in zip(places, written, is_answer, strict=True)]
    return tuple(weight for weight, is_ in zip(weights, is_answer, strict=True) if is_)


def check_list(where: str, value: Any, key: str) -> None:
    """Refuses what is not a list of at least one item."""
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
        raise RowError(f"{where}: {what}", reason=what, allowed="at least one message by the assistant")


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
    content = message.get("content")
    if content is None and role == "assistant" and "tool_calls" in kept:
        content = ""
    return {"role": role, "content": text(place, content, "content"), **kept}


def not_an_object(place: str, seen: Any, allowed: str) -> RowError:
    """A message that is no message at all."""
    return RowError(f"{place} is not an object", reason="a message is not an object", seen=short(seen), allowed=allowed)


def text(place: str, value: Any, key: str) -> str:
    """The text under a key; `[{"type": "text", "text": "..."}]`, the multimodal spelling of a text, is the text."""
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
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else part
            what = f"{key} has a part that is not text"
            raise RowError(f"{place}: {what}", reason=what, seen=short(kind), allowed="text only")
        texts.append(part["text"])
    return "".join(texts)


def tools(row: Row) -> list[dict[str, Any]] | None:
    """The tool definitions of a row, as a list or as its JSON text."""
    found = row.values.get("tools")
    if isinstance(found, str):
        if not found.strip():
            return None
        try:
            found = json.loads(found)
        except ValueError as error:
            what = "tools is not valid JSON"
            raise RowError(f"{row.where}: {what}", reason=what, seen=str(error)) from None
    if not found:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        what = "tools is not a list of objects"
        raise RowError(f"{row.where}: {what}", reason=what, seen=short(found))
    return found


def short(value: Any) -> str:
    """A value as a person can read it in one line; control characters and such stay escaped."""
    written = json.dumps(value, ensure_ascii=True, default=str)
    return written if len(written) <= 60 else written[:57] + "..."
