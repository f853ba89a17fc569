"""The shapes that chat data comes in, brought to one: a list of `{"role", "content"}` messages, or a text.

| format | row |
|---|---|
| messages | `{"messages": [{"role": "user", "content": "..."}, ...]}` (also under `conversations`) |
| sharegpt | `{"conversations": [{"from": "human", "value": "..."}, ...]}` |
| alpaca | `{"instruction": "...", "input": "...", "output": "..."}` |
| prompt-completion | `{"prompt": "...", "completion": "..."}`, both texts or both messages |
| text | `{"text": "..."}`, learned whole |

The first row decides, and every other row must have the same shape: a file of two shapes is two files that somebody
concatenated, and guessing row by row would hide it. A row that is wrong is an error with its place. The one thing
that is dropped instead, and counted, is a row whose answer is blank: real exports are full of them, they teach the
model to stop at once, and there is nothing in the row to mend.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from solotune.dataset.row import Row
from solotune.errors import InputError

ROLES = ("system", "developer", "user", "assistant", "tool")
EMPTY_ANSWER = "empty answer"

_SHAREGPT_ROLES = {
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
_ALLOWED = "messages, conversations, instruction + output, prompt + completion, or text"


@dataclass(frozen=True, slots=True)
class Record:
    """One row in the one shape everything downstream knows.

    `messages` is empty exactly for a row of plain text; then `text` is what is learned, from `answer_start` on.
    """

    where: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    text: str = ""
    answer_start: int = 0
    group: str | None = None

    @property
    def is_chat(self) -> bool:
        """Whether the row goes through the model's chat template."""
        return bool(self.messages)


class Format(NamedTuple):
    """A recognised shape: its name, the keys that make it, and how a row of it is read."""

    name: str
    keys: tuple[str, ...]
    convert: Callable[[Row], Record]


def recognise(rows: Sequence[Row]) -> Format:
    """The format of the rows, decided by the first and held by all.

    Raises:
        InputError: the first row has none of the known shapes, or a later one has another shape.
    """
    first = rows[0]
    found = _format_of(first.values)
    if found is None:
        raise InputError(
            f"{first.where}: not a known format",
            seen="the keys " + ", ".join(map(str, first.values)) if first.values else "no keys",
            allowed=_ALLOWED,
            change=_hint(first.values),
        )
    for row in rows:
        # None stands for a missing key in parquet and arrow
        missing = [key for key in found.keys if row.values.get(key) is None]
        if not missing:
            continue
        other = _format_of(row.values)
        is_mixed = other is not None and other.name != found.name
        problem = f"mixed formats: this row is {other.name}" if other and is_mixed else f"{missing[0]} is missing"
        raise InputError(
            f"{row.where}: {problem}",
            seen="the keys " + ", ".join(key for key, value in row.values.items() if value is not None),
            allowed=f"{found.name} ({', '.join(found.keys)}), as in {first.where}",
            change="make two files" if is_mixed else "add the key, or remove the row",
        )
    return found


def _format_of(values: dict[str, Any]) -> Format | None:
    """The first format, in this order, whose keys the row has: `messages` wins over a `prompt` beside it."""
    for found in _FORMATS:
        if all(values.get(key) is not None for key in found.keys):
            if found.name == "sharegpt" and not _is_sharegpt(values["conversations"]):
                continue
            return found
    return None


def _is_sharegpt(turns: Any) -> bool:
    first = turns[0] if isinstance(turns, list) and turns else {}
    return not (isinstance(first, dict) and "role" in first)


def _hint(values: dict[str, Any]) -> str | None:
    if "chosen" in values and "rejected" in values:
        return "this is preference data; fine-tuning wants one answer: rename chosen to completion"
    if "role" in values and "content" in values:
        return "each row is one message; put the messages of a conversation into one row under messages"
    pairs = (("question", "answer"), ("input", "output"), ("query", "response"), ("prompt", "response"))
    for prompt, answer in pairs:
        if prompt in values and answer in values:
            return f"rename {prompt} to prompt and {answer} to completion"
    return None


def convert(row: Row, found: Format) -> Record | str:
    """One row as a Record, or the reason why it is dropped.

    Raises:
        InputError: naming the row and, in it, the message that is wrong.
    """
    record = found.convert(row)
    if not record.is_chat:
        return record if record.text[record.answer_start :].strip() else EMPTY_ANSWER
    _check_has_answer(record)
    answers = [message for message in record.messages if message["role"] == "assistant"]
    if any(not message["content"].strip() and not message.get("tool_calls") for message in answers):
        return EMPTY_ANSWER
    return record


# --- the formats


def _messages(row: Row) -> Record:
    return _chat(row, _turns(row.where, row.values["messages"], "messages"))


def _conversations(row: Row) -> Record:
    return _chat(row, _turns(row.where, row.values["conversations"], "conversations"))


def _chat(row: Row, messages: list[dict[str, Any]], group: str | None = None) -> Record:
    return Record(row.where, messages=messages, tools=_tools(row), group=group)


