"""Files that are written in pieces: bounded memory, the hash of what was written, and nothing left of a failure.

And each is read back before its folder appears.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from solotune.errors import StorageError
from solotune.run import atomic_io, fs_ops, manifest
from solotune.run.manifest import Entry, check_folder

CHUNK = 1 << 20


def chunks(count: int) -> Iterator[bytes]:
    """Chunks of a MiB that differ from one another."""
    for number in range(count):
        yield bytes([number]) * CHUNK


def test_a_file_of_many_chunks_is_written_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_io, "WRITE_BYTES", 4 * CHUNK)
    tracemalloc.start()
    try:
        with atomic_io.whole_folder(tmp_path / "made") as folder:
            folder.write("shard", chunks(64))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    expected = hashlib.sha256(b"".join(chunks(64))).hexdigest()
    assert hashlib.sha256((tmp_path / "made/shard").read_bytes()).hexdigest() == expected
    assert folder.entries["shard"] == Entry(64 * CHUNK, expected)
    assert check_folder(tmp_path / "made") == []
    assert peak < 16 * CHUNK  # of 64: what is gathered, its copy, and the chunk that comes


@pytest.mark.parametrize(
    "content", [b"", b"bytes longer than a write", "text, \u00e9", iter(["text ", "in pieces, longer than one write"]),
                iter([b"", b"a piece longer than a write", b"!"])],
)  # fmt: skip
def test_every_kind_of_content_is_hashed_as_it_is_on_disk(
    content: atomic_io.Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_io, "WRITE_BYTES", 8)
    writes: list[bytes] = []
    with fs_ops.watched(lambda kind, _, written: writes.append(written) if kind == "write" else None):
        folder = atomic_io.Folder(tmp_path)
        folder.write("file", content)
    on_disk = (tmp_path / "file").read_bytes()
    assert on_disk == b"".join(writes) and max(map(len, writes), default=0) <= 8
    assert folder.entries["file"] == Entry(len(on_disk), hashlib.sha256(on_disk).hexdigest())


@pytest.mark.parametrize("error", [RuntimeError("no more"), KeyboardInterrupt()])
def test_nothing_stays_of_an_iterator_that_fails(error: BaseException, tmp_path: Path) -> None:
    def failing() -> Iterator[bytes]:
        yield bytes(atomic_io.WRITE_BYTES)
        yield b"more"
        raise error

    with atomic_io.whole_folder(tmp_path / "old") as folder:
        folder.write("file", b"old")
    for target in ("new", "old"):
        with pytest.raises(type(error)), atomic_io.whole_folder(tmp_path / target) as folder:
            folder.write("file", failing())
    with pytest.raises(type(error)):
        atomic_io.write_whole(tmp_path / "whole", failing())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "manifest.json", "old"]
    assert (tmp_path / "old/file").read_bytes() == b"old"


def test_of_a_line_that_does_not_fit_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes a part of the line and then says that the disk is full."""
    path, take = tmp_path / "metrics.jsonl", os.write
    atomic_io.append_line(path, "a line\n")

    def full(handle: int, content: bytes) -> int:
        if len(content) < 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return take(handle, content[:3])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot be written") as error:
        atomic_io.append_line(path, "another line\n")
    monkeypatch.undo()
    assert error.value.seen == "No space left on device" and path.read_text() == "a line\n"
    atomic_io.append_line(path, "the next\n")
    assert path.read_text() == "a line\nthe next\n"


def test_a_line_goes_to_the_file_that_has_the_name_now(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for number in range(2):
        folder.mkdir()
        atomic_io.append_line(folder / "metrics.jsonl", f"{number}\n")
        assert (folder / "metrics.jsonl").read_text() == f"{number}\n"
        shutil.rmtree(folder)
    with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot be written"):
        atomic_io.append_line(folder / "metrics.jsonl", "lost\n")


def test_a_file_is_read_back_once_while_the_next_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, first_is_read = list[str](), threading.Event()

    def seen(path: Path, limit: int | None = None) -> Entry:
        entry = manifest_entry_at(path, limit)
        read.append(path.name)
        first_is_read.set()
        return entry

    manifest_entry_at = manifest.entry_at
    monkeypatch.setattr(manifest, "entry_at", seen)

    def second() -> Iterator[bytes]:
        yield b"begin"
        assert first_is_read.wait(10)
        yield b"end"

    with atomic_io.whole_folder(tmp_path / "made") as folder:
        folder.write("first", b"1")
        folder.write("second", second())
        (folder.path / "third").write_bytes(b"of another program")
        folder.adopt("third")
    assert sorted(read) == ["first", "second", "third"] and check_folder(tmp_path / "made") == []


@pytest.mark.parametrize("damaged", ["first", "inner/second", "third", "manifest.json"])
def test_the_folder_stays_as_it_was_if_a_file_is_not_what_was_written(damaged: str, tmp_path: Path) -> None:
    with atomic_io.whole_folder(tmp_path / "target") as folder:
        folder.write("file", b"old")

    def lie(operation: str, path: Path, _: bytes) -> None:
        if operation == "fsync" and path.as_posix().endswith(f"/{damaged}"):
            path.write_bytes(path.read_bytes()[:-1] + b"?")

    def fill() -> None:
        with atomic_io.whole_folder(tmp_path / "target") as folder:
            for name in ("first", "inner/second", "third"):
                folder.write(name, b"new")

    with fs_ops.watched(lie), pytest.raises(StorageError) as caught:
        fill()
    assert f"read back, {damaged}" in str(caught.value.seen)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "manifest.json", "target"]
