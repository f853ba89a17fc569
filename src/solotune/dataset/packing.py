"""Pack several rows into one sequence: less padding, and each row is computed as if it were alone.

Chats differ in length, so a batch padded to its longest row computes on padding (1.6 times the tokens on real chats,
four rows per batch). A pack holds complete rows, never parts of one, up to `max_length` tokens; positions restart with
each row and attention stays within it, so every row's loss and gradient are those it has alone.

Rows are placed by best-fit decreasing: the longest first, each into the fullest pack it still fits (Johnson 1973; at
most 11/9 of the optimum and one pack more, far closer on many short rows). The packs depend only on the lengths, so a
resumed run has the same packs; their order is drawn again for each epoch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence, Sized
from typing import Any

import numpy as np


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the row numbers of each pack.

    Args:
        lengths: tokens of each row, none above `capacity`.
        capacity: tokens of a pack.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for row in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        place = bisect_left(room, (lengths[row], -1))
        if place < len(room):
            free, chosen = room.pop(place)
        else:
            free, chosen = capacity, len(packs)
            packs.append([])
        packs[chosen].append(row)
        insort(room, (free - lengths[row], chosen))
    return packs


def fill(lengths: Sequence[int], packs: Sized, capacity: int) -> float:
    """Share of all positions in the packs that hold a token."""
    return sum(lengths) / (len(packs) * capacity) if packs else 0.0


def account(lengths: Sequence[int], capacity: int) -> dict[str, Any]:
    """Return the part `packing` of data.json: statistics of the packed training rows. No row is truncated.

    `tokens_empty` counts the unused positions in the sequences; a batch of one sequence does not compute on them.
    """
    packs = pack(lengths, capacity)
    return {
        "sequences": len(packs),
        "sequence_tokens": capacity,
        "rows": len(lengths),
        "fill": round(fill(lengths, packs, capacity), 4),
        "tokens_empty": len(packs) * capacity - sum(lengths),
    }


def in_words(packing: dict[str, Any]) -> str:
    """Describe the packing in one line."""
    return (
        f"{packing['rows']:,} rows in {packing['sequences']:,} sequences of {packing['sequence_tokens']:,} tokens, "
        f"{packing['fill']:.1%} full ({packing['tokens_empty']:,} positions empty); no row is truncated"
    )
