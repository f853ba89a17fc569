"""Read rows from local files, one at a time, each with its place.

A place is `chats.jsonl:17` or, in formats without lines, `chats.parquet[17]` (counted from 0, as `datasets` does). The
file name gives the format, the first bytes must agree with it, and compressed text is decompressed while reading.

Why not `datasets`: its JSON builder converts a whole file to Arrow first, so a bad row in line 40,000 is reported as a
schema error without a line, and a missing key silently becomes null.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from solotune.dataset.readers.json_records import read_json, read_jsonl
from solotune.dataset.readers.row import CHUNK_BYTES, Row
from solotune.dataset.readers.tables import read_columnar, read_csv
from solotune.errors import InputError

FORMATS = "jsonl, json, csv, tsv, parquet, arrow; the text formats also as .gz or .zst"

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_COMPRESSED = (".gz", ".zst")
_MAGIC = {b"\x1f\x8b": "gzip data", b"\x28\xb5\x2f\xfd": "zstd data", b"PAR1": "parquet", b"ARROW1": "arrow"}


def format_of(path: Path) -> str | None:
    """The format by file name; None if the name does not give one."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
        if suffixes and _SUFFIXES.get(suffixes[-1]) in ("parquet", "arrow"):
            return None
    return _SUFFIXES.get(suffixes[-1]) if suffixes else None


def read_file(path: Path, label: str) -> Iterator[Row]:
    """Yield the rows of one file in order.

    Args:
        path: an existing regular file.
        label: its name in places and messages.

    Raises:
        InputError: names file and line, or record, of the first mistake.
    """
    kind = format_of(path)
    if kind is None:
        raise InputError(f"{label}: not a data file", seen=path.suffix or "no suffix", allowed=FORMATS)
    if path.stat().st_size == 0:
        raise InputError(f"{label}: the file is empty", seen="0 bytes")
    readers = {"jsonl": read_jsonl, "json": read_json, "csv": read_csv, "tsv": read_csv}
    try:
        _check_content(path, label, kind)
        if kind in ("parquet", "arrow"):
            yield from read_columnar(path, label, kind)
            return
        with _open(path) as stream:
            yield from readers[kind](stream, label)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{label}: damaged gzip data", seen=str(error)) from None
    except OSError as error:
        if error.errno is None:  # from Arrow, which has no class for damaged data
            raise InputError(f"{label}: damaged zstd data", seen=str(error)) from None
        raise InputError(f"{label}: cannot be read", seen=error.strerror) from None


def _check_content(path: Path, label: str, kind: str) -> None:
    """Refuse a file whose first bytes contradict its name."""
    with path.open("rb") as raw:
        head = raw.read(6)
    compressed = {".gz": "gzip data", ".zst": "zstd data"}.get(path.suffix.lower())
    promised = compressed or (kind if kind == "parquet" else None)
    found = next((what for magic, what in _MAGIC.items() if head.startswith(magic)), None)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{label}: not UTF-8", seen="UTF-16", change="save it as UTF-8")
    if found != promised and not (kind == "arrow" and found == "arrow"):
        raise InputError(f"{label}: the name does not match the content", seen=found or f"no {promised}")
    if promised is None and kind != "arrow" and b"\0" in head:
        raise InputError(f"{label}: not text", seen=f"NUL in the first bytes: {head!r}", change="save it as UTF-8")


def _open(path: Path) -> BinaryIO:
    """Open the file for reading, decompressed."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if suffix == ".zst":
        import pyarrow as pa

        # Arrow's reader, because the package zstandard ends without an error if a file is cut off. Several frames
        # are read as one text, and a frame with a window above 128 MiB is refused.
        inner: Any = pa.CompressedInputStream(path.open("rb"), "zstd")
        return cast(BinaryIO, io.BufferedReader(inner, CHUNK_BYTES))
    return path.open("rb")
