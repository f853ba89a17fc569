"""Append-only store of byte strings on disk: rows that take almost no memory.

    store = Store()
    store.append(b"...")
    store[0]                     # b"..."

In memory are 8 bytes per row, and the last 32 MiB: so small data never touches the disk, with the same code. The file
has no name, so it disappears with the process, however that ends. It is read with `pread`, not mapped: pages of a
mapped file count as the process's memory, and truncating a mapped file kills the process instead of raising an error.

The content is bytes that this process wrote, or a cache entry that matched its checksum.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, overload

from solotune.errors import StorageError
from solotune.units import gib

TAIL_BYTES = 32 << 20
_PIECE_BYTES = 1 << 20


def folder() -> Path:
    """Folder for files made from the data: `$XDG_CACHE_HOME/solotune/data`, by default below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "solotune" / "data"


class Store(Sequence[bytes]):
    """Append-only sequence of byte strings."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._begin = 0  # of the first item, in the file
        self._ends = array("Q")
        self._num_written = 0
        self._tail = bytearray()  # what follows the first `_num_written` bytes

    @classmethod
    def of(cls, file: IO[bytes], begin: int, ends: array[int]) -> Store:
        """Open items that are in a file from `begin` on; `ends` are relative to it."""
        store = cls()
        store._file, store._begin, store._ends = file, begin, ends
        store._num_written = store.num_bytes
        return store

    @property
    def num_bytes(self) -> int:
        """Total size of all items."""
        return self._ends[-1] if self._ends else 0

    @property
    def ends(self) -> array[int]:
        """For each item, the offset of its end."""
        return self._ends

    def append(self, item: bytes) -> None:
        """Append an item.

        Raises:
            StorageError: the disk is full.
        """
        self._ends.append(self.num_bytes + len(item))
        self._tail += item
        if len(self._tail) >= TAIL_BYTES:
            self._write_tail()

    def _write_tail(self) -> None:
        try:
            if self._file is None:
                self._file = _temporary_file()
            left = memoryview(self._tail)
            self._file.seek(self._num_written)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise StorageError(
                f"{folder()}: temporary rows cannot be written",
                seen=f"{error.strerror or error}, after {gib(self._num_written)} GiB",
                change="free some disk space, or set XDG_CACHE_HOME to a folder on another disk",
            ) from error
        self._num_written += len(self._tail)
        self._tail = bytearray()

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, number: int) -> bytes: ...
    @overload
    def __getitem__(self, number: slice) -> list[bytes]: ...
    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        return self.read(self._ends[number - 1] if number else 0, self._ends[number])

    def read(self, begin: int, end: int) -> bytes:
        """Read the bytes `[begin, end)` of the concatenated items.

        Raises:
            StorageError: the file cannot be read, or is shorter than it was.
        """
        if begin >= self._num_written:
            return bytes(self._tail[begin - self._num_written : end - self._num_written])
        in_file = min(end, self._num_written)
        found = self._from_file(begin, in_file)
        return found + bytes(self._tail[: end - in_file]) if end > in_file else found

    def _from_file(self, begin: int, end: int) -> bytes:
        assert self._file is not None
        found, problem = b"", "the file is shorter than it was"
        try:
            found = os.pread(self._file.fileno(), end - begin, self._begin + begin)
            while found and len(found) < end - begin:  # one call reads at most 2 GiB
                more = os.pread(self._file.fileno(), end - begin - len(found), self._begin + begin + len(found))
                found, problem = (found + more, problem) if more else (b"", problem)
        except OSError as error:
            problem = error.strerror or str(error)
        if len(found) < end - begin:
            raise StorageError(f"{folder()}: temporary rows cannot be read back", seen=problem)
        return found

    def pieces(self) -> Iterator[bytes]:
        """Yield all bytes, in pieces of 1 MiB."""
        for begin in range(0, self.num_bytes, _PIECE_BYTES):
            yield self.read(begin, min(begin + _PIECE_BYTES, self.num_bytes))


def _temporary_file() -> IO[bytes]:
    """Open a file in the cache folder, because the system's folder for temporary files is often in memory."""
    place = folder()
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        return tempfile.TemporaryFile(dir=place, buffering=0)
    except OSError:  # read-only, say
        return tempfile.TemporaryFile(buffering=0)
