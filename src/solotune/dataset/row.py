"""A row with its place, and the reading of lines: what the readers of all formats share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from solotune.errors import InputError

MAX_ROW_BYTES = 64 << 20
"""Longest line or record: about 16 million tokens. Keeps one endless line from filling the memory."""

CHUNK_BYTES = 1 << 20


class Row(NamedTuple):
    """One row as it stands in the file, and where that is."""

    where: str
    values: dict[str, Any]


def lines(stream: BinaryIO, label: str) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, split at `\\n` alone, each at most MAX_ROW_BYTES long."""
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise InputError(f"{label}:{number}: the line is too long", allowed=f"{MAX_ROW_BYTES >> 20} MiB")
        yield number, line
