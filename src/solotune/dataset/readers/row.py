"""Shared by the readers of all formats: a row with its place, and splitting into lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple, TypeVar

from solotune.errors import Advice, InputError

MAX_ROW_BYTES = 64 << 20
"""Longest line or record: about 16 million tokens. Stops one endless line from filling the memory."""

MAX_BLANK_BYTES = 4 << 20
"""Most bytes of blank lines between two others: a few KB of compressed line ends could expand to hours of them."""

CHUNK_BYTES = 1 << 20

ID_KEYS = ("id", "message_id")
CONVERSATION_KEYS = ("conversation_id", "conversationId", "conversation id", "conversation")
PARENT_KEYS = ("parent_id", "parentId", "parent")
"""Keys that tell which rows belong together (`split/groups.py`)."""


_MOST_KEYS, _MOST_CHARACTERS = 64, 4096
_T = TypeVar("_T")


class RowError(InputError):
    """One bad row in a file that is readable otherwise: `on_bad_row: drop` drops it and counts it.

    Args:
        reason: the mistake without place and values; rows are counted by it.
    """

    def __init__(
        self,
        problem: str,
        *,
        reason: str,
        seen: object = None,
        allowed: str | None = None,
        change: str | Advice | None = None,
        fault: str | None = None,
    ) -> None:
        super().__init__(problem, seen=seen, allowed=allowed, change=change, fault=fault)
        self.reason = reason


class Row(NamedTuple):
    """One row as in the file, and its place."""

    where: str
    values: dict[str, Any]

    @property
    def renamed(self) -> Mapping[str, str]:
        """The `column_mapping` that the keys have gone through."""
        return {}


def once_per_shape(of_keys: Callable[[tuple[str, ...]], _T]) -> Callable[[tuple[str, ...]], _T]:
    """Remember the result of a function of a row's or message's keys: nearly all have the same ones.

    Very many or very long keys are not kept in memory.
    """
    remembered = lru_cache(maxsize=512)(of_keys)

    def result(keys: tuple[str, ...]) -> _T:
        is_ordinary = len(keys) <= _MOST_KEYS and sum(map(len, keys)) <= _MOST_CHARACTERS
        return remembered(keys) if is_ordinary else of_keys(keys)

    return result


def is_blank(value: Any) -> bool:
    """Whether a value holds nothing: null (which arrow writes for a missing key), a blank text, a list of such."""
    if value is None or value == "":
        return True
    if isinstance(value, str):
        return value.isspace()
    if isinstance(value, dict):
        return all(map(is_blank, value.values()))
    return isinstance(value, list) and all(map(is_blank, value))


def short(value: Any) -> str:
    """Format a value for a message, in one line; control and non-ASCII characters are escaped."""
    written = json.dumps(value, ensure_ascii=True, default=str)
    return written if len(written) <= 60 else written[:57] + "..."


def lines(stream: BinaryIO, label: str) -> Iterator[tuple[int, bytes]]:
    """Yield lines with their numbers, split at `\\n` alone, each at most MAX_ROW_BYTES long."""
    number = num_blank_bytes = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        num_blank_bytes = num_blank_bytes + len(line) if line.isspace() else 0
        if len(line) > MAX_ROW_BYTES:
            raise InputError(f"{label}:{number}: the line is too long", allowed=f"{MAX_ROW_BYTES >> 20} MiB")
        if num_blank_bytes > MAX_BLANK_BYTES:
            raise InputError(f"{label}:{number}: {MAX_BLANK_BYTES >> 20} MiB of blank lines", change="remove them")
        yield number, line
