"""Atomic, durable writes: all files of a run are written here.

    write_whole(path)     temporary file, fsync, rename, fsync of the folder: the file is complete or does not exist
    whole_folder(target)  the same for a folder, with a manifest of its files
    append_line(path)     append a line completely, or truncate back
    LogFile               a log that ignores write errors

A rename is on disk only after its folder was synced, and a file's bytes only after the file was. What was not synced
can be lost in a power cut, in any order. So every function syncs what a reader relies on before it returns.

All use `fs_ops.py`, where operations can be counted, failed and recorded. safetensors' own writer would bypass it (and
creates mode 0600), so tensors become bytes first. Modes follow the umask; new files: O_EXCL, through no symbolic link.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from solotune.errors import StorageError
from solotune.run import fs_ops
from solotune.run.manifest import MANIFEST, Entry, FolderCheck, entry_at, manifest_text

PARTIAL, REMOVED = ".partial", ".removed"  # endings of what is not complete yet, or being removed: `.<name>.partial`
PREFLIGHT = ".preflight-"
WRITE_BYTES = 16 << 20  # size of one write; smaller pieces are collected up to this
FLUSH_BYTES = 256 << 20  # what may wait for the disk while a file is written

Content = bytes | str | Iterable[bytes] | Iterable[str] | Iterable[bytes | memoryview]


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an operating system's write error into a StorageError with the path."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: cannot be written", seen=error.strerror or str(error)) from error


# --- whole files and folders


def json_text(content: Any, default: Callable[[Any], Any] | None = None) -> str:
    """Indented JSON and a line break; NaN and infinities, which JSON lacks, are null."""
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, default=default) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, content: Content) -> None:
    """Write a file completely or not at all, even if the power is cut.

    Args:
        content: text, bytes, or an iterable of pieces, which need not all be in memory.

    Raises:
        StorageError: disk full, read-only, quota.
    """
    temporary = path.with_name(f".{path.name}{PARTIAL}")
    with storage_errors(path):
        try:
            _write_new(temporary, _pieces(content))
            fs_ops.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                fs_ops.unlink(temporary)
            raise
        fs_ops.sync_folder(path.parent)


class Folder:
    """A folder that is being filled; `whole_folder` makes it appear."""

    def __init__(self, path: Path, check: FolderCheck | None = None) -> None:
        self.path, self._check = path, check
        self.entries: dict[str, Entry] = {}

    def write(self, name: str, content: Content) -> None:
        """Write one of its files durably, and keep its hash for the manifest.

        Args:
            name: a file name, or one in a folder: `a/b`.
            content: text, bytes, or an iterable of pieces, of which at most 2 x WRITE_BYTES are in memory.
        """
        path = self.path / name
        if not path.parent.is_dir():
            fs_ops.mkdir(path.parent)
            fs_ops.sync_folder(path.parent.parent)
        digest, count = hashlib.sha256(), 0

        def hashed(beside: ThreadPoolExecutor) -> Iterator[bytes | memoryview]:
            nonlocal count
            for piece in _pieces(content):
                hashing = beside.submit(digest.update, piece)  # while it is written
                count += len(piece)
                yield piece
                hashing.result()

        with ThreadPoolExecutor(1) as beside:
            _write_new(path, hashed(beside))
        if path.parent != self.path:
            fs_ops.sync_folder(path.parent)
        self._add(name, Entry(count, digest.hexdigest()))

    def adopt(self, name: str) -> None:
        """Take in a file that another program has written into the folder: sync it, and keep its hash.

        Raises:
            StorageError: it cannot be read back.
        """
        path = self.path / name
        with storage_errors(path):
            fs_ops.sync_file(path)
            self._add(name, entry_at(path))

    def _add(self, name: str, entry: Entry) -> None:
        self.entries[name] = entry
        if self._check:
            self._check.begin(name, entry)


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Folder]:
    """A folder to fill that appears as `target` only if the block ends without an error; an old `target` is replaced.

    It is read back before it appears, so the old one is not removed if the disk has not kept the new one.

    Raises:
        StorageError: disk full, read-only, quota.
    """
    partial = target.with_name(f".{target.name}{PARTIAL}")
    with storage_errors(target):
        try:
            make_folder(target.parent)
            _remove_tree(partial)
            fs_ops.mkdir(partial)
            with FolderCheck(partial) as check:
                folder = Folder(partial, check)
                yield folder
                _write_new(partial / MANIFEST, _pieces(manifest_text(folder.entries)))
                fs_ops.sync_folder(partial)
                for file, problem in check.problems():
                    raise OSError(errno.EIO, f"read back, {file}: {problem}")
            if target.exists():
                _set_aside(target)
            fs_ops.rename(partial, target)
            fs_ops.sync_folder(target.parent)
            _remove_tree(_removed(target))
        except BaseException:
            with contextlib.suppress(OSError):
                _remove_tree(partial)
            raise


def make_folder(path: Path) -> None:
    """Create a folder and those above it, each durably.

    Raises:
        StorageError: it cannot be created.
    """
    with storage_errors(path):
        if path.is_dir():
            with contextlib.suppress(PermissionError):  # a folder above may belong to another user
                fs_ops.sync_folder(path.parent)  # the process that created it may have been killed before syncing
            return
        make_folder(path.parent)
        with contextlib.suppress(FileExistsError):
            fs_ops.mkdir(path)
        fs_ops.sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder of files; it is renamed first, so a half removed folder is never visible under its name."""
    with storage_errors(path):
        _set_aside(path)
        _remove_tree(_removed(path))


