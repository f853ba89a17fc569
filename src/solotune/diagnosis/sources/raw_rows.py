"""Read conversations as the file has them, not normalized: the input of another trainer's template."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from solotune.dataset.readers.source import Source
from solotune.errors import SolotuneError

NUM_ROWS, NUM_TEXTS = 5000, 200
_SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool"}
"""Role names of ShareGPT, which every reader of that format translates; in a `messages` column they are wrong."""


def raw_chats(dataset: Any, split: str = "train") -> list[list[dict[str, Any]]]:
    """Conversations with their roles as written; none if the data cannot be read or has none."""
    try:
        rows = islice(Source.of("dataset", dataset, split), NUM_ROWS)
        return [chat for row in rows if (chat := chat_of(row.values))]
    except (SolotuneError, OSError, ValueError):
        return []


def raw_texts(dataset: Any, split: str = "train") -> list[str]:
    """The texts of rows that have nothing but a text, as written; none if the data cannot be read or has none."""
    try:
        rows = islice(Source.of("dataset", dataset, split), NUM_TEXTS)
        return [text for row in rows if isinstance(text := row.values.get("text"), str)]
    except (SolotuneError, OSError, ValueError):
        return []


def chat_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row in the formats messages, ShareGPT, prompt and completion, or Alpaca."""
    for key in ("messages", "conversations", "chat", "dialogue"):
        found = row.get(key)
        if isinstance(found, list) and found and all(isinstance(one, Mapping) for one in found):
            return [_message(one) for one in found]
    for asks, answers in (("prompt", "completion"),):
        found = row.get(asks), row.get(answers)
        if all(isinstance(side, list) and side and all(isinstance(one, Mapping) for one in side) for side in found):
            return [_message(one) for side in found for one in side]  # type: ignore[union-attr]
    for asks, answers in (("prompt", "completion"), ("instruction", "output"), ("question", "answer")):
        if isinstance(row.get(asks), str) and isinstance(row.get(answers), str):
            asked = "\n".join(text for text in (row[asks], row.get("input")) if isinstance(text, str) and text)
            return [{"role": "user", "content": asked}, {"role": "assistant", "content": row[answers]}]
    return []


def _message(found: Mapping[str, Any]) -> dict[str, Any]:
    if "role" not in found and "from" in found:
        who = str(found["from"])
        return {"role": _SHAREGPT.get(who, who), "content": found.get("value")}
    return dict(found)
