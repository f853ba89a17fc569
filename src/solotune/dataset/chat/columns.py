"""Columns beside a chat: system prompt, tools, earlier turns, context and reasoning.

Each has several names in people's files (`sys`, `system_prompt`, `tool_defs`, `chat_history`, ...); case, blanks and
hyphens do not matter. A column that a format has no place for is refused with a `column_mapping` that gives it one: a
chat without its tools, or an answer without its passage, teaches the model to make things up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from solotune.dataset.chat.reasoning import THOUGHT_KEYS, thought_in
from solotune.dataset.chat.tool_calls import from_json
from solotune.dataset.readers.column_mapping import advised
from solotune.dataset.readers.row import Row, RowError, is_blank, once_per_shape, short

Message = dict[str, Any]
Tools = tuple[str, str, Any]
"""Tool definitions as written, with their place and key."""


class Turns(NamedTuple):
    """A list of messages, checked and normalised (`messages.turns`)."""

    messages: list[Message]
    weights: list[float]
    """One for each assistant message."""
    tools: list[Tools]
    """What a system turn defines."""
    places: list[str]
    """Name of each message, for error messages."""


_NAMES = {
    "system": ("system", "system_prompt", "sys", "sys_prompt", "system_message", "system_instruction", "system_text"),
    "tools": ("tools", "tool_defs", "tool_definitions", "functions", "function_definitions", "available_tools"),
    "history": ("history", "chat_history", "conversation_history", "dialogue_history", "dialog_history"),
    "context": ("context",),
    "thought": THOUGHT_KEYS,
    "template": ("chat_template_kwargs", "chat_template_args", "enable_thinking", "reasoning_effort"),
}
TOOL_KEYS = frozenset(_NAMES["tools"])
_LONGEST_NAME = 100


def meanings(values: Mapping[str, Any]) -> Mapping[str, tuple[str, ...]]:
    """The keys of a row that hold a system prompt, tools, ...: meaning -> keys."""
    return _meanings(tuple(values))


@once_per_shape
def _meanings(keys: tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for key in keys:
        if (meaning := meaning_of(key)) is not None:
            found[meaning] = (*found.get(meaning, ()), key)
    return found


def plain_name(key: Any) -> str:
    """A key in lower case without blanks, hyphens, underscores: `System Prompt`, `systemPrompt` -> `systemprompt`."""
    return re.sub(r"[\s_-]+", "", str(key)[:_LONGEST_NAME]).lower()


_MEANING = {plain_name(name): meaning for meaning, names in _NAMES.items() for name in names}


def meaning_of(key: str) -> str | None:
    """The meaning of a column that a chat can have beside it; None for any other column."""
    return _MEANING.get(plain_name(key))


def given(row: Row, meaning: str) -> list[str]:
    """The keys of a row with a meaning that hold something."""
    return [key for key in meanings(row.values).get(meaning, ()) if not is_blank(row.values[key])]


# --- what a chat takes


def with_system(row: Row, messages: list[Message]) -> list[Message]:
    """Put a system prompt that has its own column in front of the chat.

    Raises:
        RowError: it is not text, or the chat begins with another system turn.
    """
    system = system_of(row)
    if system is None:
        return messages
    key, text = system
    if messages and messages[0]["role"] in ("system", "developer"):
        own = messages[0]["content"]
        if own.strip() == text.strip():
            return messages
        if own.strip():
            raise RowError(
                f"{row.where}: {key} differs from the system turn that the chat begins with",
                reason=f"{key} differs from the chat's own system turn",
                seen=f"{short(text)} and {short(own)}",
                allowed="one system prompt for a chat",
                change=advised(row, {key: "ignore"}, "to use the chat's own, set ", "; or remove that turn"),
            )
        messages = messages[1:]
    return [{"role": "system", "content": text}, *messages]


def system_of(row: Row) -> tuple[str, str] | None:
    """The key and the text of the row's system prompt, if it has one."""
    keys = given(row, "system")
    if not keys:
        return None
    first = keys[0]
    texts = [_text_of(row.values[key]) for key in keys]
    for key, text in zip(keys, texts, strict=True):
        if text is None:
            raise _not_read(row, key, f"{key} is not text", "a system prompt is a text")
        if text.strip() != (texts[0] or "").strip():
            raise _differ(row, first, key)
    return first, texts[0] or ""


