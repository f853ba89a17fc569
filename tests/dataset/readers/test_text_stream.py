"""UTF-16 as UTF-8, whatever the size of the reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from solotune.dataset.readers.text_stream import open_text
from solotune.errors import InputError

TEXT = "a漢\U0001f600é\r\n" * 5000


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("size", [1, 7, 1000, 1 << 20])
def test_any_size_of_reads(tmp_path: Path, encoding: str, size: int) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT.encode(encoding))
    with open_text(tmp_path / "a.txt", "a.txt") as stream:
        assert b"".join(iter(lambda: stream.read(size), b"")) == TEXT.encode()
    with open_text(tmp_path / "a.txt", "a.txt") as stream:
        assert stream.readline(1 << 20).decode() == TEXT[:6]


def test_what_only_begins_like_utf16(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("a".encode("utf-16") + b"\x00\xd8a\x00")
    with open_text(tmp_path / "a.txt", "a.txt") as stream, pytest.raises(InputError, match="not UTF-16"):
        stream.read()
