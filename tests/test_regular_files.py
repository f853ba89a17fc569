"""Only regular files are opened, and never more of them than a limit."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from solotune.regular_files import open_regular, read_bytes, read_text


def not_regular(folder: Path) -> dict[str, Path]:
    """A path of each kind that would block, or never end, or fail in odd ways."""
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    (folder / "dangling").symlink_to("nowhere")
    (folder / "device").symlink_to("/dev/zero")
    os.chdir(folder)  # a socket's path has at most 107 characters
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
    (folder / "loop").symlink_to("loop")
    return {name: folder / name for name in ("fifo", "folder", "dangling", "device", "socket", "loop")}


def test_what_is_no_file_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in not_regular(tmp_path).values():
        for use in (open_regular, lambda path: read_bytes(path, 10), lambda path: read_text(path, 10)):
            with pytest.raises(OSError, match=r"it is a|No such file|symbolic links"):
                use(path)


def test_no_more_than_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345" and read_text(path, 5) == "12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_bytes(path, 4)
    os.truncate(path, 1 << 40)  # a sparse file: nothing on the disk
    with pytest.raises(OSError, match="larger than"):
        read_bytes(path, 1 << 30)


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").symlink_to("a")
    assert read_text(tmp_path / "b", 10) == "x"
