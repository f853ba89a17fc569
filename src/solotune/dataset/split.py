"""Training and validation rows, so that no validation row is known from training.

Rows that belong together stay together: rows with the same value of `split_by`, pieces of one conversation and chains
of parents (`kinship.py`), and near-duplicates. Exact copies are removed first, and counted. What belongs together is a
*group*, and groups, not rows, are held out:

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
    sides: dict[str, str]
    """Hash of a row -> `train` or `validation`, in file order."""


def folded(text: str) -> str:
    """What two texts are compared by: NFKC, case and runs of blanks do not matter."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _identity(record: Record) -> str:
    """Equal for rows that say the same, with the same tools."""
    if not record.is_chat:
        return folded(record.text)
    said: list[Any] = []
    for m in record.messages:
        thought = [m["reasoning_content"]] if "reasoning_content" in m else []
        said.append([m["role"], folded(m["content"]), m.get("tool_calls"), *thought])
    return json.dumps(said + ([record.tools] if record.tools else []), default=str)


def row_hash(record: Record) -> str:
    """What names a row in the manifest: 32 hex digits, equal for rows that say the same."""
    return hashlib.sha256(_identity(record).encode()).hexdigest()[:32]


def without_copies(records: Sequence[Record]) -> dict[str, Record]:
    """The first of each set of equal rows, by hash, in file order."""
    first: dict[str, Record] = {}
    for record in records:
        first.setdefault(row_hash(record), record)
    return first


def hold_out(
    records: Sequence[Record], size: float | int, seed: int, progress: Callable[[int], None] | None = None
) -> Split:
    """Splits the rows.

    Args:
        records: rows in file order, `group` and `links` set where they belong together.
        size: a share below 1 or a number of rows for validation; 0 for none.
        seed: the config's seed.
        progress: called with the number of rows that have been looked at.

    Raises:
        InputError: there are too few rows or groups for a validation part of that size.
    """
    first = without_copies(records)
    hashes, unique = list(first), list(first.values())
    num_copies = len(records) - len(unique)
    groups, num_near = _groups(unique, progress)
    target = round(size * len(unique)) if isinstance(size, float) else size
    if size and isinstance(size, float):
        target = max(target, 1)
    names = [unique[group[0]].group or hashes[group[0]] for group in groups]
    chosen = _choose(groups, names, len(unique), target, seed) if target else set()
    if target and (not chosen or target >= len(unique)):
        raise _cannot_hold_out(size, target, unique, groups, num_copies)
    return Split(
        [record for row, record in enumerate(unique) if row not in chosen],
        [record for row, record in enumerate(unique) if row in chosen],
        len(groups),
        num_copies,
        num_near,
        {one: "validation" if row in chosen else "train" for row, one in enumerate(hashes)},
    )


class _Spoken(Sequence[str]):
    """The texts that rows are compared by, folded when asked for: a list of them would double the rows' memory.

    Without system prompts: one shared by all rows would make all rows alike.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, row: Any) -> Any:
        record = self._records[row]
        if not record.is_chat:
            return folded(record.text)
        return folded(" ".join(m["content"] for m in record.messages if m["role"] not in ("system", "developer")))


def _groups(records: Sequence[Record], progress: Callable[[int], None] | None) -> tuple[list[list[int]], int]:
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
    for earlier, later in near_duplicates(_Spoken(records), progress):
        join(earlier, later)
        like_an_earlier.add(later)
    first_of: dict[str, int] = {}
    for row, record in enumerate(records):
        for link in (*([record.group] if record.group else []), *record.links):
            join(first_of.setdefault(link, row), row)
    members: dict[int, list[int]] = {}
    for row in range(len(records)):
        members.setdefault(root(row), []).append(row)
    return list(members.values()), len(like_an_earlier)


def _choose(groups: list[list[int]], names: list[str], num_rows: int, target: int, seed: int) -> set[int]:
    """Rows for validation: whole groups from the front of the hashed order, as near to the target as that comes.

    A group's name is that of its first row in the file, so rows appended to the file do not rename it.
    """
    order = sorted(
        zip(names, groups, strict=True), key=lambda one: hashlib.sha256(f"{seed}\0{one[0]}".encode()).digest()
    )
    chosen: set[int] = set()
    for _, group in order:
        excess = len(chosen) + len(group) - target
        if excess > target - len(chosen) or len(chosen) + len(group) == num_rows:
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
    by_hash = {row_hash(record): record for record in train}
    by_group = {record.group: record for record in train if record.group is not None}
    for row, record in enumerate(validation):
        if twin := by_hash.get(row_hash(record)):
            leaks[row] = f"{record.where} is {twin.where}"
        elif record.group is not None and (kin := by_group.get(record.group)):
            leaks[row] = f"{record.where} is of the same group as {kin.where}"
    for a, b in near_duplicates(_Spoken([*train, *validation])):
        if a < len(train) <= b:
            leaks.setdefault(b - len(train), f"{validation[b - len(train)].where} is nearly {train[a].where}")
    if leaks:
        raise CheckError(
            f"{key}: {len(leaks)} of {len(validation)} validation rows are known from training",
            seen="; ".join(leaks[row] for row in sorted(leaks)[:3]) + ("; ..." if len(leaks) > 3 else ""),
            allowed="no row on both sides: a loss on known rows says nothing about new ones",
            change=f"remove these rows from dataset or from {key}, or leave {key} out and let a part be held out",
        )
