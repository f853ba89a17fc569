"""Find the rows inside one JSON object that is a whole file: wrapped in a key, or laid out in columns.

| layout | example | written by |
|---|---|---|
| wrapper | `{"version": "1.0", "data": [{...}, {...}]}`, at any depth | many exports |
| splits | `{"train": [{...}], "test": [{...}]}`: the rows of `train` | scripts |
| rows of the hub's API | `{"rows": [{"row_idx": 0, "row": {...}}]}` | datasets-server |
| columns | `{"prompt": {"0": "a", "1": "b"}}` | pandas `to_json()` |
| index | `{"0": {"prompt": "a"}, "1": {"prompt": "b"}}` | pandas, `orient="index"` |
| split | `{"columns": ["prompt"], "index": [0, 1], "data": [["a"], ["b"]]}` | pandas, `orient="split"` |
| lists | `{"prompt": ["a", "b"]}` | `Dataset.to_dict()` |

What stands beside the rows is named, never passed over: see `LeftOut`. A chat without an object around it, `[{"role":
"user", ...}, ...]`, is a row too (`row_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from solotune.dataset.readers.left_out import LeftOut
from solotune.dataset.readers.row import Row, RowError, short
from solotune.errors import InputError

ROW_KEYS = frozenset(
    "messages conversations conversation prompt completion instruction output text chosen rejected question answer "
    "input query response request".split()
)
"""Keys that only rows have: an object with one of them is a row, not a wrapper around rows."""

SPLIT_NAMES = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
_COMPLETE = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"), ("text",))
_MAX_DEPTH = 4  # of wrappers in wrappers


class _Found(NamedTuple):
    """Rows in an object: where, as keys joined by dots, the rows, and the names of what is beside them."""

    place: str
    rows: Iterable[Any]
    beside: list[str]
    unwrap: Callable[[Any], Any] = lambda item: item
    """From an item of `rows` to the row; raises RowError."""


def holds_rows(value: dict[str, Any], label: str) -> bool:
    """Whether an object, if it is the only one of a file, is not a row but holds rows."""
    return not _is_row(value) and _find(value, label, _MAX_DEPTH) is not None


def document_rows(
    value: dict[str, Any], label: str, where: str, left_out: LeftOut, on_bad_row: Callable[[RowError], None]
) -> Iterator[Row]:
    """Yield the rows of the only object of a file; the object itself if no rows are found in it.

    Args:
        label: the file's name.
        where: the place of the object, for the case that it is a row.

    Raises:
        InputError: several lists in it may be the rows.
    """
    found = None if _is_row(value) else _find(value, label, _MAX_DEPTH)
    if found is None:
        yield Row(where, value)
        return
    left_out.beside_rows.update(f"{label}: {name}" for name in found.beside)
    place = f"{label}:{found.place}" if found.place else label
    for index, one in enumerate(found.rows):
        try:
            row = Row(f"{place}[{index}]", row_of(found.unwrap(one), f"{place}[{index}]"))
        except RowError as error:
            on_bad_row(error)
        else:
            yield row


def row_of(value: Any, where: str) -> dict[str, Any]:
    """A row as an object: a chat without an object around it gets its key.

    Raises:
        RowError: neither an object nor a chat.
    """
    if isinstance(value, dict):
        return value
    if key := chat_key(value):
        return {key: value}
    change = None
    if isinstance(value, list) and value and all(isinstance(cell, str) for cell in value):
        change = 'write each row as an object: {"prompt": "...", "completion": "..."}'
    raise RowError(
        f"{where}: not an object",
        reason="a row is not an object",
        seen=short(value),
        allowed='{"messages": [...]}',
        change=change,
    )


def chat_key(value: Any) -> str | None:
    """`messages` or `conversations` for a list of messages in that form; None for any other value."""
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        return None
    if all("role" in one for one in value):
        return "messages"
    return "conversations" if all("from" in one for one in value) else None


def _is_row(value: dict[str, Any]) -> bool:
    """Whether an object is a row of a known format, with texts or messages and not whole columns under its keys."""
    return any(all(_is_cell(value.get(key)) for key in keys) for keys in _COMPLETE)


def _is_cell(value: Any) -> bool:
    return isinstance(value, str) or chat_key(value) is not None


def _find(value: dict[str, Any], label: str, depth: int) -> _Found | None:
    for layout in (_split_table, _columns_of_objects, _columns_of_lists):
        if (found := layout(value, label)) is not None:
            return found
    return _wrapped(value, label, depth)


def _split_table(value: dict[str, Any], label: str) -> _Found | None:
    names, rows = value.get("columns"), value.get("data")
    if not (isinstance(names, list) and isinstance(rows, list)) or not names:
        return None
    if not all(isinstance(name, str) for name in names):
        return None
    if not all(isinstance(row, list) and len(row) == len(names) for row in rows):
        return None
    if len(set(names)) != len(names):
        raise InputError(f"{label}: two columns have the same name", seen=", ".join(names))
    beside = [key for key in value if key not in ("columns", "data")]
    return _Found("", (dict(zip(names, row, strict=True)) for row in rows), beside)


def _columns_of_objects(value: dict[str, Any], label: str) -> _Found | None:
    """Pandas' `columns` and `index`: objects in an object, all with the same keys if the outer ones are columns."""
    inner = list(value.values())
    if not inner or not all(isinstance(one, dict) and one for one in inner):
        return None
    names = list(inner[0])
    is_equal = all(list(one) == names for one in inner)
    outer_is_numbered, inner_is_numbered = (all(key.isdigit() for key in keys) for keys in (value, names))
    is_known = not ROW_KEYS.isdisjoint(value)
    if is_equal and not outer_is_numbered and is_known and (inner_is_numbered or ROW_KEYS.isdisjoint(names)):
        beside = [] if inner_is_numbered else ["the names of the rows"]
        return _Found("", ({key: column[name] for key, column in value.items()} for name in names), beside)
    is_row = not any(key.isdigit() for one in inner for key in one)
    if is_row and all(not ROW_KEYS.isdisjoint(one) for one in inner) and not is_known:
        if outer_is_numbered:
            return _Found("", inner, [])
        if set(value).isdisjoint(SPLIT_NAMES) and len(inner) > 1:
            return _Found("", inner, ["the names of the rows"])
    if outer_is_numbered and is_row and is_equal:
        return _Found("", inner, [])
    if (
        inner_is_numbered
        and is_equal
        and len(inner) > 1
        and not any(isinstance(one["0"], dict) for one in inner if "0" in one)
    ):
        return _Found("", ({key: column[name] for key, column in value.items()} for name in names), [])
    return None


