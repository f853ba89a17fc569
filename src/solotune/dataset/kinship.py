"""Which rows are pieces of one conversation, so that the split keeps them on one side.

Said by the rows themselves: the same `split_by` value; the same `conversation_id`; an `id` that is numbered in
ShareGPT's way (`4OzeAoa_43` and `4OzeAoa_44` are pieces of `4OzeAoa`); and a `parent_id` that is another row's `id`, in
chains of any length, siblings without their parent included.

Many ids look numbered and are not pieces of anything: `row_7`, `2024_01`, `gsm8k_512`. Glued together, their rows could
not be split, or only by kind. So a stem (what stands before the last `_`) counts as a conversation on this evidence:

    it is no number or date: it has a letter
    where the format is not ShareGPT's, which numbers its pieces, it looks like a code and not like a name: six
    characters or more, with letters and digits or with capitals inside (`4OzeAoa`, `doc0042`; not `row`, `gsm8k`)
    it is one of many small ones: stems that several rows share have at most 20 rows on average (the 17,671 rows of
    ShareGPT have 4.2; the parts of a mixture have hundreds)

What this leaves apart though it belongs together, F44 finds by its text; `split_by` then says it.

A value that all rows share says nothing (`identity_0`, `identity_1`, ...; a `parent: root` everywhere): taken
seriously it would make one group of the whole file, of which no part can be held out. It is ignored, except for
`split_by`, which was asked for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from solotune.dataset.row import Row, RowError

MOST_PIECES = 20
"""Rows that a stem may have on average, among those with more than one, to be a conversation."""

_CODE = re.compile(r"(?=.*[a-zA-Z])(?=.*\d|.*[a-z][A-Z]|.*[A-Z]{2}[a-z]).{6,}")
_CONVERSATION_KEYS = ("conversation_id", "conversationId", "conversation id", "conversation")
_PARENT_KEYS = ("parent_id", "parentId", "parent")
_ID_KEYS = ("id", "message_id")


class Kin(NamedTuple):
    """What joins a row to others: `group` also names the row's group when groups are put in order."""

    group: str | None
    links: tuple[str, ...] = ()


def kinship(rows: Sequence[Row], *, is_sharegpt: bool) -> list[Kin]:
    """For each row, its conversation and its links to parents and children."""
    named = [_value(row.values, _CONVERSATION_KEYS) for row in rows]
    stems = _of_conversations([stem_of(row.values, is_sharegpt) for row in rows])
    conversations = _informative([name or stem for name, stem in zip(named, stems, strict=True)])
    parents = _informative([_value(row.values, _PARENT_KEYS) for row in rows])
    are_parents = set(parents) - {None}
    found = []
    for row, conversation, parent in zip(rows, conversations, parents, strict=True):
        own = _value(row.values, _ID_KEYS) if are_parents else None
        ids = [one for one in (own, parent) if one is not None and one in are_parents]
        found.append(Kin(conversation and f"conversation={conversation}", tuple(f"id={one}" for one in ids)))
    return found


def with_key(row: Row, kin: Kin, key: str) -> Kin:
    """The same with the row's value of `split_by` as its group.

    Raises:
        RowError: the row has no such key, or a list or an object under it.
    """
    value = row.values.get(key)
    if value is None or isinstance(value, (dict, list)):
        raise RowError(
            f"{row.where}: split_by: {key} " + ("is missing" if value is None else "is not a single value"),
            reason=f"no {key} to split by",
            seen="the keys " + ", ".join(row.values),
            allowed="a key that every row has, with a text or a number",
        )
    return Kin(f"{key}={value}", kin.links if kin.group is None else (kin.group, *kin.links))


def _informative(values: list[str | None]) -> list[str | None]:
    counts = Counter(value for value in values if value is not None)
    is_everywhere = len(values) > 1 and any(count == len(values) for count in counts.values())
    return [None] * len(values) if is_everywhere else values


def stem_of(values: dict[str, Any], is_sharegpt: bool) -> str | None:
    """What may name the conversation that a row is a piece of: its numbered id without the number."""
    stem, _, piece = (_value(values, ("id",)) or "").rpartition("_")
    is_candidate = any(map(str.isalpha, stem)) if is_sharegpt else _CODE.fullmatch(stem)
    return stem if piece.isdigit() and is_candidate else None


def _of_conversations(stems: list[str | None]) -> list[str | None]:
    """The stems if they are conversations, by how many rows they have."""
    shared = [rows for rows in Counter(stem for stem in stems if stem is not None).values() if rows > 1]
    return stems if shared and sum(shared) <= MOST_PIECES * len(shared) else [None] * len(stems)


def _value(values: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    """The first usable of some values, as a text; numbers and texts are alike (`7` in one file, `"7"` in another)."""
    return next((str(values[key]) for key in keys if _is_identifier(values.get(key))), None)


def _is_identifier(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool) and value != ""