def rename(path: Path, name: str) -> None:
    """Rename a file or folder within its folder, durably."""
    with storage_errors(path):
        fs_ops.rename(path, path.with_name(name))
        fs_ops.sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file durably, if it exists."""
    with storage_errors(path):
        if path.exists():
            fs_ops.unlink(path)
            fs_ops.sync_folder(path.parent)


def sweep(folder: Path) -> None:
    """Remove what a killed process left half written or half removed."""
    with storage_errors(folder):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.name.startswith(".") and (path.suffix in (PARTIAL, REMOVED) or path.name.startswith(PREFLIGHT)):
                _remove_tree(path)


# --- files that grow


def append_line(path: Path, line: str) -> None:
    """Append a line atomically: on an error, truncate back.

    It is not synced (`RunDirectory.metrics_offset` does so before a checkpoint records the length), but the file is
    closed: only then a network file system shows the line elsewhere, or says that it is full.

    Raises:
        StorageError: disk full, read-only, quota.
    """
    try:  # every step comes here, so `storage_errors` is entered only for an error
        handle = fs_ops.open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            size = os.lseek(handle, 0, os.SEEK_END)
            try:
                fs_ops.write(handle, path, line.encode())
            except BaseException:
                with contextlib.suppress(OSError):
                    fs_ops.truncate(handle, path, size)
                raise
        finally:
            os.close(handle)
    except OSError:
        with storage_errors(path):
            raise


def sync(path: Path) -> None:
    """Make a file that was appended to durable, and its name."""
    with storage_errors(path):
        fs_ops.sync_file(path, os.O_CREAT)
        fs_ops.sync_folder(path.parent)


def cut_back(path: Path, length: int) -> None:
    """Truncate a file to `length` bytes durably, if it exists."""
    with storage_errors(path):
        if not path.exists():
            return
        handle = fs_ops.open_file(path, os.O_RDWR)
        try:
            fs_ops.truncate(handle, path, length)
            fs_ops.fsync(handle, path)
        finally:
            os.close(handle)


class LogFile(io.TextIOBase):
    """A text log that only appends. It raises nothing: a full disk must not end a run because of its log."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None
        with contextlib.suppress(OSError):
            self._handle = fs_ops.open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self._handle is not None and text:
            with contextlib.suppress(OSError):
                fs_ops.write(self._handle, self._path, text.encode(errors="replace"))
        return len(text)

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        super().close()


# --- locks


def take_lock(path: Path, owner: str) -> int | None:
    """Lock a file for this process and write `owner` into it; None if another process holds the lock.

    The kernel drops the lock when the process ends. The file stays. If it was removed or replaced while it was being
    locked, locking starts again, since its name is now that of another file.
    """
    with storage_errors(path):
        while True:
            handle = fs_ops.open_file(path, os.O_RDWR | os.O_CREAT)
            try:
                fs_ops.say("lock", path)
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists() and os.path.samestat(os.fstat(handle), os.stat(path)):
                    fs_ops.truncate(handle, path, 0)
                    fs_ops.write(handle, path, owner.encode())
                    return handle
                os.close(handle)
            except BlockingIOError:
                os.close(handle)
                return None
            except BaseException:
                os.close(handle)
                raise


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock."""
    try:
        # O_NONBLOCK: a FIFO in place of the lock would wait for a writer
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # no file that can be locked
        return False
    finally:
        os.close(handle)


def drop_lock(path: Path, handle: int) -> None:
    """Release the lock and remove the owner's name from the file."""
    with contextlib.suppress(OSError):
        fs_ops.truncate(handle, path, 0)
    os.close(handle)


def _write_new(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a new file and sync it, not its folder. The disk starts early, so that it is not idle until the sync."""
    handle = fs_ops.open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        with ThreadPoolExecutor(1) as beside:
            flushes, waiting = list[Future[None]](), 0
            for piece in pieces:
                fs_ops.write(handle, path, piece)
                waiting += len(piece)
                if waiting >= FLUSH_BYTES and all(flush.done() for flush in flushes):
                    flushes, waiting = [*flushes, beside.submit(fs_ops.flush, handle)], 0
            for flush in flushes:
                flush.result()  # the kernel reports an error of the disk only once
        fs_ops.fsync(handle, path)
    finally:
        os.close(handle)


def _pieces(content: Content) -> Iterator[bytes | memoryview]:
    """The content in writes of at most WRITE_BYTES; a piece that is longer is not copied."""
    collected = bytearray()
    for piece in [content] if isinstance(content, (bytes, str)) else content:
        rest = memoryview(piece.encode() if isinstance(piece, str) else piece)
        if collected and len(collected) + len(rest) > WRITE_BYTES:
            yield bytes(collected)
            collected.clear()
        while len(rest) >= WRITE_BYTES:
            yield rest[:WRITE_BYTES]
            rest = rest[WRITE_BYTES:]
        collected += rest
    if collected:
        yield bytes(collected)


def _removed(path: Path) -> Path:
    return path.with_name(f".{path.name}{REMOVED}")


def _set_aside(path: Path) -> None:
    """Rename a folder durably before removing it: else it could be back after a power cut with half of its files."""
    _remove_tree(_removed(path))
    fs_ops.rename(path, _removed(path))
    fs_ops.sync_folder(path.parent)


def _remove_tree(path: Path) -> None:
    """Remove a folder and all in it, or a file, if it exists."""
    if path.is_dir() and not path.is_symlink():
        for inner in sorted(path.iterdir()):
            _remove_tree(inner)
        fs_ops.rmdir(path)
    elif path.exists() or path.is_symlink():
        fs_ops.unlink(path)
