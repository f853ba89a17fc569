"""The one door through which the files of a run are written.

    write_whole(path)     temporary sibling, fsync, rename, fsync of the folder: the file is there whole or not at all
    whole_folder(target)  the same for a folder, with a manifest of its files
    append_line(path)     a line that is there whole, or taken back
    LogFile               a log whose failures are nobody's concern

A rename is on disk only once its folder has been synced, and a file's bytes only once the file has; what was not synced
may be lost in a power cut in any order. So every function here syncs what a reader may rely on before it returns.

All of them are made of `fs_ops.py`, where they can be counted, failed and recorded. safetensors' own writer would
pass by this door (and makes files of mode 0600), so tensors are turned into bytes first.

Modes follow the umask. Files are made anew with O_EXCL and never through a symbolic link.
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
from pathlib import Path
from typing import Any

from solotune.errors import StorageError
from solotune.run import fs_ops
from solotune.run.manifest import MANIFEST, Entry, check_folder, manifest_text

PARTIAL, REMOVED = ".partial", ".removed"  # names of what is not yet, or no longer, there: `.<name>.partial`
PREFLIGHT = ".preflight-"
WRITE_BYTES = 16 << 20  # one write; content that comes in pieces is gathered up to this

Content = bytes | str | Iterable[bytes] | Iterable[str]


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns an operating system's refusal to write into an error that names the path."""
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
    """Writes a file so that it exists complete or not at all, also across a power loss.

    Args:
        content: an iterable gives it in pieces, which need not all be in memory.

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
    """A folder being filled; `whole_folder` makes it appear."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}

    def write(self, name: str, content: Content) -> None:
        """Writes one of its files durably, and notes its hash, taken on the way, for the manifest.

        Args:
            name: may be in a folder: `a/b`.
            content: an iterable gives it in pieces, of which two writes' worth (WRITE_BYTES each) is held in memory.
        """
        path = self.path / name
        if not path.parent.is_dir():
            fs_ops.mkdir(path.parent)
            fs_ops.sync_folder(path.parent.parent)
        digest, count = hashlib.sha256(), 0

        def hashed() -> Iterator[bytes]:
            nonlocal count
            for piece in _pieces(content):
                digest.update(piece)
                count += len(piece)
                yield piece

        _write_new(path, hashed())
        if path.parent != self.path:
            fs_ops.sync_folder(path.parent)
        self.entries[name] = Entry(count, digest.hexdigest())


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Folder]:
    """A folder to fill that appears under `target` only when the block ends well; an old `target` is replaced.

    It is read back before it appears, so nothing old is given up for what the disk has not kept.

    Raises:
        StorageError: disk full, read-only, quota.
    """
    partial = target.with_name(f".{target.name}{PARTIAL}")
    with storage_errors(target):
        try:
            make_folder(target.parent)
            _remove_tree(partial)
            fs_ops.mkdir(partial)
            folder = Folder(partial)
            yield folder
            _write_new(partial / MANIFEST, _pieces(manifest_text(folder.entries)))
            fs_ops.sync_folder(partial)
            for file, problem in check_folder(partial):
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
    """Makes a folder and those above it, each durably.

    Raises:
        StorageError: it cannot be made.
    """
    with storage_errors(path):
        if path.is_dir():
            with contextlib.suppress(PermissionError):  # of a folder above that is another's
                fs_ops.sync_folder(path.parent)  # whoever made it may have been killed before it was durable
            return
        make_folder(path.parent)
        with contextlib.suppress(FileExistsError):
            fs_ops.mkdir(path)
        fs_ops.sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Removes a folder of files; it is renamed away first, so none is ever seen half gone."""
    with storage_errors(path):
        _set_aside(path)
        _remove_tree(_removed(path))


def rename(path: Path, name: str) -> None:
    """Gives a file or folder another name in its folder, durably."""
    with storage_errors(path):
        fs_ops.rename(path, path.with_name(name))
        fs_ops.sync_folder(path.parent)


def remove(path: Path) -> None:
    """Removes a file, durably; nothing where there is none."""
    with storage_errors(path):
        if path.exists():
            fs_ops.unlink(path)
            fs_ops.sync_folder(path.parent)


def sweep(folder: Path) -> None:
    """Clears away what a killed process has left half made or half removed."""
    with storage_errors(folder):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.name.startswith(".") and (path.suffix in (PARTIAL, REMOVED) or path.name.startswith(PREFLIGHT)):
                _remove_tree(path)


# --- files that grow


def append_line(path: Path, line: str) -> None:
    """Appends one line, of which nothing stays if it cannot be written whole.

    It is not synced: a line is as durable as the checkpoint that counts it (`RunDirectory.mark`).

    Raises:
        StorageError: disk full, read-only, quota.
    """
    with storage_errors(path):
        handle = fs_ops.open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            size = os.fstat(handle).st_size
            try:
                fs_ops.write(handle, path, line.encode())
            except BaseException:
                with contextlib.suppress(OSError):
                    fs_ops.truncate(handle, path, size)
                raise
        finally:
            os.close(handle)


def sync(path: Path) -> None:
    """Makes a file that was appended to durable, and its name."""
    with storage_errors(path):
        handle = fs_ops.open_file(path, os.O_RDWR | os.O_CREAT)
        try:
            fs_ops.fsync(handle, path)
        finally:
            os.close(handle)
        fs_ops.sync_folder(path.parent)


def cut_back(path: Path, length: int) -> None:
    """Shortens a file to `length` bytes, durably; nothing where there is none."""
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
    """A text file to append to, for people. A full disk must not end a run because of it, so nothing is raised."""

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


# --- one owner


def take_lock(path: Path, owner: str) -> int | None:
    """Locks a file for this process, and writes into it who that is; None where another process holds it.

    The kernel drops the lock with the process. The file stays; a file that was removed or replaced while it was being
    locked is locked anew, since its name now leads elsewhere.
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
    """Whether a live process holds it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)


def drop_lock(path: Path, handle: int) -> None:
    """Lets go of it, and of the owner's name."""
    with contextlib.suppress(OSError):
        fs_ops.truncate(handle, path, 0)
    os.close(handle)


