"""Open a text file as a stream of UTF-8: decompressed, and recoded if it is UTF-16."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any, BinaryIO, cast

from solotune.dataset.readers.row import CHUNK_BYTES
from solotune.errors import InputError

_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def open_text(path: Path, label: str) -> BinaryIO:
    """Open a file for reading, decompressed and as UTF-8.

    Raises:
        InputError: while reading, at bytes that are not UTF-16, in a file that begins with the mark of UTF-16.
    """
    stream = _decompressed(path)
    head = stream.peek(4)[:4]
    if head[:2] not in _UTF16:
        return cast(BinaryIO, stream)
    if head == b"\xff\xfe\0\0":
        raise InputError(f"{label}: not UTF-8", seen="UTF-32", change="save it as UTF-8")
    return cast(BinaryIO, io.BufferedReader(_Utf16(stream, label), CHUNK_BYTES))


def _decompressed(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")
    if suffix == ".zst":
        import pyarrow as pa

        # Arrow's reader, because the package zstandard ends without an error if a file is cut off. Several frames
        # are read as one text, and a frame with a window above 128 MiB is refused.
        inner: Any = pa.CompressedInputStream(path.open("rb"), "zstd")
        return io.BufferedReader(inner, CHUNK_BYTES)
    return path.open("rb")


class _Utf16(io.RawIOBase):
    """A stream of UTF-16, with its mark at the begin, as UTF-8."""

    def __init__(self, stream: Any, label: str) -> None:
        self._text, self._label = io.TextIOWrapper(stream, encoding="utf-16", newline=""), label
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            self._left = self._left or self._text.read(len(buffer) // 3 or 1).encode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self._label}: not UTF-16, but it begins with the mark of UTF-16",
                seen=error.reason,
                change="save it as UTF-8",
            ) from None
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size