def _columns_of_lists(value: dict[str, Any], label: str) -> _Found | None:
    columns = list(value.values())
    if not columns or not all(isinstance(one, list) and len(one) == len(columns[0]) for one in columns):
        return None
    is_of_texts = len(columns) > 1 and all(isinstance(cell, str) for one in columns for cell in one)
    if not columns[0] or not (is_of_texts or any(key in ROW_KEYS for key in value)):
        return None
    cells = zip(*columns, strict=True)
    return _Found("", (dict(zip(value, row, strict=True)) for row in cells), [])


def _wrapped(value: dict[str, Any], label: str, depth: int) -> _Found | None:
    """A list of rows under one of the keys, or in an object under one of them."""
    lists = {key: one for key, one in value.items() if _is_list_of_rows(one)}
    found = {key: _Found(key, one, []) for key, one in lists.items()}
    if not found and depth:
        for key, one in value.items():
            inside = _find(one, label, depth - 1) if isinstance(one, dict) and not _is_row(one) else None
            if inside is not None:
                place = f"{key}.{inside.place}" if inside.place else key
                beside = [f"{key}.{name}" for name in inside.beside]
                found[key] = inside._replace(place=place, beside=beside)
    if not found:
        return None
    key = chosen_list(found, {key: _has_row_keys(one) for key, one in lists.items()}, label)
    beside = [_described(other, one) for other, one in value.items() if other != key]
    inside = found[key]
    if key in lists and all(isinstance(one, dict) and isinstance(one.get("row"), dict) for one in lists[key]):
        others = dict.fromkeys(name for one in lists[key] for name in one if name != "row")
        return _Found(key, lists[key], beside + [f"{key}.{name}" for name in others], partial(_of_hub_api, label))
    return inside._replace(beside=beside + inside.beside)


def chosen_list(found: Iterable[str], has_row_keys: dict[str, bool], label: str) -> str:
    """The key, of several that may hold the rows, that does.

    Raises:
        InputError: it cannot be told.
    """
    keys = list(found)
    keys = [key for key in keys if has_row_keys.get(key)] or keys
    if len(keys) > 1:
        keys = [key for key in keys if key.lower() in ("train", "training")] or keys
    if len(keys) > 1:
        raise InputError(
            f"{label}: one object with several lists that may be the rows",
            seen=", ".join(keys),
            allowed='[{...}, {...}], one object on each line, or one list under a key: {"data": [{...}, {...}]}',
            change="save one of the lists: python -c "
            f"\"import json; json.dump(json.load(open('{label}'))['{keys[0]}'], open('{keys[0]}.json', 'w'))\"",
        )
    return keys[0]


def _is_list_of_rows(value: Any) -> bool:
    if not isinstance(value, list) or not value or chat_key(value) is not None:
        return False
    return all(isinstance(one, dict) or chat_key(one) is not None for one in value)


def _has_row_keys(rows: list[Any]) -> bool:
    first = rows[0].get("row", rows[0]) if isinstance(rows[0], dict) else rows[0]
    return not isinstance(first, dict) or not ROW_KEYS.isdisjoint(first)


def _of_hub_api(label: str, item: dict[str, Any]) -> Any:
    if item.get("truncated_cells"):
        raise RowError(
            f"{label}: row {item.get('row_idx')}: the hub's API has cut off cells",
            reason="cells cut off by the hub's API",
            seen=", ".join(map(str, item["truncated_cells"]))[:80],
            change="load the dataset by its name: dataset: owner/name",
        )
    return item["row"]


def _described(key: str, value: Any) -> str:
    return f"{key} ({len(value):,} items)" if isinstance(value, list) and len(value) > 1 else key
