"""Training and validation rows, so that no validation row is known from training.

Rows that belong together stay together: rows with the same value of `split_by`, the pieces of one conversation
(`4OzeAoa_43` and `4OzeAoa_44`), and near-duplicates. Exact copies are removed first, and counted. What belongs
together is a *group*, and groups, not rows, are held out:

    order the groups by sha256(seed, key of the group's first row); take from the front until the size is reached

The order depends on a group's content and the seed alone, never on its place in the file or on other rows: appending
rows to a file moves almost no old row to the other side (only groups next to the border, since the border itself
moves with the size). Splitting before rendering, because everything later (dropping, truncating) depends on settings
that one changes, and the split should not change with them.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from solotune.dataset.formats import Record
from solotune.dataset.similar import near_duplicates
from solotune.errors import CheckError, InputError


@dataclass(frozen=True, slots=True)
class Split:
    """The two sides, in file order, and what was found on the way."""

    train: list[Record]
    validation: list[Record]
    num_groups: int
    num_exact_duplicates: int
    num_near_duplicates: int


def folded(text: str) -> str:
    """What two texts are compared by: NFKC, case and runs of blanks do not matter."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _identity(record: Record) -> str:
    """Equal for rows that say the same."""
    if not record.is_chat:
        return folded(record.text)
    return json.dumps([[m["role"], folded(m["content"]), m.get("tool_calls")] for m in record.messages], default=str)


def _spoken(record: Record) -> str:
    """A row's text without system prompts: one shared by all rows would make all rows alike."""
    if not record.is_chat:
        return folded(record.text)
    return folded(" ".join(m["content"] for m in record.messages if m["role"] not in ("system", "developer")))


def without_copies(records: Sequence[Record]) -> list[Record]:
    """The first of each set of equal rows."""
    first: dict[bytes, Record] = {}
    for record in records:
        first.setdefault(hashlib.sha256(_identity(record).encode()).digest(), record)
    return list(first.values())


def hold_out(records: Sequence[Record], size: float | int, seed: int) -> Split:
    """Splits the rows.

    Args:
        records: rows in file order, `group` set where they are grouped.
        size: a share below 1 or a number of rows for validation; 0 for none.
        seed: the config's seed.

    Raises:
        InputError: there are too few rows or groups for a validation part of that size.
    """
    unique = without_copies(records)
    num_copies = len(records) - len(unique)
    groups, num_near = _groups(unique)
    target = round(size * len(unique)) if isinstance(size, float) else size
    if size and isinstance(size, float):
        target = max(target, 1)
    chosen = _choose(groups, unique, target, seed) if target else set()
    if target and (not chosen or target >= len(unique)):
        raise _cannot_hold_out(size, target, unique, groups, num_copies)
    return Split(
        [record for row, record in enumerate(unique) if row not in chosen],
        [record for row, record in enumerate(unique) if row in chosen],
        len(groups),
        num_copies,
        num_near,
    )


def _groups(records: Sequence[Record]) -> tuple[list[list[int]], int]:
    """Rows that must stay together, each group in file order; and how many rows are like an earlier one."""
    parent = list(range(len(records)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    def join(a: int, b: int) -> None:
        parent[root(b)] = root(a)

    like_an_earlier = set()
    for earlier, later in near_duplicates([_spoken(record) for record in records]):
        join(earlier, later)
        like_an_earlier.add(later)
    first_of: dict[str, int] = {}
    for row, record in enumerate(records):
        if record.group is not None:
            join(first_of.setdefault(record.group, row), row)
    members: dict[int, list[int]] = {}
    for row in range(len(records)):
        members.setdefault(root(row), []).append(row)
    return list(members.values()), len(like_an_earlier)


def _choose(groups: list[list[int]], records: Sequence[Record], target: int, seed: int) -> set[int]:
    """Rows for validation: whole groups from the front of the hashed order, as near to the target as that comes."""

    def order(group: list[int]) -> bytes:
        first = records[group[0]]  # in file order, so rows appended to the file do not rename a group
        return hashlib.sha256(f"{seed}\0{first.group or _identity(first)}".encode()).digest()

    chosen: set[int] = set()
    for group in sorted(groups, key=order):
        excess = len(chosen) + len(group) - target
        if excess > target - len(chosen) or len(chosen) + len(group) == len(records):
            continue  # taking it would be further off than leaving it, or leave nothing to train on
        chosen.update(group)
        if len(chosen) >= target:
            break
    return chosen


def _cannot_hold_out(
    size: float | int, target: int, rows: Sequence[Record], groups: list[list[int]], num_copies: int
) -> InputError:
    largest = max(map(len, groups))
    copies = f" (and {num_copies} copies, removed)" if num_copies else ""
    return InputError(
        f"validation_size: {size}: the rows cannot be split into training and validation",
        seen=f"{len(rows)} distinct rows{copies} in {len(groups)} groups, the largest of {largest}; "
        f"{target} rows are wanted for validation",
        allowed="fewer rows than there are, and at least two groups; rows that share a group or are near-duplicates "
        "stay on one side",
        change="give more varied rows, a smaller validation_size, your own eval_dataset, or validation_size: 0",
    )


def check_leaks(train: Sequence[Record], validation: Sequence[Record], *, key: str) -> None:
    """Refuses validation rows of one's own that training knows: equal, near-duplicate, or of the same group.

    Raises:
        CheckError: with their number and the first three.
    """
    leaks: dict[int, str] = {}
    by_identity = {_identity(record): record for record in train}
    by_group = {record.group: record for record in train if record.group is not None}
    for row, record in enumerate(validation):
        if twin := by_identity.get(_identity(record)):
            leaks[row] = f"{record.where} is {twin.where}"
        elif record.group is not None and (kin := by_group.get(record.group)):
            leaks[row] = f"{record.where} is of the same group as {kin.where}"
    texts = [_spoken(record) for record in [*train, *validation]]
    for a, b in near_duplicates(texts):
        if a < len(train) <= b:
            leaks.setdefault(b - len(train), f"{validation[b - len(train)].where} is nearly {train[a].where}")
    if leaks:
        raise CheckError(
            f"{key}: {len(leaks)} of {len(validation)} validation rows are known from training",
            seen="; ".join(leaks[row] for row in sorted(leaks)[:3]) + ("; ..." if len(leaks) > 3 else ""),
            allowed="no row on both sides: a loss on known rows says nothing about new ones",
            change=f"remove these rows from dataset or from {key}, or leave {key} out and let a part be held out",
        )
