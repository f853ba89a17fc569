"""Rows that rules judge, as arrays: `Side` for a sample of them or all, `Whole` for a hash of every row.

The ids of the judged rows are one array, and every check of tokens is an array operation: 5,000 chats of 1,200 tokens
are six million ids. All rows are judged up to 20,000 rows and eight million tokens; of more, evenly spaced blocks of
rows (`Side`). Faults that a single row can cause (a leak, an id without an embedding) are checked on all (`Whole`).
"""

from __future__ import annotations

import hashlib
import unicodedata
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from solotune.dataset.example import ids_of, lengths_of

if TYPE_CHECKING:
    from solotune.dataset.example import Example

NUM_DECODED = 300
"""Rows decoded for a check of text. A share of 5 % is then known to within 2.5 points, and 5,000 rows cost less than a
second."""
NUM_READ = 20_000
"""Rows that are judged: all of most files. This many cost a fifth of a second per rule."""
NUM_TOKENS = 8 << 20
"""Tokens of the rows that are judged: 40 MB, and ten times that at the peak of the largest rule."""
STRETCH = 16
"""Consecutive rows in each block of a sample, so that a rule can compare neighbours."""
MIN_ROWS = 3
"""Fewer rows are not a pattern; prevents that a share of a tiny file counts as one."""


@dataclass(frozen=True)
class Side:
    """One side of the split as arrays. R rows, N tokens in all, A answers (runs of supervised tokens)."""

    rows: Sequence[Example]
    ids: np.ndarray
    """int32 (N,), all rows concatenated"""
    loss_mask: np.ndarray
    """bool (N,)"""
    starts: np.ndarray
    """int64 (R + 1,): row r is ids[starts[r] : starts[r + 1]]"""
    begins: np.ndarray
    """int64 (A,): position in `ids` of the first token of an answer"""
    ends: np.ndarray
    """int64 (A,): position after its last token"""
    row_of: np.ndarray
    """int64 (A,): the row of each answer"""

    @classmethod
    def of(cls, rows: Sequence[Example]) -> Side:
        """The arrays of some examples."""
        lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int64)
        starts = np.concatenate(([0], np.cumsum(lengths)))
        ids = np.concatenate([row.input_ids for row in rows]) if rows else np.zeros(0, np.int32)
        supervised = np.concatenate([row.loss_mask for row in rows]) if rows else np.zeros(0, bool)
        before = np.concatenate(([False], supervised[:-1])) if len(ids) else supervised
        after = np.concatenate((supervised[1:], [False])) if len(ids) else supervised
        is_first, is_last = np.zeros(len(ids) + 1, bool), np.zeros(len(ids) + 1, bool)
        is_first[starts[:-1]], is_last[starts[1:] - 1] = True, True
        begins = np.flatnonzero(supervised & (~before | is_first[:-1]))
        ends = np.flatnonzero(supervised & (~after | is_last[:-1])) + 1
        return cls(rows, ids, supervised, starts, begins, ends, np.searchsorted(starts, begins, side="right") - 1)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 (R,): tokens of each row."""
        return np.diff(self.starts)

    @cached_property
    def num_labels(self) -> np.ndarray:
        """int64 (R,): supervised tokens of each row."""
        return np.diff(np.concatenate(([0], np.cumsum(self.loss_mask)))[self.starts])

    def places(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The names of the first three of these rows."""
        return [self.rows[int(row)].where for row in rows[:3]]


@dataclass(frozen=True)
class Whole:
    """All rows of a side, as 12 bytes each."""

    rows: Sequence[Example]
    hashes: np.ndarray
    """uint64 (R,): equal for rows with equal ids"""
    largest: np.ndarray
    """int32 (R,): the largest id of each row"""

    @classmethod
    def of(cls, rows: Sequence[Example]) -> Whole:
        """Read the ids of all rows."""
        hashes, largest = array("Q"), array("i")
        for ids in ids_of(rows):
            hashes.append(int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little"))
            largest.append(int(ids.max(initial=-1)))
        return cls(rows, np.array(hashes, np.uint64), np.array(largest, np.int32))

    def places(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The names of the first three of these rows."""
        return [self.rows[int(row)].where for row in rows[:3]]


def judged(rows: Sequence[Example]) -> list[Example]:
    """All rows, or evenly spaced blocks of them with about NUM_READ rows or NUM_TOKENS tokens in all."""
    num_tokens = sum(lengths_of(rows))
    share = min(NUM_READ / max(len(rows), 1), NUM_TOKENS / max(num_tokens, 1))
    if share >= 1:
        return list(rows)
    num_stretches = max(1, int(share * len(rows) / STRETCH))
    begins = np.linspace(0, max(len(rows) - STRETCH, 0), num_stretches).astype(int)
    return [row for begin in begins for row in rows[int(begin) : int(begin) + STRETCH]]


def evenly(rows: Sequence[int], count: int) -> list[int]:
    """At most `count` of the rows, evenly spaced, the first and the last among them."""
    if len(rows) <= count:
        return list(rows)
    return [rows[i] for i in np.linspace(0, len(rows) - 1, count).astype(int)]


def squeezed(text: str) -> str:
    """Text without white space and case, to find it in a rendering: templates and tokenizers change both."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def percent(part: float, whole: float) -> str:
    """`12 %`, `0.4 %`."""
    share = 100 * part / whole if whole else 0.0
    return f"{share:.1f} %" if share < 10 else f"{share:.0f} %"


def is_pattern(count: int, whole: int, share: float) -> bool:
    """Whether `count` of `whole` rows is at least that share, and at least MIN_ROWS (or all)."""
    return count >= share * whole and (count >= MIN_ROWS or count == whole > 0)
