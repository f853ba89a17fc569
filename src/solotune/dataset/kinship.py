"""Which rows are pieces of one conversation, so that the split keeps them on one side.

Said by the rows themselves: the same `split_by` value; the same `conversation_id`; in ShareGPT an `id` that is numbered
(`4OzeAoa_43` and `4OzeAoa_44` are pieces of `4OzeAoa`); and a `parent_id` that is another row's `id`, in chains of any
length, siblings without their parent included.

A value that all rows share says nothing (`identity_0`, `identity_1`, ...; a `parent: root` everywhere): taken
seriously it would make one group of the whole file, of which no part can be held out. It is ignored, except for
`split_by`, which was asked for.

Whether a value says something is known when all rows are read, so four 64-bit hashes of each row are kept: two rows
that share nothing have one in common with a probability of 2**-64.
"""

from __future__ import annotations

import hashlib
from array import array
from typing import Any

import numpy as np

from solotune.dataset.row import Row, RowError

_CONVERSATION_KEYS = ("conversation_id", "conversationId", "conversation id", "conversation")
_PARENT_KEYS = ("parent_id", "parentId", "parent")
_ID_KEYS = ("id", "message_id")


class Kinship:
    """Asks each row in turn, and knows at the end which belong together."""

    def __init__(self, split_by: str | None, *, is_sharegpt: bool) -> None:
        self._split_by, self._is_sharegpt = split_by, is_sharegpt
        self._keys, self._conversations, self._own, self._parents = (array("Q") for _ in range(4))

    def add(self, row: Row, own_names: Row) -> str | None:
        """The name of the group that the next row says it is of, if it says so.

        Args:
            row: with our names of columns.
            own_names: the same as it stands in the file; `split_by` is one of those names.

        Raises:
            RowError: the row has no `split_by` key, or a list or an object under it.
        """
        conversation = _conversation_of(row.values, self._is_sharegpt)
        group = None if conversation is None else f"conversation={conversation}"
        self._keys.append(0)
        self._conversations.append(_link(group))
        for links, keys in ((self._own, _ID_KEYS), (self._parents, _PARENT_KEYS)):
            one = _value(row.values, keys)
            links.append(_link(None if one is None else f"id={one}"))
        if self._split_by is not None:
            group = f"{self._split_by}={_key_of(own_names, self._split_by)}"
            self._keys[-1] = _link(group)
        return group

    def links(self) -> np.ndarray:
        """uint64 (rows added, 4): rows with a link in common, other than 0, belong together; the first is the group."""
        keys, conversations, own, parents = (
            np.frombuffer(values, np.uint64) for values in (self._keys, self._conversations, self._own, self._parents)
        )
        conversations, parents = _informative(conversations), _informative(parents)
        own = np.where(np.isin(own, parents), own, np.uint64(0))  # an id that is nobody's parent may stand in many rows
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
    """64 bits; 0 is none."""
    if value is None:
        return 0
    return int.from_bytes(hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _informative(links: np.ndarray) -> np.ndarray:
    is_everywhere = len(links) > 1 and links[0] != 0 and bool((links == links[0]).all())
    return np.zeros_like(links) if is_everywhere else links


def _conversation_of(values: dict[str, Any], is_sharegpt: bool) -> str | None:
    named = _value(values, _CONVERSATION_KEYS)
    if named is not None or not is_sharegpt:
        return named
    conversation, underscore, piece = (_value(values, ("id",)) or "").rpartition("_")
    return conversation if underscore and conversation and piece.isdigit() else None


def _value(values: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    """The first usable of some values, as a text; numbers and texts are alike (`7` in one file, `"7"` in another)."""
    return next((str(values[key]) for key in keys if _is_identifier(values.get(key))), None)


def _is_identifier(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool) and value != ""