def _text_of(value: Any) -> str | None:
    """A text, also as an API writes it: `[{"text": "..."}]`, `{"parts": [{"text": "..."}]}`; None for other values."""
    if isinstance(value, dict):
        value = value.get("parts", [value])
    if not isinstance(value, list):
        return value if isinstance(value, str) else None
    parts = [part.get("text") if isinstance(part, dict) else part for part in value]
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(parts) else None


def tools_of(row: Row, in_messages: Sequence[Tools] = ()) -> list[dict[str, Any]] | None:
    """Return the tool definitions of a row, given as a list, as one object, or as JSON text of these.

    A bare function is wrapped as an API passes it to the template: `{"type": "function", "function": ...}`.

    Args:
        in_messages: definitions that a system turn holds.

    Raises:
        RowError: they are something else, or two keys hold different ones.
    """
    written = [(row.where, key, row.values[key]) for key in given(row, "tools")] + list(in_messages)
    found: list[tuple[str, list[dict[str, Any]]]] = []
    for place, key, value in written:
        try:
            tools = _tools(place, value, key)
        except RowError as error:
            if key in row.values and key != "tools":  # that name leaves no doubt
                error.advise(advised(row, {key: "ignore"}, "if these are no tools, leave the column out: "))
            raise
        if tools and found and tools != found[0][1]:
            raise _differ(row, found[0][0], key)
        found += [(key, tools)] if tools else []
    return found[0][1] if found else None


def _tools(place: str, value: Any, key: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        value = from_json(place, value, key)
    if value is None:
        return []
    listed = [value] if isinstance(value, dict) and ("name" in value or "function" in value) else value
    if isinstance(listed, list):
        listed = [from_json(place, tool, key) if isinstance(tool, str) else tool for tool in listed]
    if not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed):
        what = f"{key} is not a list of objects"
        raise RowError(
            f"{place}: {what}",
            reason=what,
            seen=short(value),
            allowed='[{"type": "function", "function": {"name": "...", "parameters": {...}}}], also as JSON text',
        )
    return [
        {"type": "function", "function": tool} if "name" in tool and "type" not in tool else tool for tool in listed
    ]


def thought_of_row(row: Row) -> tuple[str, str] | None:
    """The first key and the text of the reasoning that the row holds beside its answer.

    Raises:
        RowError: it is not text, or two keys differ.
    """
    keys = given(row, "thought")
    if not keys:
        return None
    for key in keys:
        value = row.values[key]
        is_switch = isinstance(value, str) and value.strip().lower() in ("on", "off", "true", "false")
        if is_switch or not isinstance(value, (str, list, dict)):
            raise _not_read(row, key, f"{key} is not a reasoning", "the reasoning of the answer, as text")
    try:
        return keys[0], thought_in(row.where, row.values, keys) or ""
    except RowError as error:
        error.advise(advised(row, {keys[-1]: "ignore"}, "leave it out: "))
        raise


def with_thought(row: Row, messages: list[Message]) -> list[Message]:
    """Give the reasoning that has its own column to the answer, if there is one answer only.

    Raises:
        RowError: the chat has several answers, so no rule could say which one it belongs to.
    """
    thought = thought_of_row(row)
    if thought is None:
        return messages
    key, text = thought
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    held = [messages[n][part] for n in answers for part in ("content", "reasoning_content") if part in messages[n]]
    if any(text.strip() in one for one in held):
        return messages  # also in its own column, as in OpenThoughts
    if len(answers) != 1 or "reasoning_content" in messages[answers[0]]:
        raise _not_read(
            row,
            key,
            f"{key} in a row whose chat has {len(answers)} answer{'s' * (len(answers) != 1)}",
            "reasoning_content in the message that it belongs to",
        )
    (only,) = answers
    return [*messages[:only], {**messages[only], "reasoning_content": text}, *messages[only + 1 :]]