def _write_new(path: Path, pieces: Iterable[bytes]) -> None:
    """A new file of these pieces, synced; its folder is not."""
    handle = fs_ops.open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        for piece in pieces:
            fs_ops.write(handle, path, piece)
        fs_ops.fsync(handle, path)
    finally:
        os.close(handle)


def _pieces(content: Content) -> Iterator[bytes]:
    """The content in writes of at most WRITE_BYTES."""
    if isinstance(content, str):
        content = content.encode()
    if isinstance(content, bytes):
        for begin in range(0, len(content), WRITE_BYTES):
            yield content[begin : begin + WRITE_BYTES]
        return
    gathered = bytearray()
    for piece in content:
        rest = memoryview(piece.encode() if isinstance(piece, str) else piece)
        while rest:
            room = WRITE_BYTES - len(gathered)
            gathered += rest[:room]
            rest = rest[room:]
            if len(gathered) == WRITE_BYTES:
                yield bytes(gathered)
                gathered.clear()
    yield bytes(gathered)


def _removed(path: Path) -> Path:
    return path.with_name(f".{path.name}{REMOVED}")


def _set_aside(path: Path) -> None:
    """Renames a folder away, durably: else it could be back after a power cut with half of its files gone."""
    _remove_tree(_removed(path))
    fs_ops.rename(path, _removed(path))
    fs_ops.sync_folder(path.parent)


def _remove_tree(path: Path) -> None:
    """Removes a folder and all in it, or a file; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        for inner in sorted(path.iterdir()):
            _remove_tree(inner)
        fs_ops.rmdir(path)
    elif path.exists() or path.is_symlink():
        fs_ops.unlink(path)
