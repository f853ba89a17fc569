"""Read rows of tables: csv and tsv as text, parquet and arrow with pyarrow in batches.

Cells of a csv are texts; a quoted cell may span lines, and a row's place is its first line. Columns of an
Arrow extension type are refused: reading one may import the code that defines it.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from solotune.dataset.readers.json_records import OnBadRow
from solotune.dataset.readers.left_out import LeftOut
from solotune.dataset.readers.row import CHUNK_BYTES, MAX_ROW_BYTES, Row, RowError, lines
from solotune.dataset.readers.schema_nulls import SchemaNulls
from solotune.errors import InputError
from solotune.units import first_line

_BATCH_ROWS = 128
MAX_COLUMNS = 10_000
_DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
_LONGEST_HEADER = 1 << 20  # characters: a longer one is not tried with several delimiters
_MAX_RATIO = 100  # text is packed to a third or a tenth of its size, repeated text to a fiftieth
_BATCH_BYTES = 128 << 20


def read_csv(stream: BinaryIO, label: str, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Yield one row per record, with the header's names.

    The cells are separated by what separates the names of the header: a comma, `;`, a tab or `|`.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    text = _DecodedLines(stream, label)
    head = text.peek()
    if separator := re.fullmatch(r"sep=(.)\s*", head):  # Excel's own first line
        next(text)
        head = text.peek()
    delimiter = separator[1] if separator else _delimiter(head, "\t" if ".tsv" in label.lower() else ",")
    reader = csv.reader(text, strict=True, delimiter=delimiter)
    begin, before = 1 + bool(separator), int(bool(separator))
    try:
        header = next(reader, [])
        if len(header) > MAX_COLUMNS:
            raise InputError(f"{label}:{begin}: too many columns", seen=f"{len(header):,}", allowed=f"{MAX_COLUMNS:,}")
        if len(set(header)) != len(header):
            raise InputError(f"{label}:{begin}: two columns have the same name", seen=", ".join(header))
        begin = reader.line_num + 1 + before
        text.begin_record()
        for cells in reader:
            if cells and len(cells) != len(header):
                on_bad_row(_wrong_count(f"{label}:{begin}", cells, len(header), delimiter))
            elif cells:
                yield Row(f"{label}:{begin}", dict(zip(header, cells, strict=True)))
            begin = reader.line_num + 1 + before
            text.begin_record()
    except csv.Error as error:
        is_return = "new-line character" in str(error)
        raise InputError(
            f"{label}:{begin}: not valid CSV",
            seen="a carriage return outside of quotes" if is_return else str(error),
            change="end lines with \\n or \\r\\n" if is_return else None,
        ) from None


class _DecodedLines(Iterator[str]):
    """The lines of a CSV file as text; a record of many lines may be as long as a row of one line."""

    def __init__(self, stream: BinaryIO, label: str) -> None:
        self._lines, self._label = lines(stream, label), label
        self._ahead: list[str] = []
        self._num_bytes = 0

    def peek(self) -> str:
        """The next line; empty at the end of the file."""
        if not self._ahead and (line := next(self, None)) is not None:
            self._ahead.append(line)
        return self._ahead[0] if self._ahead else ""

    def begin_record(self) -> None:
        """Say that what follows is another record."""
        self._num_bytes = 0

    def __next__(self) -> str:
        if self._ahead:
            return self._ahead.pop()
        number, line = next(self._lines)
        self._num_bytes += len(line)
        if self._num_bytes > MAX_ROW_BYTES:
            raise InputError(
                f"{self._label}:{number}: the record is too long",
                allowed=f"{MAX_ROW_BYTES >> 20} MiB",
                change="look for a quote that is not closed",
            )
        if b"\0" in line:
            raise InputError(f"{self._label}:{number}: not text", seen=f"NUL, byte {line.index(0) + 1} of the line")
        try:
            return line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self._label}:{number}: not UTF-8",
                seen=f"byte {error.start + 1} of the line",
                change="save the file as UTF-8",
            ) from None


def _delimiter(head: str, usual: str) -> str:
    """What separates the names of a header; the usual delimiter if it does, or if nothing does."""

    def num_cells(delimiter: str) -> int:
        try:
            return len(next(csv.reader([head], delimiter=delimiter), []))
        except csv.Error:
            return 0

    if len(head) > _LONGEST_HEADER or num_cells(usual) > 1:
        return usual
    most, delimiter = max((num_cells(one), one) for one in _DELIMITERS)
    return delimiter if most > 1 else usual


def _wrong_count(where: str, cells: list[str], num_columns: int, delimiter: str) -> RowError:
    return RowError(
        f"{where}: {len(cells)} cells, but the header has {num_columns}",
        reason="not as many cells as the header",
        seen=", ".join(cells[:80])[:80],
        change=f"quote cells that contain {_DELIMITERS[delimiter]} or a line break",
    )


def read_columnar(path: Path, label: str, kind: str, left_out: LeftOut, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Yield the rows of a parquet or arrow file, without the nulls that its schema forced (`schema_nulls.py`)."""
    index = 0
    try:
        schema, batches = _open_parquet(path) if kind == "parquet" else _open_arrow(path)
        if strange := [field.name for field in schema if _is_extension(field)]:
            raise InputError(f"{label}: columns of an extension type", seen=", ".join(strange), allowed="plain columns")
        if len(set(schema.names)) != len(schema.names):
            raise InputError(f"{label}: two columns have the same name", seen=", ".join(schema.names))
        nulls = SchemaNulls(schema, left_out.schema_nulls)
        for batch in batches:
            batch.validate(full=True)  # Arrow trusts offsets and lengths: damaged ones are a segmentation fault
            num_rows = _BATCH_ROWS if batch.nbytes <= MAX_ROW_BYTES else 1
            for start in range(0, len(batch), num_rows):  # a batch of an arrow file may hold all its rows
                part = batch.slice(start, num_rows)
                if num_rows == 1 and part.nbytes > MAX_ROW_BYTES:
                    on_bad_row(_too_long(f"{label}[{index}]"))
                    index += 1
                    continue
                for values in part.to_pylist(maps_as_pydicts="strict"):
                    yield Row(f"{label}[{index}]", nulls.drop(values))
                    index += 1
    except InputError:
        raise
    # damaged values raise many kinds of exceptions: ValueError, OverflowError, KeyError, ...
    except Exception as error:
        raise InputError(
            f"{label}: not a readable {kind} file" + (f" after row {index - 1}" if index else ""),
            seen=first_line(error),
        ) from None


