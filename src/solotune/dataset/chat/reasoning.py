"""Reasoning of an answer, under the names that files use for it: all become `reasoning_content`.

    {"role": "assistant", "reasoning_content": "...", "content": "..."}      DeepSeek, Qwen, vLLM
    {"role": "assistant", "thinking": "...", "content": "..."}               gpt-oss, Ollama; `reasoning`, `thought`
    {"role": "assistant", "reasoning_details": [{"type": "reasoning.text", "text": "..."}], ...}      OpenRouter
    {"role": "assistant", "content": [{"type": "thinking", "thinking": "..."}, {"type": "text", ...}]}      Anthropic

An answer whose reasoning gets lost teaches the model not to think, so what cannot be read is refused. Several names may
hold one text (OpenRouter writes it twice); if they differ, no rule could say which one is meant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from solotune.dataset.readers.row import RowError, is_blank, short

THOUGHT_KEYS = (
    "reasoning_content",
    "reasoning",
    "thinking",
    "thought",
    "thoughts",
    "thinking_content",
    "reasoning_text",
    "reasoning_details",
    "thinking_blocks",
)
THOUGHT_PARTS = ("reasoning", "thinking", "thought", "reasoning.text", "reasoning_text")
"""Types of a part (of a content, of `reasoning_details`) that holds reasoning, in one of the keys below."""
_TEXT_KEYS = ("text", "thinking", "reasoning", "value", "content", "thought", "summary")


def thought_in(place: str, values: Mapping[str, Any], keys: Iterable[str] = THOUGHT_KEYS) -> str | None:
    """Return the reasoning under some keys of a message or a row; None if none of them holds any.

    Raises:
        RowError: it is not text, or two keys hold different texts.
    """
    given = [(key, thought_of(place, values[key], key)) for key in keys if not is_blank(values.get(key))]
    return one_of(place, given) if given else None


def one_of(place: str, given: list[tuple[str, str]]) -> str:
    """The one text that all names hold.

    Args:
        given: names, each with its text; at least one.

    Raises:
        RowError: two texts differ in more than blanks around them.
    """
    (first, text), *others = given
    for key, other in others:
        if other.strip() != text.strip():
            raise RowError(
                f"{place}: {first} and {key} hold different reasoning",
                reason="two different reasonings",
                seen=f"{short(text)} and {short(other)}",
                allowed="one reasoning for an answer",
                change=f"keep one of {first} and {key}",
            )
    return text


def thought_of(place: str, value: Any, key: str) -> str:
    """The reasoning in a value: a text, a part with a text, or a list of such.

    Raises:
        RowError: it is something else, such as encrypted reasoning or a switch.
    """
    if isinstance(value, str):
        return value
    parts = [_text_in(part) for part in (value if isinstance(value, list) else [value])]
    texts = [part for part in parts if part is not None]
    if texts and len(texts) == len(parts):
        return "".join(texts)
    what = f"{key} is not text"
    raise RowError(
        f"{place}: {what}",
        reason=what,
        seen=short(value),
        allowed="the reasoning of the answer as text, or as parts with a text",
        change=f"remove {key}, or write its text under reasoning_content",
    )


def _text_in(part: Any) -> str | None:
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        return next((part[key] for key in _TEXT_KEYS if isinstance(part.get(key), str)), None)
    return None
