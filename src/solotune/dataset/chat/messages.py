"""Messages of a row: check and normalise roles, texts, calls, reasoning and loss weights.

A wrong message is a `RowError` that names the row and the message. A message may be `{"role", "content"}` or ShareGPT's
`{"from", "value"}`; keys and roles may differ in case. Only keys that chat templates know are kept, so an extra column
in the data cannot change a rendering; `unused_keys.py` names the others. Tool calls are handled in `tool_calls.py`,
reasoning in `reasoning.py`, weights in `weights.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from solotune.dataset.chat.columns import TOOL_KEYS, Message, Tools, Turns, plain_name
from solotune.dataset.chat.reasoning import THOUGHT_KEYS, THOUGHT_PARTS, one_of, thought_in, thought_of
from solotune.dataset.chat.tool_calls import CALL_ID_KEYS, CALL_KEYS, arguments_key, calls_of, normal_calls
from solotune.dataset.chat.weights import MESSAGE_KEYS, weight_of_message
from solotune.dataset.readers.json_window import parse_json
from solotune.dataset.readers.row import RowError, is_blank, once_per_shape, short

ROLES = ("system", "developer", "user", "assistant", "tool")
CALL_ROLES = ("function_call", "tool_call", "tool_calls")
"""Turns of ShareGPT and ms-swift whose text is a call, or a list of calls, in JSON."""
_RESULT_ROLES = ("observation", "tool_response", "tool_result", "function_response", "function", "ipython")
_TOOL_ROLES = {**dict.fromkeys(CALL_ROLES, "assistant"), **dict.fromkeys(_RESULT_ROLES, "tool")}
MESSAGE_ROLES = {**{role: role for role in ROLES}, "model": "assistant", **_TOOL_ROLES}
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    **_TOOL_ROLES,
}
LIST_KEYS = ("messages", "conversations")
_ROLE_KEYS = ("role", "from", "speaker")
_CONTENT_KEYS = ("content", "value", "text", "message", "parts")  # the last is Gemini's
_SHAREGPT_CONTENT_KEYS = ("value", "content", "text", "message")
MEDIA_KEYS = frozenset(("images", "image", "videos", "video", "audios", "audio"))
_NAME_KEYS = ("name", "tool_name")  # the second is Ollama's
_RESULT_ID_KEYS = ("tool_call_id", "call_id", "tool_use_id")
_READ = frozenset((*_NAME_KEYS, *_RESULT_ID_KEYS, *CALL_KEYS, *THOUGHT_KEYS, *TOOL_KEYS, *MESSAGE_KEYS, *MEDIA_KEYS))
"""Keys besides role and content that are read, or refused if they hold something."""
_KNOWN = {plain_name(key): key for key in (*_READ, *_ROLE_KEYS, *_CONTENT_KEYS)}
_TEXT_PARTS = ("text", "input_text", "output_text")
_CALL_PARTS = ("tool_call", "tool_use", "function_call")
_PART_KEYS = ("value", "text", "thinking", "reasoning", "thought", "summary")


class Keys(NamedTuple):
    """Where a message has its role and content, and whether it has keys that need a closer look."""

    role: str
    content: str
    is_plain: bool
    """Only the role and the content are read."""
    others: tuple[str, ...]
    """Keys that nothing reads."""
    renamed: dict[str, str]
    """Keys in another case than ours: `Role`, `toolCalls`."""


def keys_of(message: Mapping[str, Any]) -> Keys:
    """Find the role and the content of a message among its keys; null stands for a missing key in parquet and arrow."""
    keys = tuple(message)
    if None in message.values():
        keys = tuple([key for key in keys if message[key] is not None])
    return _keys_of(keys)


@once_per_shape
def _keys_of(keys: tuple[str, ...]) -> Keys:
    role = next((name for name in _ROLE_KEYS if name in keys), "role")
    names = _CONTENT_KEYS if role == "role" else _SHAREGPT_CONTENT_KEYS
    content = next((name for name in names if name in keys), names[0])
    others = tuple(key for key in keys if key not in (role, content))
    renamed: dict[str, str] = {}
    for key in others:
        name = _KNOWN.get(plain_name(key))
        if name is not None and name not in (*keys, *renamed.values()):
            renamed[key] = name
    return Keys(role, content, _READ.isdisjoint(others), tuple(k for k in others if k not in _READ), renamed)


def in_our_case(message: dict[str, Any]) -> tuple[dict[str, Any], Keys]:
    """A message with `role` for `Role`, `tool_calls` for `toolCalls` (the same object if so already), and its keys."""
    keys = keys_of(message)
    if keys.renamed:
        message = {keys.renamed.get(key, key): value for key, value in message.items()}
        keys = keys_of(message)
    return message, keys


def is_sharegpt(messages: Any, key: str) -> bool:
    """Whether a list of messages has ShareGPT's keys, as its first message shows; if that shows nothing, by its key."""
    first = messages[0] if isinstance(messages, list) and messages else None
    if not isinstance(first, dict):
        return key == "conversations"
    first, keys = in_our_case(first)
    return key == "conversations" if keys.role not in first else keys.role != "role"


