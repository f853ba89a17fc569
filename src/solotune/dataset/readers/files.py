"""Read rows from local files, one at a time, each with its place.

A place is `chats.jsonl:17` or, in formats without lines, `chats.parquet[17]` (counted from 0, as `datasets` does). The
file name gives the format, the first bytes must agree with it, and compressed text is decompressed while reading.

Why not `datasets`: its JSON builder converts a whole file to Arrow first, so a bad row in line 40,000 is reported as a
schema error without a line, and a missing key silently becomes null.
"""

from __future__ import annotations

import gzip
import shlex
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from solotune.dataset.readers.api_logs import from_log
from solotune.dataset.readers.json_records import OnBadRow, read_json, read_jsonl
from solotune.dataset.readers.left_out import LeftOut
from solotune.dataset.readers.row import Row, RowError
from solotune.dataset.readers.tables import read_columnar, read_csv
from solotune.dataset.readers.text_stream import open_text
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


def read_file(
    path: Path, label: str, left_out: LeftOut | None = None, on_bad_row: OnBadRow | None = None
) -> Iterator[Row]:
    """Yield the rows of one file in order.

    Args:
        path: an existing regular file.
        label: its name in places and messages.
        left_out: counts of what is in the file but not in the rows; added to.
        on_bad_row: called with the error of a row that cannot be read; by default the error is raised.

    Raises:
        InputError: names file and line, or record, of the first mistake.
    """
    kind = format_of(path)
    if kind is None:
        raise _not_a_data_file(path, label)
    if path.stat().st_size == 0:
        raise InputError(f"{label}: the file is empty", seen="0 bytes")
    left_out, on_bad_row = left_out or LeftOut(), on_bad_row or _refuse
    try:
        _check_name(path, label, kind)
        for row in _rows(path, label, kind, left_out, on_bad_row):
            try:
                row = from_log(row)
            except RowError as error:
                on_bad_row(error)
            else:
                yield row
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{label}: damaged gzip data", seen=str(error)) from None
    except OSError as error:
        if error.errno is None:  # from Arrow, which has no class for damaged data
            raise InputError(f"{label}: damaged zstd data", seen=str(error)) from None
        raise InputError(f"{label}: cannot be read", seen=error.strerror) from None


def _rows(path: Path, label: str, kind: str, left_out: LeftOut, on_bad_row: OnBadRow) -> Iterator[Row]:
    if kind in ("parquet", "arrow"):
        yield from read_columnar(path, label, kind, left_out, on_bad_row)
        return
    with open_text(path, label) as stream:
        if kind in ("csv", "tsv"):
            yield from read_csv(stream, label, on_bad_row)
        else:
            reader = read_jsonl if kind == "jsonl" else read_json
            yield from reader(stream, label, left_out, on_bad_row)


def _refuse(error: RowError) -> NoReturn:
    raise error


def rows_of_texts(show: str) -> str:
    """How to make a data file of texts that the shell command `show` prints; without blank lines, lines are rows."""
    rows = "s = sys.stdin.read().strip(); b = r'\\n\\s*\\n'; "
    rows += (
        "[print(json.dumps({'text': t.strip()})) for t in re.split(b if re.search(b, s) else r'\\n', s) if t.strip()]"
    )
    return f'make a row of each paragraph: {show} | python3 -c "import json, re, sys; {rows}" > rows.jsonl'


def _not_a_data_file(path: Path, label: str) -> InputError:
    """The error for a file whose name gives no format, with what makes a data file of it."""
    suffix, quoted = path.suffix.lower(), shlex.quote(path.name)
    change = None
    if suffix in (".txt", ".md", ".text"):
        with path.open("rb") as raw:
            is_json = raw.read(16).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[")
        change = (
            f"rename it to {path.stem}.jsonl (one object on each line) or {path.stem}.json (one array)"
            if is_json
            else rows_of_texts(f"cat {shlex.quote(str(path))}")
        )
    elif suffix in (".gz", ".zst") and path.with_suffix("").suffix.lower() in (".parquet", ".arrow"):
        change = f"unpack it: {'gunzip' if suffix == '.gz' else 'unzstd'} {quoted}"
    elif suffix in (".xlsx", ".xls", ".ods", ".numbers"):
        change = "save the sheet as CSV (UTF-8)"
    elif suffix in (".zip", ".tar", ".tgz", ".bz2", ".xz", ".7z") or ".tar" in path.suffixes:
        change = "unpack it, and give the file or folder"
    elif suffix in (".feather", ".ipc"):
        change = f"rename it to {path.stem}.arrow"
    elif suffix in (".jsonlines", ".json5", ".jl"):
        change = f"rename it to {path.stem}.jsonl"
    return InputError(f"{label}: not a data file", seen=path.suffix or "no suffix", allowed=FORMATS, change=change)


def _check_name(path: Path, label: str, kind: str) -> None:
    """Refuse a file whose first bytes contradict its name."""
    with path.open("rb") as raw:
        head = raw.read(6)
    compressed = {".gz": "gzip data", ".zst": "zstd data"}.get(path.suffix.lower())
    promised = compressed or (kind if kind == "parquet" else None)
    found = next((what for magic, what in _MAGIC.items() if head.startswith(magic)), None)
    if found != promised and not (kind == "arrow" and found == "arrow"):
        raise InputError(
            f"{label}: the name does not match the content",
            seen=found or f"no {promised}",
            change=_right_name(path, found),
        )
    is_utf16 = head[:2] in (b"\xff\xfe", b"\xfe\xff")
    if promised is None and kind != "arrow" and b"\0" in head and not is_utf16:
        raise InputError(f"{label}: not text", seen=f"NUL in the first bytes: {head!r}", change="save it as UTF-8")


def _right_name(path: Path, found: str | None) -> str:
    """What to do about a file whose content is another kind than its name says."""
    stem = path.name
    for suffix in reversed(path.suffixes[-2:]):
        stem = stem.removesuffix(suffix) if suffix.lower() in (*_SUFFIXES, *_COMPRESSED) else stem
    if found in ("parquet", "arrow"):
        return f"rename it to {stem}.{found}"
    if found is not None:
        text = next((s for s in path.suffixes if _SUFFIXES.get(s.lower()) not in (None, "parquet", "arrow")), ".jsonl")
        return f"rename it to {stem}{text}{'.gz' if found == 'gzip data' else '.zst'}"
    if path.suffix.lower() in _COMPRESSED:
        return f"rename it to {path.name.removesuffix(path.suffix)}, if it is not compressed"
    return "rename it to the suffix of its format: " + ", ".join(_SUFFIXES)
