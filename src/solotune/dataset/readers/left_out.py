"""What the readers leave out of the rows, so that the data report can name it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class LeftOut:
    """Counts of one pass over the files of a source."""

    schema_nulls: Counter[str] = field(default_factory=Counter)
    """Place in the row (`messages.tool_calls.function.arguments`) -> nulls that Arrow's schema forced there."""
    beside_rows: Counter[str] = field(default_factory=Counter)
    """What a file holds beside its rows (`rows.json: version`) -> how many of it."""

    def add_to(self, schema_nulls: Counter[str], beside_rows: Counter[str]) -> None:
        """Add the counts to those of other sources."""
        schema_nulls.update(self.schema_nulls)
        beside_rows.update(self.beside_rows)
