"""File system operations of a run: the few that `atomic_io.py` uses, each announced to hooks before it is done.

`watched` adds a hook. With it `bench.faults` counts the operations of a run, kills the run at the k-th, cuts a write in
two, makes one fail, or records all of them to replay a power cut.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

Hook = Callable[[str, Path, bytes], None]
_hooks: list[Hook] = []


@contextlib.contextmanager
def watched(hook: Hook) -> Iterator[None]:
    """Calls `hook(operation, path, content)` before each operation of the block.

    `content` is the bytes to write, the new name of a rename, the length of a truncation, else empty. An exception from
    the hook comes out of the operation, as an error of the kernel would.
    """
    _hooks.append(hook)
    try:
        yield
    finally:
        _hooks.remove(hook)


def say(operation: str, path: Path, content: bytes = b"") -> None:
    for hook in _hooks:
        hook(operation, path, content)


def open_file(path: Path, flags: int) -> int:
    say("open", path)
    # O_NONBLOCK: a FIFO in place of a file is an error instead of a wait for somebody who reads it
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)


def write(handle: int, path: Path, content: bytes | memoryview) -> None:
    if _hooks:
        say("write", path, bytes(content))
    rest = memoryview(content)
    while rest:  # the kernel may write less than asked
        rest = rest[os.write(handle, rest) :]


def fsync(handle: int, path: Path) -> None:
    say("fsync", path)
    os.fsync(handle)


def sync_file(path: Path, flags: int = 0) -> None:
    """Make a file durable that another wrote, not its name."""
    handle = open_file(path, os.O_RDWR | flags)
    try:
        fsync(handle, path)
    finally:
        os.close(handle)


def flush(handle: int) -> None:
    """Send a file's bytes to the disk while it is still written. No hook hears of it: nothing relies on it."""
    os.fsync(handle)


def truncate(handle: int, path: Path, length: int) -> None:
    say("truncate", path, str(length).encode())
    os.ftruncate(handle, length)


def sync_folder(folder: Path) -> None:
    say("sync_folder", folder)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems do not support it
            raise
    finally:
        os.close(handle)


def mkdir(path: Path) -> None:
    say("mkdir", path)
    os.mkdir(path)


def rename(path: Path, to: Path) -> None:
    say("rename", path, os.fsencode(to))
    os.replace(path, to)


def unlink(path: Path) -> None:
    say("unlink", path)
    path.unlink(missing_ok=True)


def rmdir(path: Path) -> None:
    say("rmdir", path)
    path.rmdir()
