"""`column_mapping`: rename the columns of a file before the format of its rows is detected.

    column_mapping: {question: prompt, answer: completion, weight: ignore}

A mapping is about the whole file, so its mistakes are errors whatever `on_bad_row` says: a column that no row has, and
a target name that the file already uses for something else. `ignore` drops a column, for a file whose `weight` is, for
example, the weight of a parcel.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping

from solotune.dataset.readers.row import Row
from solotune.errors import Advice, InputError

IGNORE = "ignore"


class MappedRow(Row):
    """A row with renamed columns, which remembers their names in the file: for what a message advises."""

    mapping: Mapping[str, str]

    @property
    def renamed(self) -> Mapping[str, str]:
        return self.mapping


def check_mapping(rows: Iterable[Row], mapping: Mapping[str, str], *, is_needed: bool = True) -> None:
    """Refuse a mapping that does not fit the rows.

    Args:
        is_needed: whether every column has to exist; rows of `eval_dataset` may already have the new names.

    Raises:
        InputError: names the column and the columns of the file.
    """
    if not mapping:
        return
    present = dict.fromkeys(key for row in rows for key in row.values)
    for column, name in mapping.items():
        if column not in present and not is_needed:
            continue
        if column not in present:
            near = difflib.get_close_matches(column, present, 1)
            raise InputError(
                f"column_mapping: no row has the column {column}",
                seen=", ".join(map(str, present)) or "no columns",
                change=f"did you mean {near[0]}?" if near else "use a column name from the file",
            )
        if name != IGNORE and name in present and name not in mapping:
            raise InputError(
                f"column_mapping: {column} cannot become {name}: the file already has a column {name}",
                seen=", ".join(present),
                allowed="each name once",
                change=f"to drop the existing column, add {name}: ignore",
            )


def mapped(row: Row, mapping: Mapping[str, str]) -> Row:
    """Rename the columns of a row, in the file's order; returns the same object if nothing changes."""
    if not mapping:
        return row
    values = {mapping.get(key, key): value for key, value in row.values.items() if mapping.get(key) != IGNORE}
    renamed = MappedRow(row.where, values)
    renamed.mapping = mapping
    return renamed


def advised(row: Row, changes: Mapping[str, str], before: str = "", after: str = "") -> Advice:
    """A `column_mapping` that a message advises: the one in use, with other targets for some keys of the row.

    Args:
        changes: the row's key -> the name that it should get, or `ignore`; keys that the row lacks are left out.
        before: words before it, for what needs a decision of the user; without them it does not.
    """
    renamed = dict(row.renamed)
    own_names = {name: column for column, name in renamed.items()}
    changed = {own_names.get(key, key): name for key, name in changes.items() if key in row.values}
    mapping = {column: name for column, name in {**renamed, **changed}.items() if column != name}
    written = "column_mapping: {" + ", ".join(f"{_as_yaml(column)}: {name}" for column, name in mapping.items()) + "}"
    return Advice(before + written + after, {"column_mapping": mapping}, is_choice=bool(before))


def _as_yaml(column: str) -> str:
    """A column's name as a key of YAML, quoted where it has to be."""
    is_plain = re.fullmatch(r"[A-Za-z_][\w -]*(?<! )", column) and column.lower() not in _YAML_WORDS
    return column if is_plain else json.dumps(column, ensure_ascii=False)


_YAML_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}
