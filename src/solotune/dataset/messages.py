"""One message, and what stands beside the messages of a row: roles, texts, tools, weights.

A wrong one is a `RowError` that names the row and, in it, the message. Only what chat templates know is kept of a
message, so that a column more in the data cannot change a rendering.

A weight says whether something is learned: `weight: 0` on an assistant message leaves out that answer (it is still
read, as context), on a row the whole row. Fractions are refused and not rounded: they would need a loss that weights
single tokens, and ours counts them.
"""

from __future__ import annotations

import json
from typing import Any

from solotune.dataset.row import Row, RowError, check_depth

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
_WEIGHTS = {0: 0, 1: 1, "0": 0, "1": 1}  # cells of a csv are texts; True == 1 and 1.0 == 1 in Python


def weight_of(place: str, values: dict[str, Any], *, is_answer: bool = True) -> int:
    """0 or 1: whether a message or a row is learned; 1 where nothing is said.

    Raises:
        RowError: another value, or a 1 on a message that is not an answer.
    """
    key = next((key for key in _WEIGHT_KEYS if values.get(key) is not None), None)
    if key is None:
        return 1
    value = values[key]
    weight = _WEIGHTS.get(value) if isinstance(value, (int, float, str)) else None
    if weight is None:
        raise RowError(
            f"{place}: {key} is neither 0 nor 1",
            reason=f"{key} is neither 0 nor 1",
            seen=short(value),
            allowed="0 (not learned) or 1 (learned)",
            change=f"round it; a column that means something else: column_mapping: {{{key}: ignore}}",
        )
    if weight and not is_answer:
        raise RowError(
            f"{place}: {key}: 1, but only assistant messages are learned",
            reason=f"{key}: 1 on a message that is not an answer",
            change=f"remove {key} from it; to learn every token, assistant_only_loss: false",
        )
    return weight


def turns(where: str, value: Any, key: str) -> tuple[list[Message], tuple[int, ...]]:
    """The messages of a list, and the numbers (from 0) of the answers with weight 0."""
    check_list(where, value, key)
    places = [f"{where}: message {number}" for number in range(1, len(value) + 1)]
    messages = [_message(place, one) for place, one in zip(places, value, strict=True)]
    return messages, left_out(places, value, messages)


def left_out(places: list[str], written: list[dict[str, Any]], messages: list[Message]) -> tuple[int, ...]:
    """The numbers of the answers with weight 0; `written` are the messages as they stand in the file."""
    found = []
    for number, (place, one, message) in enumerate(zip(places, written, messages, strict=True)):
        is_answer = message["role"] == "assistant"
        if not weight_of(place, one, is_answer=is_answer) and is_answer:
            found.append(number)
    return tuple(found)


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
            check_depth(found)
        except (ValueError, RecursionError) as error:
            is_deep = isinstance(error, RecursionError)
            what = "tools is nested too deeply" if is_deep else "tools is not valid JSON"
            raise RowError(f"{row.where}: {what}", reason=what, seen=None if is_deep else str(error)) from None
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