def _sharegpt(row: Row) -> Record:
    turns = row.values["conversations"]
    _check_list(row.where, turns, "conversations")
    messages = []
    for number, turn in enumerate(turns, 1):
        place = f"{row.where}: turn {number}"
        if not isinstance(turn, dict):
            raise InputError(
                f"{place} is not an object", seen=_short(turn), allowed='{"from": "human", "value": "..."}'
            )
        role = turn.get("from")
        if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
            raise InputError(f"{place}: unknown speaker", seen=_short(role), allowed=", ".join(_SHAREGPT_ROLES))
        messages.append({"role": _SHAREGPT_ROLES[role], "content": _text(place, turn.get("value"), "value")})
    if isinstance(system := row.values.get("system"), str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return _chat(row, messages, _conversation_of(row.values.get("id")))


def _conversation_of(identifier: Any) -> str | None:
    """`4OzeAoa_43` is a piece of the conversation `4OzeAoa`: pieces of one stay on one side of the split."""
    if not isinstance(identifier, str):
        return None
    conversation, underscore, piece = identifier.rpartition("_")
    return conversation if underscore and conversation and piece.isdigit() else None


def _alpaca(row: Row) -> Record:
    values = row.values
    instruction = _text(row.where, values["instruction"], "instruction")
    extra = _text(row.where, values.get("input") or "", "input")
    answer = _text(row.where, values["output"], "output")
    messages = [
        {"role": "user", "content": f"{instruction}\n\n{extra}" if extra.strip() else instruction},
        {"role": "assistant", "content": answer},
    ]
    if isinstance(system := values.get("system"), str) and system.strip():
        messages.insert(0, {"role": "system", "content": system})
    return _chat(row, messages)


def _prompt_completion(row: Row) -> Record:
    prompt, completion = row.values["prompt"], row.values["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        before, after = _turns(row.where, prompt, "prompt"), _turns(row.where, completion, "completion")
        if any(message["role"] == "assistant" for message in before):
            # only the completion is to be learned, and a chat row learns every assistant turn
            raise InputError(
                f"{row.where}: an assistant message in prompt",
                allowed="only the completion is learned, so earlier answers cannot stand in prompt",
                change="put the whole conversation under messages; its answers are then all learned",
            )
        return _chat(row, before + after)
    prompt, completion = _text(row.where, prompt, "prompt"), _text(row.where, completion, "completion")
    return Record(row.where, text=prompt + completion, answer_start=len(prompt))


def _plain(row: Row) -> Record:
    text = _text(row.where, row.values["text"], "text")
    return Record(row.where, text=text)


_FORMATS = (
    Format("messages", ("messages",), _messages),
    Format("sharegpt", ("conversations",), _sharegpt),
    Format("messages", ("conversations",), _conversations),
    Format("prompt-completion", ("prompt", "completion"), _prompt_completion),
    Format("alpaca", ("instruction", "output"), _alpaca),
    Format("text", ("text",), _plain),
)


# --- one message


def _turns(where: str, value: Any, key: str) -> list[dict[str, Any]]:
    _check_list(where, value, key)
    return [_message(f"{where}: message {number}", message) for number, message in enumerate(value, 1)]


def _check_list(where: str, value: Any, key: str) -> None:
    if isinstance(value, str):
        raise InputError(
            f"{where}: {key} is a text, not a list",
            seen=_short(value),
            change="the list was saved as a string: parse it with json.loads before saving, or use jsonl",
        )
    if not isinstance(value, list):
        raise InputError(f"{where}: {key} is not a list", seen=_short(value), allowed="a list of messages")
    if not value:
        raise InputError(f"{where}: {key} is empty", allowed="at least one message by the assistant")


def _message(place: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        allowed = '{"role": "user", "content": "..."}'
        raise InputError(f"{place} is not an object", seen=_short(message), allowed=allowed)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        meant = _SHAREGPT_ROLES.get(role.lower()) if isinstance(role, str) else None
        raise InputError(
            f"{place}: unknown role",
            seen=_short(role) if role is not None else "no role",
            allowed=", ".join(ROLES),
            change=f"did you mean {meant}?" if meant else None,
        )
    kept = {key: message[key] for key in _KEPT_KEYS if message.get(key)}
    content = message.get("content")
    if content is None and role == "assistant" and "tool_calls" in kept:
        content = ""
    return {"role": role, "content": _text(place, content, "content"), **kept}


def _text(place: str, value: Any, key: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return _joined_parts(place, value, key)
    what = "is missing or null" if value is None else f"is {type(value).__name__}, not text"
    raise InputError(f"{place}: {key} {what}", seen=None if value is None else _short(value), allowed="text")


def _joined_parts(place: str, parts: list[Any], key: str) -> str:
    """`[{"type": "text", "text": "..."}]`, the multimodal spelling of a text, is the text."""
    texts = []
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else part
            raise InputError(f"{place}: {key} has a part that is not text", seen=_short(kind), allowed="text only")
        texts.append(part["text"])
    return "".join(texts)


def _tools(row: Row) -> list[dict[str, Any]] | None:
    tools = row.values.get("tools")
    if isinstance(tools, str):
        if not tools.strip():
            return None
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise InputError(f"{row.where}: tools is not valid JSON", seen=str(error)) from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"{row.where}: tools is not a list of objects", seen=_short(tools))
    return tools


def _check_has_answer(record: Record) -> None:
    roles = [message["role"] for message in record.messages]
    if "assistant" not in roles:
        raise InputError(
            f"{record.where}: no assistant message, so nothing to learn",
            seen="the roles " + ", ".join(roles),
            allowed="at least one message with the role assistant",
            change="remove the row, or add the answer",
        )


def _short(value: Any) -> str:
    """A value as a person can read it in one line; control characters and such stay escaped."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
