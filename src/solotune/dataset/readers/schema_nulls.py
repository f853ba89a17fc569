"""Drop the nulls that an Arrow schema forced into nested values of parquet and arrow files and of hub datasets.

A column of Arrow has one type, so the objects of all rows get the fields of each other: a call with `{"town": "Rome"}`
beside one with `{"day": "Monday"}` is stored, and read back, as `{"town": "Rome", "day": null}`. Rendered, it would
teach the model to write arguments that the tool does not have, and show it tools with parameters that are null.

Which nulls are data
--------------------
Those of JSON text, of a map (which has no common fields), in a list, and of whole columns. In an object a null is
ambiguous if the field has values in other rows: it is dropped, and counted. A field of Arrow's type `null` has a value
in no row, so somebody wrote the null; it is kept where no other field of the same object is a forced null.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

Cleaner = Callable[[Any], None]

_WHOLE = (
    "arguments",
    "parameters",
    "input_schema",
)  # counted in one place, since their fields are the user's own names


class SchemaNulls:
    """Drops forced nulls from the rows of one Arrow schema, in place.

    Args:
        schema: a `pyarrow.Schema`.
        counts: number of nulls dropped, by the place in the row; added to.
    """

    def __init__(self, schema: Any, counts: Counter[str]) -> None:
        self._counts = counts
        cleaners = ((field.name, self._cleaner(field.type, field.name)) for field in schema)
        self._columns = [(name, cleaner) for name, cleaner in cleaners if cleaner is not None]

    def drop(self, values: dict[str, Any]) -> dict[str, Any]:
        """Drop the forced nulls of a row; return the row."""
        for name, clean in self._columns:
            if (value := values.get(name)) is not None:
                clean(value)
        return values

    def _cleaner(self, kind: Any, place: str) -> Cleaner | None:
        """A function that cleans values of an Arrow type; None for a type without objects inside."""
        import pyarrow.types as types

        if types.is_struct(kind):
            return self._struct_cleaner(kind, place)
        if types.is_map(kind):
            inner = self._cleaner(kind.item_type, place)
            return None if inner is None else _each(inner, of_map=True)
        if types.is_dictionary(kind):
            return self._cleaner(kind.value_type, place)
        if kind.num_fields == 1 and hasattr(kind, "value_type"):  # all kinds of lists
            inner = self._cleaner(kind.value_type, place)
            return None if inner is None else _each(inner)
        return None

    def _struct_cleaner(self, kind: Any, place: str) -> Cleaner:
        import pyarrow.types as types

        fields = [kind.field(i) for i in range(kind.num_fields)]
        is_whole = any(part in _WHOLE for part in place.split("."))
        cleaners = ((one.name, self._cleaner(one.type, place if is_whole else f"{place}.{one.name}")) for one in fields)
        inside = [(name, cleaner) for name, cleaner in cleaners if cleaner is not None]
        never_set, counts = frozenset(one.name for one in fields if types.is_null(one.type)), self._counts

        def clean(values: Any) -> None:
            if not isinstance(values, dict):  # of a hub dataset, decoded by a feature: an image, say
                return
            nulls = [name for name, value in values.items() if value is None]
            if nulls and not never_set.issuperset(nulls):
                counts[place] += len(nulls)
                for name in nulls:
                    del values[name]
            for name, cleaner in inside:
                if (value := values.get(name)) is not None:
                    cleaner(value)

        return clean


def _each(clean: Cleaner, *, of_map: bool = False) -> Cleaner:
    """A function that cleans each value of a list, or of a map (a dict)."""

    def clean_all(values: Any) -> None:
        for value in values.values() if of_map else values:
            if value is not None:
                clean(value)

    return clean_all
