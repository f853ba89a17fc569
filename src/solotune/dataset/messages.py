"""One message, and what stands beside the messages of a row: roles, texts, tools, weights.

A wrong one is a `RowError` that names the row and, in it, the message. Only what chat templates know is kept of a
message, so that a column more in the data cannot change a rendering.

A weight says whether something is learned: `weight: 0` on an assistant message leaves out that answer (it is still
read, as context), on a row the whole row. Fractions are refused and not rounded: they would need the loss to weight
tokens, which it does not.
"""

from __future__ import annotations

import json
from typing import Any

from solotune.dataset.row import Row, RowError

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

def turns(where: str, value: Any, key: str) -> list[dict[str, Any]]:
    check_list(where, value, key)
    return [message(f"{where}: message {number}", message) for number, message in enumerate(value, 1)]


def check_list(where: str, value: Any, key: str) -> None:
    if isinstance(value, str):
        raise RowError(
            f"{where}: {key} is a text, not a list",
            seen=short(value),
            change="the list was saved as a string: parse it with json.loads before saving, or use jsonl",
        )
    if not isinstance(value, list):
        raise RowError(f"{where}: {key} is not a list", seen=short(value), allowed="a list of messages")
    if not value:
        raise RowError(f"{where}: {key} is empty", allowed="at least one message by the assistant")


def message(place: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        allowed = '{"role": "user", "content": "..."}'
        raise RowError(f"{place} is not an object", seen=short(message), allowed=allowed)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        meant = SHAREGPT_ROLES.get(role.lower()) if isinstance(role, str) else None
        raise RowError(
            f"{place}: unknown role",
            seen=short(role) if role is not None else "no role",
            allowed=", ".join(ROLES),
            change=f"did you mean {meant}?" if meant else None,
        )
    kept = {key: message[key] for key in _KEPT_KEYS if message.get(key)}
    content = message.get("content")
    if content is None and role == "assistant" and "tool_calls" in kept:
        content = ""
    return {"role": role, "content": text(place, content, "content"), **kept}


def text(place: str, value: Any, key: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return _joined_parts(place, value, key)
    what = "is missing or null" if value is None else f"is {type(value).__name__}, not text"
    raise RowError(f"{place}: {key} {what}", seen=None if value is None else short(value), allowed="text")


def _joined_parts(place: str, parts: list[Any], key: str) -> str:
    """`[{"type": "text", "text": "..."}]`, the multimodal spelling of a text, is the text."""
    texts = []
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else part
            raise RowError(f"{place}: {key} has a part that is not text", seen=short(kind), allowed="text only")
        texts.append(part["text"])
    return "".join(texts)


def tools(row: Row) -> list[dict[str, Any]] | None:
    tools = row.values.get("tools")
    if isinstance(tools, str):
        if not tools.strip():
            return None
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RowError(f"{row.where}: tools is not valid JSON", seen=str(error)) from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"{row.where}: tools is not a list of objects", seen=short(tools))
    return tools


def check_has_answer(record: Record) -> None:
    roles = [message["role"] for message in record.messages]
    if "assistant" not in roles:
        raise RowError(
            f"{record.where}: no assistant message, so nothing to learn",
            seen="the roles " + ", ".join(roles),
            allowed="at least one message with the role assistant",
            change="remove the row, or add the answer",
        )


def short(value: Any) -> str:
    """A value as a person can read it in one line; control characters and such stay escaped."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
