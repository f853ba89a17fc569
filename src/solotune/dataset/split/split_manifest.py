"""Split manifest: the side of each distinct row, by the row's hash.

Kept as 17 bytes per row and written row by row, because two million rows are 90 MB of JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

HASH = "first 32 hex digits of sha256 over roles, texts (NFKC, case and blanks folded), calls and tools"
"""Rows that differ in folded parts only share a hash, and a side of the split."""


@dataclass(frozen=True, eq=False)
class Manifest:
    """Content of split.json."""

    settings: dict[str, Any] = field(default_factory=dict)
    """The settings that the split depends on."""
    hashes: np.ndarray = field(default_factory=lambda: np.empty(0, "S16"))
    """S16 (R,): of the distinct rows, in file order, those of `eval_dataset` last"""
    is_validation: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    """bool (R,)"""

    def sides(self) -> Iterator[tuple[str, str]]:
        """(32 hex digits, `train` or `validation`) of each row."""
        for begin in range(0, len(self.hashes), 1024):
            digits = self.hashes[begin : begin + 1024].tobytes().hex()
            for number, is_held_out in enumerate(self.is_validation[begin : begin + 1024]):
                yield digits[32 * number : 32 * number + 32], "validation" if is_held_out else "train"

    def json_lines(self) -> Iterator[str]:
        """Yield the text of the file in pieces."""
        head = json.dumps({"version": 1, "hash": HASH, **self.settings, "rows": {}}, indent=2, ensure_ascii=False)
        yield head.removesuffix("{}\n}") + "{"
        comma = "\n"
        for row, side in self.sides():
            yield f'{comma}    "{row}": "{side}"'
            comma = ",\n"
        yield "\n  }\n}\n"
