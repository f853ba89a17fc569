"""Group rows that are pieces of one conversation, so that the split keeps them on one side.

Links given in the rows
-----------------------
The same `split_by` value; the same `conversation_id`; an `id` numbered in ShareGPT's way (`4OzeAoa_43` and `4OzeAoa_44`
are pieces of `4OzeAoa`); and a `parent_id` that is another row's `id`, in chains of any length, siblings without their
parent included.

Numbered ids
------------
Many ids look numbered but are not pieces of anything: `row_7`, `2024_01`, `gsm8k_512`. Grouped together, their rows
could not be split, or only by kind. So a stem (the part before the last `_`) counts as a conversation if:

    it is not a number or date: it has a letter
    where the format is not ShareGPT, which numbers its pieces, it looks like a code and not like a name: six characters
    or more, with letters and digits or with capitals inside (`4OzeAoa`, `doc0042`; not `row`, `gsm8k`)
    it is one of many small ones: stems that several rows share have at most 20 rows on average (the 17,671 rows of
    ShareGPT have 4.2; the parts of a mixture have hundreds)

Rows that belong together but are missed here are found by F44 from their text; then set `split_by`.

Values that are ignored
-----------------------
A value that all rows share (`identity_0`, `identity_1`, ...; the same `parent: root` everywhere) would make one group
of the whole file, and no part of it could be held out. It is ignored, except for `split_by`, which the user has set.

This is known only when all rows are read, so five 64-bit hashes per row are kept: two rows that share nothing have a
hash in common with a probability of 2**-64.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from typing import Any

import numpy as np

from solotune.dataset.readers.row import CONVERSATION_KEYS, ID_KEYS, PARENT_KEYS, Row, RowError

MOST_PIECES = 20
"""Most rows per stem, on average over stems with several rows, for stems to count as conversations."""

_CODE = re.compile(r"(?=.*[a-zA-Z])(?=.*\d|.*[a-z][A-Z]|.*[A-Z]{2}[a-z]).{6,}")


class Kinship:
    """Collects the links of each row, and returns at the end which rows belong together."""

    def __init__(self, split_by: str | None) -> None:
        self._split_by = split_by
        self._keys, self._named, self._stems, self._own, self._parents = (array("Q") for _ in range(5))

    def add(self, row: Row, own_names: Row, *, is_sharegpt: bool) -> str | None:
        """Add the next row; return the name of the group that it names, if any.

        Args:
            row: the row with mapped column names.
            own_names: the row as in the file; `split_by` is a column name of the file.
            is_sharegpt: whether the row is in the format that numbers the pieces of a conversation.

        Raises:
            RowError: the row has no `split_by` key, or a list or an object under it.
        """
        name, stem = _value(row.values, CONVERSATION_KEYS), stem_of(row.values, is_sharegpt)
        conversation = stem if name is None else name
        group = None if conversation is None else f"conversation={conversation}"
        self._keys.append(0)
        self._named.append(0 if name is None else _link(group))
        self._stems.append(_link(None if stem is None else f"conversation={stem}"))
        for links, keys in ((self._own, ID_KEYS), (self._parents, PARENT_KEYS)):
            one = _value(row.values, keys)
            links.append(_link(None if one is None else f"id={one}"))
        if self._split_by is not None:
            group = f"{self._split_by}={_key_of(own_names, self._split_by)}"
            self._keys[-1] = _link(group)
        return group

    def links(self) -> np.ndarray:
        """uint64 (rows added, 4): rows with a link in common, other than 0, belong together; the first is the group."""
        keys, named, stems, own, parents = (
            np.frombuffer(values, np.uint64)
            for values in (self._keys, self._named, self._stems, self._own, self._parents)
        )
        conversations = np.where(named != 0, named, _of_conversations(stems))
        conversations, parents = _informative(conversations), _informative(parents)
        own = np.where(np.isin(own, parents), own, np.uint64(0))  # an id that is no row's parent may occur in many rows
        groups = (conversations, np.zeros_like(keys)) if self._split_by is None else (keys, conversations)
        return np.stack([*groups, own, parents], axis=1)


def _key_of(row: Row, key: str) -> Any:
    value = row.values.get(key)
    if value is None or isinstance(value, (dict, list)):
        raise RowError(
            f"{row.where}: split_by: {key} " + ("is missing" if value is None else "is not a single value"),
            reason=f"no {key} to split by",
            seen="the keys " + ", ".join(row.values),
            allowed="a key that every row has, with a text or a number",
        )
    return value


def _link(value: str | None) -> int:
    """64-bit hash of a link; 0 for none."""
    if value is None:
        return 0
    return int.from_bytes(hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _informative(links: np.ndarray) -> np.ndarray:
    is_everywhere = len(links) > 1 and links[0] != 0 and bool((links == links[0]).all())
    return np.zeros_like(links) if is_everywhere else links


def stem_of(values: dict[str, Any], is_sharegpt: bool) -> str | None:
    """The possible name of the conversation of a row: its numbered id without the number."""
    stem, _, piece = (_value(values, ("id",)) or "").rpartition("_")
    is_candidate = any(map(str.isalpha, stem)) if is_sharegpt else _CODE.fullmatch(stem)
    return stem if piece.isdigit() and is_candidate else None


def _of_conversations(stems: np.ndarray) -> np.ndarray:
    """The stems if they are conversations, judged by their number of rows; else zeros."""
    _, counts = np.unique(stems[stems != 0], return_counts=True)
    shared = counts[counts > 1]
    is_one = len(shared) > 0 and shared.sum() <= MOST_PIECES * len(shared)
    return stems if is_one else np.zeros_like(stems)


def _value(values: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    """The first usable value of some keys, as a text: numbers equal texts (`7` in one file, `"7"` in another)."""
    return next((str(values[key]) for key in keys if _is_identifier(values.get(key))), None)


def _is_identifier(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool) and value != ""
