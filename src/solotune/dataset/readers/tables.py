"""Read rows of tables: csv and tsv as text, parquet and arrow with pyarrow in batches.

Cells of a csv are texts; a quoted cell may span lines, and a row's place is its first line. Columns of an
Arrow extension type are refused: reading one may import the code that defines it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from solotune.dataset.readers.row import CHUNK_BYTES, MAX_ROW_BYTES, Row, lines
from solotune.errors import InputError
from solotune.units import first_line

_BATCH_ROWS = 128


def read_csv(stream: BinaryIO, label: str) -> Iterator[Row]:
    """Yield one row per record, with the header's names; `.tsv` is separated by tabs."""
    csv.field_size_limit(MAX_ROW_BYTES)

    def decoded() -> Iterator[str]:
        for number, line in lines(stream, label):
            if b"\0" in line:
                raise InputError(f"{label}:{number}: not text", seen=f"NUL, byte {line.index(0) + 1} of the line")
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{label}:{number}: not UTF-8", seen=f"byte {error.start + 1} of the line") from None

    is_tab = ".tsv" in label.lower()
    reader = csv.reader(decoded(), strict=True, delimiter="\t" if is_tab else ",")
    begin = 1
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise InputError(f"{label}:1: two columns have the same name", seen=", ".join(header))
        begin = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise InputError(
                    f"{label}:{begin}: {len(cells)} cells, but the header has {len(header)}",
                    seen=", ".join(cells)[:80],
                    change="quote cells that contain a comma or a line break",
                )
            if cells:
                yield Row(f"{label}:{begin}", dict(zip(header, cells, strict=True)))
            begin = reader.line_num + 1
    except csv.Error as error:
        is_return = "new-line character" in str(error)
        raise InputError(
            f"{label}:{begin}: not valid CSV",
            seen="a carriage return outside of quotes" if is_return else str(error),
            change="end lines with \\n or \\r\\n" if is_return else None,
        ) from None


def read_columnar(path: Path, label: str, kind: str) -> Iterator[Row]:
    """Yield the rows of a parquet or arrow file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = 0
    try:
        if kind == "parquet":
            table = pq.ParquetFile(path, buffer_size=CHUNK_BYTES)  # without it, whole columns of a row group are read
            schema, batches = table.schema_arrow, table.iter_batches(batch_size=_BATCH_ROWS)
        else:
            # `datasets` writes the stream format, `pyarrow.feather` and others the file format
            with path.open("rb") as file:
                is_file = file.read(6) == b"ARROW1"
            mapped = pa.memory_map(str(path))
            reader = pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)
            schema = reader.schema
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else iter(reader)
        if strange := [field.name for field in schema if _is_extension(field)]:
            raise InputError(f"{label}: columns of an extension type", seen=", ".join(strange), allowed="plain columns")
        if len(set(schema.names)) != len(schema.names):
            raise InputError(f"{label}: two columns have the same name", seen=", ".join(schema.names))
        for batch in batches:
            batch.validate(full=True)  # Arrow trusts offsets and lengths: damaged ones are a segmentation fault
            for start in range(0, len(batch), _BATCH_ROWS):  # a batch of an arrow file may hold all its rows
                for values in batch.slice(start, _BATCH_ROWS).to_pylist():
                    yield Row(f"{label}[{index}]", values)
                    index += 1
    except InputError:
        raise
    # damaged values raise many kinds of exceptions: ValueError, OverflowError, KeyError, ...
    except Exception as error:
        raise InputError(
            f"{label}: not a readable {kind} file" + (f" after row {index - 1}" if index else ""),
            seen=first_line(error),
        ) from None


def _is_extension(field: Any) -> bool:
    """Whether a column, or a field inside it, is of an extension type, known to this process or not."""
    import pyarrow as pa

    inner = (field.type.field(i) for i in range(field.type.num_fields))
    is_named = b"ARROW:extension:name" in (field.metadata or {})
    return is_named or isinstance(field.type, pa.BaseExtensionType) or any(map(_is_extension, inner))