def as_list(value: Any) -> Any:
    """A single message as a list; lists of roles and of contents (`datasets` stores them so) as a list of messages."""
    if not isinstance(value, dict):
        return value
    value, keys = in_our_case(value)
    columns = [column for column in value.values() if isinstance(column, list)]
    if isinstance(value.get(keys.role), list) and len(columns) == len(value) and len({*map(len, columns)}) == 1:
        return [dict(zip(value, one, strict=True)) for one in zip(*columns, strict=True)]
    return [value] if isinstance(value.get(keys.role), str) else value


def chat_list(value: Any) -> Any:
    """The value under `messages` or `conversations` as a list; a csv file keeps it as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError):
            value = parse_json(value)
    return as_list(value)


def turns(where: str, value: Any, key: str) -> Turns:
    """Check and normalise a list of messages."""
    value = chat_list(value)
    check_list(where, value, key)
    word = "turn" if key == "conversations" and is_sharegpt(value, key) else "message"
    found = Turns([], [], [], [])
    messages, weights = found.messages, found.weights
    is_after_calls = False
    for number, one in enumerate(value, 1):
        place = f"{where}: {word} {number}"
        message, weight, is_calls = _message(place, one, found.tools)
        if is_calls and is_after_calls and weight == weights[-1]:  # one turn for each call that the answer makes
            messages[-1]["tool_calls"] += message["tool_calls"]
            continue
        is_after_calls = is_calls
        messages.append(message)
        found.places.append(place)
        if message["role"] == "assistant":
            weights.append(weight)
    return found


def check_list(where: str, value: Any, key: str) -> None:
    """Refuse a value that is not a list of at least one item."""
    if isinstance(value, str):
        raise RowError(
            f"{where}: {key} is a text, not a list",
            reason=f"{key} is a text, not a list",
            seen=short(value),
            allowed='[{"role": "user", "content": "..."}, ...], also as JSON text',
            change="save Python lists as JSON, with json.dumps(ast.literal_eval(text))"
            if value.lstrip()[:2] in ("[{", "{'")
            else None,
        )
    if not isinstance(value, list):
        what = f"{key} is not a list"
        raise RowError(f"{where}: {what}", reason=what, seen=short(value), allowed="a list of messages")
    if not value:
        what = f"{key} is empty"
        raise RowError(f"{where}: {what}", reason=what, allowed="at least one assistant message")


# --- one message


def _message(place: str, written: Any, tools: list[Tools]) -> tuple[Message, float, bool]:
    """Return the message, its weight, and whether it is a turn of calls; tools that it defines are added to `tools`."""
    if not isinstance(written, dict):
        raise not_an_object(place, written, '{"role": "user", "content": "..."}')
    written, keys = in_our_case(written)
    name, role = _role(place, written, keys)
    is_calls = name in CALL_ROLES
    if keys.is_plain:
        kept, weight = {}, 1.0
    else:
        _check_keys(place, written, role, tools)
        kept = _kept(written)
        weight = weight_of_message(place, written, is_answer=role == "assistant")
    if role == "assistant":
        return {"role": role, **kept, **_answer(place, written, keys, name if is_calls else "")}, weight, is_calls
    return {"role": role, "content": text(place, written.get(keys.content), keys.content), **kept}, weight, False


def _role(place: str, message: Message, keys: Keys) -> tuple[str, str]:
    """The role as the file names it, in lower case, and in our names."""
    written = message.get(keys.role)
    is_ours = keys.role == "role"
    name = written.lower() if isinstance(written, str) else ""
    if (role := (MESSAGE_ROLES if is_ours else SHAREGPT_ROLES).get(name)) is not None:
        return name, role
    if not is_ours:
        raise RowError(
            f"{place}: unknown speaker",
            reason="unknown speaker",
            seen=short(written),
            allowed=", ".join(SHAREGPT_ROLES),
            fault=_WRONG_ROLES if name else None,
        )
    meant = SHAREGPT_ROLES.get(name)
    raise RowError(
        f"{place}: unknown role",
        reason="unknown role",
        seen=short(written) if written is not None else _no_role(message),
        allowed=", ".join(ROLES),
        change=f"did you mean {meant}?" if meant else None if _has_shape(message) else _SHAPE,
        fault=_WRONG_ROLES if name else None,
    )


_WRONG_ROLES = "F36"
_SHAPE = 'write each turn as {"role": "user", "content": "..."}'


def _has_shape(message: Message) -> bool:
    return "role" in message or "content" in message


def _no_role(message: Message) -> str:
    return "no role" if _has_shape(message) else "no role, but the keys " + ", ".join(map(str, message))


def _kept(message: Message) -> Message:
    found = {
        name: next((message[key] for key in keys if message.get(key)), None)
        for name, keys in (("tool_call_id", _RESULT_ID_KEYS), ("name", _NAME_KEYS))
    }
    return {name: value for name, value in found.items() if value is not None}


def _check_keys(place: str, message: Message, role: str, tools: list[Tools]) -> None:
    """Refuse keys that this role cannot have, and collect the tools that a system turn defines."""
    for key in sorted(MEDIA_KEYS & message.keys()):
        if not is_blank(message[key]):
            raise _misplaced(place, key, role, "text only", f"has {key}")
    for key in sorted(TOOL_KEYS & message.keys()):
        if is_blank(message[key]):
            continue
        if role not in ("system", "developer"):
            raise _misplaced(place, key, role, f"{key} next to the messages of the row")
        tools.append((place, key, message[key]))
    if role == "assistant":
        return
    for key in CALL_KEYS:
        if message.get(key):
            raise _misplaced(place, key, role, f"{key} on assistant messages only")
    for key in THOUGHT_KEYS:
        if not is_blank(message.get(key)):
            raise _misplaced(place, key, role, f"{key} on assistant messages only")


def _misplaced(place: str, key: str, role: str, allowed: str, what: str | None = None) -> RowError:
    article = "an answer" if role == "assistant" else "a message that is not an answer"
    what = what or f"{key} on {article}"
    return RowError(f"{place}: {what}", reason=what, seen=f"the role {role}", allowed=allowed)


def _answer(place: str, message: Message, keys: Keys, call_role: str) -> Message:
    """The assistant's text, calls and reasoning; each may also be a part of the content (LLaMA-Factory, Anthropic)."""
    content = message.get(keys.content)
    calls = [] if keys.is_plain else calls_of(place, message)
    if call_role and not (calls and is_blank(content)):
        calls, content = normal_calls(place, content, call_role), ""
    thought = None if keys.is_plain else thought_in(place, message)
    if isinstance(content, list):
        calls += [call for part in content if _type_of(part) in _CALL_PARTS for call in _calls_in(place, part)]
        parts = [_thought_in_part(place, part) for part in content if _type_of(part) in THOUGHT_PARTS]
        if parts:
            given = [("reasoning_content", thought)] if thought is not None else []
            thought = one_of(place, [*given, ("content", "".join(parts))])
        content = [part for part in content if _type_of(part) not in (*_CALL_PARTS, *THOUGHT_PARTS)]
    if content is None and calls:
        content = ""
    if content is None and isinstance(message.get("refusal"), str):
        what = "a refusal without content"
        change = "write the refusal under content, if it is to be learned; else remove the row"
        raise RowError(f"{place}: {what}", reason=what, seen=short(message["refusal"]), change=change)
    answer: Message = {"content": text(place, content, keys.content)}
    if calls:
        answer["tool_calls"] = calls
    if thought is not None:
        answer["reasoning_content"] = thought
    return answer


def keys_of_part(part: Message) -> tuple[str, ...]:
    """The keys of a content part that are read."""
    if part.get("type") in THOUGHT_PARTS:
        return ("type", next((key for key in _PART_KEYS if isinstance(part.get(key), str)), "text"))
    if part.get("type") in _CALL_PARTS and part.get("value") is None:
        return ("type", *CALL_ID_KEYS, "name", "function", arguments_key(part))
    return ("type", "text" if "text" in part else "value")


def _type_of(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else None


def _calls_in(place: str, part: Message) -> list[Message]:
    value = part.get("value")
    return normal_calls(place, part if value is None else value, part["type"])


def _thought_in_part(place: str, part: Message) -> str:
    return thought_of(
        place, next((part[key] for key in _PART_KEYS if isinstance(part.get(key), str)), part), part["type"]
    )


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
        is_text = isinstance(part, dict) and part.get("type", "text") in _TEXT_PARTS
        value = part.get("text", part.get("value")) if is_text else None
        if not isinstance(value, str):
            kind = part.get("type") if isinstance(part, dict) else part
            what = f"{key} has a part that is not text"
            raise RowError(f"{place}: {what}", reason=what, seen=short(kind), allowed="text only")
        texts.append(value)
    return "".join(texts)
