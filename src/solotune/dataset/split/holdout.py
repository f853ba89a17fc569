"""Split rows into training and validation so that no validation row is close to a training row.

Rows that belong together stay together: rows with the same value of `split_by`, pieces of one conversation and chains
of parents (`groups.py`), and near-duplicates. Copies are removed first, and counted, unless they are repeated on
purpose (`dataset_exact_deduplication: false`). Rows that belong together form a *group*, and groups, not rows, are held
out:

    order the groups by sha256(seed, key of the group's first row); take from the front until the size is reached

Why by hash
-----------
The order depends only on a group's content and the seed, not on its place in the file or on other rows: appending rows
to a file moves almost no old row to the other side (only groups next to the border, since the border itself moves with
the size). The split comes before rendering, because all later steps (dropping, truncating) depend on settings that
users change, and the split should not change with them.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from solotune.dataset.records import Records, spoken
from solotune.dataset.split.near_duplicates import near_duplicates
from solotune.errors import CheckError, InputError

CHANCE = 2e-3
"""Of as many near rows if training rows were as near to each other: three of thirty against none of 240."""


@dataclass(frozen=True, slots=True)
class Split:
    """The rows, without copies unless those are kept, which of them are held out, and counts."""

    rows: Records
    """In file order."""
    is_validation: np.ndarray
    """bool (rows,)"""
    num_groups: int
    num_exact_duplicates: int
    """Copies of an earlier row, removed or kept."""
    num_near_duplicates: int
    """Rows that are close to an earlier row, copies not counted."""

    @property
    def train(self) -> Records:
        """The training rows."""
        return self.rows.take(~self.is_validation)

    @property
    def validation(self) -> Records:
        """The validation rows."""
        return self.rows.take(self.is_validation)


def without_copies(records: Records) -> Records:
    """Remove copies: keep the first of each set of equal rows, in file order."""
    return records.take(~is_copy(records))


def is_copy(records: Records) -> np.ndarray:
    """bool (R,): whether an earlier row has exactly the same content."""
    _, first = np.unique(records.exact, return_index=True)
    found = np.ones(len(records), bool)
    found[first] = False
    return found


def hold_out(
    records: Records,
    size: float | int,
    seed: int,
    progress: Callable[[int], None] | None = None,
    *,
    keep_copies: bool = False,
) -> Split:
    """Hold out rows for validation.

    Args:
        records: rows in file order.
        size: validation rows, as a fraction below 1 or a number of rows; 0 for none.
        seed: the config's seed.
        progress: called with the number of rows compared so far.
        keep_copies: whether copies stay; all copies of a row are on one side.

    Raises:
        InputError: there are too few rows or groups for a validation part of that size.
    """
    copies = is_copy(records)
    num_copies = int(copies.sum())
    rows = records if keep_copies else records.take(~copies)
    roots, is_near = _roots(rows, progress)
    num_near = int((is_near & ~copies).sum() if keep_copies else is_near.sum())
    groups, group_of, sizes = np.unique(roots, return_inverse=True, return_counts=True)
    target = round(size * len(rows)) if isinstance(size, float) else size
    if size and isinstance(size, float):
        target = max(target, 1)
    is_chosen = _choose(_in_order(rows, groups, seed), sizes, target) if target else np.zeros(len(groups), bool)
    if target and (not is_chosen.any() or target >= len(rows)):
        raise _cannot_hold_out(size, target, len(rows), sizes, 0 if keep_copies else num_copies)
    return Split(replace(rows, roots=roots), is_chosen[group_of], len(groups), num_copies, num_near)


def with_groups(records: Records) -> Records:
    """The same rows, each with the number of its group, for rows that are all held out."""
    return replace(records, roots=_roots(records, None)[0])


class _Spoken(Sequence[str]):
    """The texts that rows are compared by, read and normalised on access."""

    def __init__(self, *parts: Records) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, row: Any) -> Any:
        for part in self._parts:
            if row < len(part):
                return spoken(part[row])
            row -= len(part)
        raise IndexError(row)


def _roots(records: Records, progress: Callable[[int], None] | None) -> tuple[np.ndarray, np.ndarray]:
    """int64 (R,): the first row of each row's group; bool (R,): whether it is a near-duplicate of an earlier row."""
    parent = array("q", range(len(records)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    def join(a: int, b: int) -> None:
        a, b = root(a), root(b)
        parent[max(a, b)] = min(a, b)

    is_near = np.zeros(len(records), bool)
    for earlier, later in near_duplicates(_Spoken(records), progress):
        join(earlier, later)
        is_near[later] = True
    order = np.argsort(records.hashes, kind="stable")  # short texts too, which have no word triples
    for place in np.flatnonzero(records.hashes[order[1:]] == records.hashes[order[:-1]]):
        join(int(order[place]), int(order[place + 1]))
        is_near[order[place + 1]] = True
    rows, columns = np.nonzero(records.links)
    links = records.links[rows, columns]
    order = np.argsort(links, kind="stable")
    for place in np.flatnonzero(links[order[1:]] == links[order[:-1]]):
        join(int(rows[order[place]]), int(rows[order[place + 1]]))
    return np.fromiter((root(row) for row in range(len(records))), np.int64, len(records)), is_near


def _in_order(records: Records, groups: np.ndarray, seed: int) -> np.ndarray:
    """int64 (groups,): the groups in order of the first 64 bits of the hash of seed and name.

    A group's name is that of its first row in the file, so rows appended to the file do not rename it.
    """
    names = (f"{seed}\0{records.name_of_group(int(row))}" for row in groups)
    keys = (int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") for name in names)
    return np.argsort(np.fromiter(keys, np.uint64, len(groups)), kind="stable")


def _choose(order: np.ndarray, sizes: np.ndarray, target: int) -> np.ndarray:
    """bool (groups,): whole groups from the front of the order, as close to the target number of rows as possible."""
    is_chosen, num_rows, num_chosen = np.zeros(len(sizes), bool), int(sizes.sum()), 0
    for group in order:
        size = int(sizes[group])
        excess = num_chosen + size - target
        if excess > target - num_chosen or num_chosen + size == num_rows:
            continue  # taking it would miss the target by more than leaving it, or leave nothing to train on
        is_chosen[group] = True
        num_chosen += size
        if num_chosen >= target:
            break
    return is_chosen


def _cannot_hold_out(size: float | int, target: int, num_rows: int, sizes: np.ndarray, num_copies: int) -> InputError:
    copies = f" (and {num_copies} copies, removed)" if num_copies else ""
    return InputError(
        f"validation_size: {size}: the rows cannot be split into training and validation",
        seen=f"{num_rows} distinct rows{copies} in {len(sizes)} groups, the largest with {sizes.max()} rows; "
        f"validation needs {target} rows",
        allowed="fewer rows than there are, and at least two groups; rows that share a group or are near-duplicates "
        "stay on one side",
        change="use more varied rows, a smaller validation_size, an eval_dataset, or validation_size: 0",
    )


def check_leaks(train: Records, validation: Records, *, key: str) -> int:
    """Refuse rows of `eval_dataset` that are training rows, or close to them; the number of close ones that are left.

    A row that equals a training row (but for case and blanks), or is in the same group, is refused. Near-duplicates are
    refused only if there are far more of them than among the training rows themselves: rows of a templated task
    (reports, labels, JSON) are naturally alike, and say nothing about a leak.

    Raises:
        CheckError: gives their number and the first three.
    """
    equal, alike = _last_in(train.exact, validation.exact), _last_in(train.hashes, validation.hashes)
    kin = np.where(validation.links[:, 0] > 0, _last_in(train.links[:, 0], validation.links[:, 0]), -1)
    near, has_twin = np.full(len(validation), -1), np.zeros(len(train), bool)
    for a, b in near_duplicates(_Spoken(train, validation)):
        if a < len(train) <= b:
            near[b - len(train)] = a
        elif b < len(train):
            has_twin[[a, b]] = True
    is_same = (equal >= 0) | (kin >= 0) | (alike >= 0)
    is_near = (near >= 0) & ~is_same
    by_chance = probability_of_share(int(is_near.sum()), len(validation), int(has_twin.sum()), len(train))
    is_leak = is_same | is_near if by_chance < CHANCE else is_same
    near = np.where(alike >= 0, alike, near)
    rows = np.flatnonzero(is_leak)
    if len(rows):
        examples = []
        for row in map(int, rows[:3]):
            which = (("equals", equal), ("is in the same group as", kin), ("is nearly equal to", near))
            what, twin = next((what, int(twins[row])) for what, twins in which if twins[row] >= 0)
            examples.append(f"{validation[row].where} {what} {train[twin].where}")
        raise CheckError(
            f"{key}: {len(rows)} of {len(validation)} validation rows are equal or close to training rows",
            seen="; ".join(examples) + ("; ..." if len(rows) > 3 else ""),
            allowed="no row on both sides: the loss on rows seen in training says nothing about new rows",
            change=f"remove these rows from dataset or from {key}, or remove {key} to hold out rows of dataset instead",
            fault="F43" if 2 * int(is_same.sum()) >= len(validation) else "F44",
        )
    return int(is_near.sum())


def probability_of_share(hits: int, count: int, usual_hits: int, usual_count: int) -> float:
    """Fisher's exact test: the probability of at least so many hits if both groups have the same share of them."""

    def ways(whole: int, part: int) -> float:
        return math.lgamma(whole + 1) - math.lgamma(part + 1) - math.lgamma(whole - part + 1)

    both, all_of = hits + usual_hits, ways(count + usual_count, hits + usual_hits)
    return sum(
        math.exp(ways(count, k) + ways(usual_count, both - k) - all_of)
        for k in range(max(hits, both - usual_count), min(count, both) + 1)
    )


def _last_in(known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """int64: the last index of each value in `known`, -1 if it is not there."""
    order = np.argsort(known, kind="stable")
    places = order[np.searchsorted(known, values, side="right", sorter=order) - 1]
    return np.where(known[places] == values, places, -1)