def _open_parquet(path: Path) -> tuple[Any, Iterator[Any]]:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(path, buffer_size=CHUNK_BYTES)  # without it, whole columns of a row group are read
    for number in range(table.metadata.num_row_groups):
        # an exception if the metadata of its columns are damaged; asked for them, Arrow's objects would end the process
        next(table.iter_batches(batch_size=1, row_groups=[number]), None)
    return table.schema_arrow, table.iter_batches(batch_size=_num_batch_rows(table.metadata))


def _num_batch_rows(metadata: Any) -> int:
    """Rows to read at a time: fewer where they may be far larger than the file says, by what its columns tell.

    A value of a dictionary is stored once and may stand in every row.
    """
    num_rows = _BATCH_ROWS
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(metadata.num_columns)):
            size, packed = column.total_uncompressed_size, max(column.total_compressed_size, 1)
            if size > max(CHUNK_BYTES, _MAX_RATIO * packed):
                return 1
            value = size // max(group.num_rows, 1)
            if (begin := column.dictionary_page_offset) is not None:
                value = max(value, min(size, (column.data_page_offset - begin) * size // packed))
            num_rows = min(num_rows, max(1, _BATCH_BYTES // max(value, 1)))
    return num_rows


def _open_arrow(path: Path) -> tuple[Any, Iterator[Any]]:
    import pyarrow as pa

    # `datasets` writes the stream format, `pyarrow.feather` and others the file format
    with path.open("rb") as file:
        is_file = file.read(6) == b"ARROW1"
    mapped = pa.memory_map(str(path))
    reader = pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)
    batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else iter(reader)
    return reader.schema, batches


def _too_long(where: str) -> RowError:
    what = "the row is too long"
    return RowError(f"{where}: {what}", reason=what, allowed=f"{MAX_ROW_BYTES >> 20} MiB")


def _is_extension(field: Any) -> bool:
    """Whether a column, or a field inside it, is of an extension type, known to this process or not."""
    import pyarrow as pa

    inner = (field.type.field(i) for i in range(field.type.num_fields))
    is_named = b"ARROW:extension:name" in (field.metadata or {})
    return is_named or isinstance(field.type, pa.BaseExtensionType) or any(map(_is_extension, inner))
