"""The format of each file of a source: several files may have several formats, the rows of one file may not.

A file of two shapes is usually two files joined by mistake, and detecting the shape row by row would hide that. By
default the first row of a file that has a known format decides; with `on_bad_row: drop` it is the most common format,
since the first row may be a bad one.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, groupby
from operator import itemgetter

from solotune.dataset.chat.formats import Format, recognise
from solotune.dataset.readers.column_mapping import mapped
from solotune.dataset.readers.row import Row, RowError
from solotune.dataset.readers.source import Source
from solotune.errors import InputError

MOST_UNKNOWN = 1000
"""Rows of an unknown format at the beginning of a file after which no known one is expected."""


class FileFormats:
    """Formats by the number of the file.

    Args:
        mapping: the config's `column_mapping`.

    Raises:
        RowError: not strictly: no row has a known format.
    """

    def __init__(self, source: Source, mapping: Mapping[str, str], *, is_strict: bool) -> None:
        self._found: dict[int, tuple[Format, str]] = {}
        self._unknown: dict[int, list[RowError]] = {}
        self._is_strict = is_strict
        if is_strict:
            return
        for file, rows in groupby(source.rows_by_file(), key=itemgetter(0)):
            renamed = (mapped(row, mapping) for _, row in rows)
            first = next(renamed)
            try:
                # twice, because recognise takes one for its message and counts the others
                self._found[file] = recognise(chain((first, first), renamed), is_strict=False)
            except RowError as error:
                self._unknown[file] = [error]
        if self._unknown and not self._found:
            raise next(iter(self._unknown.values()))[0]

    def of(self, file: int, row: Row) -> tuple[Format, str]:
        """The format of a row's file and, for `check_shape`, where it comes from.

        Raises:
            RowError: no row of the file up to this one has a known format.
            InputError: and these are too many for a known one to come.
        """
        if (found := self._found.get(file)) is not None:
            return found
        if not self._is_strict:
            raise self._unknown[file][0]
        try:
            self._found[file] = recognise(iter([row]))
        except RowError as error:
            unknown = self._unknown.setdefault(file, [])
            unknown.append(error)
            if len(unknown) > MOST_UNKNOWN:
                self.check_all_known()
            raise
        return self._found[file]

    def check_all_known(self) -> None:
        """Refuse a file of which no row has a known format, with the error of its first row."""
        for file, errors in self._unknown.items():
            if file not in self._found and self._is_strict:
                first = errors[0]
                error = InputError(first.problem, seen=first.seen, allowed=first.allowed)
                error.change, error.advice = first.change, first.advice
                raise error

    @property
    def names(self) -> str:
        """The names of the formats, in order of the files."""
        return ", ".join(dict.fromkeys(found.name for found, _ in self._found.values()))