def earlier_turns(row: Row, read: Callable[[str, Any, str], Turns]) -> tuple[list[Message], list[float], list[Tools]]:
    """The turns of Alpaca's `history`, the weights of their answers, and the tools that they define.

    `[[question, answer], ...]` or a list of messages, also as JSON text. The answers are learned too, as LLaMA-Factory
    does. Blank sides of a pair are left out.

    Args:
        read: converts a list of messages: `messages.turns`.

    Raises:
        RowError: it is something else.
    """
    keys = given(row, "history")
    if not keys:
        return [], [], []
    key, value = keys[0], row.values[keys[0]]
    for other in keys[1:]:
        if row.values[other] != value:
            raise _differ(row, key, other)
    if isinstance(value, str):
        value = from_json(row.where, value, key) if value.lstrip().startswith("[") else value
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        found = read(row.where, value, key)
        return found.messages, found.weights, found.tools
    turns: list[Message] = []
    for pair in value if isinstance(value, list) else [None]:
        if (
            not isinstance(pair, (list, tuple))
            or len(pair) != 2
            or not all(isinstance(side, str | None) for side in pair)
        ):
            raise _not_read(
                row,
                key,
                f"{key} is not a list of earlier turns",
                '[["question", "answer"], ...], or a list of messages',
                seen=short(value if pair is None else pair),
            )
        sides = zip(("user", "assistant"), pair, strict=True)
        turns += [{"role": role, "content": text} for role, text in sides if not is_blank(text)]
    return turns, [1.0 for turn in turns if turn["role"] == "assistant"], []


# --- what a format has no place for


def refuse_template_arguments(row: Row) -> None:
    """Refuse arguments for the chat template in a row: all rows are rendered alike."""
    for key in given(row, "template"):
        raise _not_read(
            row, key, f"{key} is for the chat template, and rows cannot set it", "one rendering for all rows"
        )


def refuse_history(row: Row) -> None:
    """Refuse earlier turns in a column beside a list of messages."""
    for key in given(row, "history"):
        raise _not_read(row, key, f"{key} in a row that has a list of messages", "earlier turns in the list itself")


def refuse_beside_text(row: Row, text: str, *, is_pair: bool) -> None:
    """Refuse what a row of plain text has no place for, unless the text holds it already.

    Args:
        is_pair: whether the row is a prompt and a completion, which could also be a chat.
    """
    if not meanings(row.values):
        return
    targets = {"system": "system", "tools": "tools", "history": "history", "thought": "reasoning_content"}
    for meaning, name in {**targets, **({"context": "input"} if is_pair else {})}.items():
        for key in given(row, meaning):
            value = row.values[key]
            if isinstance(value, str) and value.strip() in text:
                continue
            left_out = advised(row, {key: "ignore"}, "to leave it out, set ")
            chat = {"prompt": "instruction", "completion": "output", key: name}
            is_readable = is_pair and (meaning != "context" or not isinstance(value, dict))
            raise RowError(
                f"{row.where}: {key} in a row of plain text, which cannot use it",
                reason=f"{key} in a row of plain text",
                seen=f"{key}: {short(value)}",
                allowed=f"{key} inside the text, or rows that are chats",
                change=advised(row, chat, "to make it part of a chat, set ", f"; {left_out}")
                if is_readable
                else advised(row, {key: "ignore"}, f"write {key} into the text; to leave it out, set "),
            )


def _not_read(row: Row, key: str, what: str, allowed: str, *, seen: str | None = None) -> RowError:
    return RowError(
        f"{row.where}: {what}",
        reason=what,
        seen=seen or f"{key}: {short(row.values[key])}",
        allowed=allowed,
        change=advised(row, {key: "ignore"}, "change the rows, or leave the column out: "),
    )


def _differ(row: Row, first: str, second: str) -> RowError:
    what = f"{first} and {second} differ"
    changes = {key: "ignore" for key in (second,) if key in row.values}
    return RowError(
        f"{row.where}: {what}",
        reason=what,
        allowed="one of them, or both with the same content",
        change=advised(row, changes, "keep one: ") if changes else "keep one",
    )
