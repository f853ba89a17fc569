"""Normalised rows of a source: their content on disk, what the split needs of all rows at once in memory.

56 bytes per row are in memory: two hashes of its content, and the links to rows that belong with it (`groups.py`). Rows
are kept in a `Store` as JSON, so reading them runs no code; a value that JSON cannot hold is refused.

Why two hashes
--------------
Copies are rows with the same content to the character: rows that differ in case, blanks or Unicode form may teach just
this difference, so none of them is a copy of another. But on two sides of the split they would be a leak. So `row_hash`
is of the folded text: it orders the rows of the split, and rows with the same one stay on one side.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn, overload

import numpy as np

from solotune.dataset.chat.formats import Record
from solotune.dataset.readers.row import RowError
from solotune.dataset.row_store import Store

_PIECE_CHARACTERS = 1 << 20
_COMPARED_CHARACTERS = 1 << 20  # of a row, for near-duplicates
_CONTENT = ("messages", "tools", "text", "answer_start")
_FIELDS = (*_CONTENT, *(field.name for field in fields(Record) if field.name not in _CONTENT))


@dataclass(frozen=True, eq=False)
class Records(Sequence[Record]):
    """R rows, in file order."""

    store: Store
    numbers: np.ndarray
    """int64 (R,): index of each row in the store"""
    hashes: np.ndarray
    """S16 (R,): half of `row_hash`'s sha256, equal for rows that differ in case, blanks and Unicode form only"""
    exact: np.ndarray
    """uint64 (R,): hash of the content, equal for copies only"""
    links: np.ndarray
    """uint64 (R, 4): see `groups.py`; the first is the group"""
    roots: np.ndarray | None = None
    """int64 (R,): after the split, a number that rows which belong together share; their records have it as `group`"""

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, row: int) -> Record: ...
    @overload
    def __getitem__(self, row: slice) -> list[Record]: ...
    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[one] for one in range(*row.indices(len(self)))]
        record = unpacked(self.store[int(self.numbers[row])])
        return record if self.roots is None else replace(record, group=str(self.roots[row]))

    def take(self, rows: np.ndarray) -> Records:
        """Select rows by number or by a boolean mask."""
        roots = None if self.roots is None else self.roots[rows]
        return Records(self.store, self.numbers[rows], self.hashes[rows], self.exact[rows], self.links[rows], roots)

    def name_of_group(self, row: int) -> str:
        """The group that the row names; without one, the row's own hash."""
        group = self[row].group if self.links[row, 0] else None
        return group if group is not None else self.hashes[row : row + 1].tobytes().hex()


def packed(record: Record) -> tuple[bytes, int]:
    """Serialise a record; also return a 64-bit hash of its content, which is equal for copies of a row.

    Weights, groups and places are no content: the copies of a row may have others.

    Raises:
        RowError: tools or tool calls hold a value that JSON does not have (a date from a parquet file).
    """

    def refuse(value: Any) -> NoReturn:
        raise RowError(
            f"{record.where}: tools or tool calls hold a value that is not JSON",
            reason="tools or tool calls hold what JSON has not",
            seen=f"{type(value).__name__} {value!s:.60}",
            allowed="texts, numbers, true, false, null, lists and objects",
        )

    def written(names: tuple[str, ...]) -> bytes:
        values = [getattr(record, name) for name in names]
        return json.dumps(values, ensure_ascii=False, default=refuse).encode("utf-8", "surrogatepass")

    content = written(_CONTENT)
    exact = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
    return content[:-1] + b"," + written(_FIELDS[len(_CONTENT) :])[1:], exact


def unpacked(data: bytes) -> Record:
    """Deserialise a record."""
    values = dict(zip(_FIELDS, json.loads(data.decode("utf-8", "surrogatepass")), strict=True))
    return Record(**{**values, "weights": tuple(values["weights"])})


def folded(text: str) -> str:
    """Normalise a text for comparison: NFKC, case-folded, runs of whitespace as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _folded_or_hash(text: str) -> str:
    """The folded text; of a very long one the hash of its folded pieces, since folding may make it 18 times as long."""
    if len(text) <= _PIECE_CHARACTERS:
        return folded(text)
    digest = hashlib.sha256()
    for begin in range(0, len(text), _PIECE_CHARACTERS):
        digest.update(folded(text[begin : begin + _PIECE_CHARACTERS]).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _said(record: Record) -> str:
    said: list[Any] = []
    for m in record.messages:
        thought = [m["reasoning_content"]] if "reasoning_content" in m else []
        said.append([m["role"], _folded_or_hash(m["content"]), m.get("tool_calls"), *thought])
    return json.dumps(said + ([record.tools] if record.tools else []), default=str)


def row_hash(record: Record) -> bytes:
    """Hash of a row's folded content, 16 bytes: equal for rows that differ in case, blanks and Unicode form only."""
    said = _said(record) if record.is_chat else _folded_or_hash(record.text)
    return hashlib.sha256(said.encode()).digest()[:16]


def spoken(record: Record) -> str:
    """Return the text that near-duplicates are compared by: without system prompts, which would make all rows alike."""
    if not record.is_chat:
        return folded(record.text[:_COMPARED_CHARACTERS])
    texts = " ".join(m["content"] for m in record.messages if m["role"] not in ("system", "developer"))
    return folded(texts[:_COMPARED_CHARACTERS])
