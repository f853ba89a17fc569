"""Several rows in one sequence: no padding, and each row as if it were alone.

Chats differ in length, so a batch padded to its longest row computes on pads (1.6 times the tokens on real chats, four
rows a batch). A pack holds whole rows, never parts of one, up to `max_length` tokens; positions restart with each row
and attention stays within it, so every row's loss and gradient are those it has alone.

Rows are placed by best-fit decreasing: the longest first, each into the fullest pack it still fits (Johnson 1973; at
most 11/9 of the optimum and one pack more, far closer on many short rows). The packs depend on the lengths alone, so a
resumed run has the same ones; the order in which they are trained on is drawn anew each epoch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence, Sized
from typing import Any

import numpy as np


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Row numbers of each pack.

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
    """Share of all places in the packs that hold a token."""
    return sum(lengths) / (len(packs) * capacity) if packs else 0.0


def account(lengths: Sequence[int], capacity: int) -> dict[str, Any]:
    """The part `packing` of data.json: what packing makes of the training rows. It cuts none of them.

    `tokens_empty` is what is left over in the sequences; a batch of one sequence does not even compute on it.
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
    """The account in one line."""
    return (
        f"{packing['rows']:,} rows in {packing['sequences']:,} sequences of {packing['sequence_tokens']:,} tokens, "
        f"{packing['fill']:.1%} full ({packing['tokens_empty']:,} positions empty); no row is truncated"
    )
