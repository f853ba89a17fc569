"""Open files of any origin for reading: never block on a FIFO or device, never read more than a limit.

A run directory, a model or a trainer's output may come from elsewhere. Opening a FIFO in it waits forever, a device
never ends, and a sparse file of a few bytes on disk fills the memory. So the package opens files only here
(`scripts/lint_calls.py` checks it), and whatever is not a regular file is an OSError that callers handle already.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading; links are followed.

    Raises:
        OSError: it does not exist, cannot be read, or is a folder, FIFO, socket or device.
    """
    _refuse_others(os.stat(path).st_mode, path)  # opening a device can already do something
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _refuse_others(os.fstat(handle).st_mode, path)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_bytes(path: str | Path, max_bytes: int) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: as `open_regular`, or it has more than `max_bytes` bytes.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size <= max_bytes:  # memory is taken only for what fits
            content = file.read()
            if len(content) <= max_bytes:
                return content
    raise OSError(errno.EFBIG, f"larger than {max_bytes:,} bytes", str(path))


def read_text(path: str | Path, max_bytes: int) -> str:
    """The content of a regular file of UTF-8 text.

    Raises:
        OSError: as `read_bytes`.
        UnicodeDecodeError: it is not UTF-8.
    """
    return read_bytes(path, max_bytes).decode("utf-8")


def _refuse_others(mode: int, path: str | Path) -> None:
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "no regular file")
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, f"it is {kind}", str(path))
