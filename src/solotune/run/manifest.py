"""Manifests: the size and the sha256 of each file of a folder, so that damage is found.

    manifest.json   {"version": 1, "sha256": "2c26...", "files": {"state.json": {"bytes": 1234, "sha256": "9f86..."}}}

safetensors has no checksum: a flipped bit loads without an error. The manifest has a checksum of its own, over its
list, so a damaged manifest is reported as such. Its text is written in one way only (sorted, indented by 1) and
compared with that when it is read, so no byte of it can change unnoticed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from solotune.regular_files import open_regular, read_text

MANIFEST = "manifest.json"
VERSION = 1
MAX_BYTES = 64 << 20  # 400,000 files
READ_BYTES = 1 << 20
HASHED_AT_ONCE = 4  # files
NOT_LISTED = "is not listed in a manifest: it was added after the run wrote its files"


class Entry(NamedTuple):
    """The size and sha256 of one file."""

    bytes: int
    sha256: str


class Problem(NamedTuple):
    """What is wrong with a file; `file` is relative to the folder that was checked."""

    file: str
    problem: str


def entry_at(path: Path, limit: int | None = None) -> Entry:
    """The entry of a file on disk, or of its first `limit` bytes."""
    digest, count = hashlib.sha256(), 0
    with open_regular(path) as file:
        while piece := file.read(READ_BYTES if limit is None else min(READ_BYTES, limit - count)):
            digest.update(piece)
            count += len(piece)
    return Entry(count, digest.hexdigest())


def manifest_text(entries: Mapping[str, Entry]) -> str:
    """The text of manifest.json."""
    files = {name: entries[name]._asdict() for name in sorted(entries)}
    own = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return json.dumps({"version": VERSION, "sha256": own, "files": files}, indent=1) + "\n"


def read_manifest(path: Path) -> dict[str, Entry]:
    """Read a manifest.

    Raises:
        ValueError: it is not what `manifest_text` writes; the text says what is wrong.
    """
    try:
        if path.is_symlink():  # it could be changed later, where nothing checks it
            raise ValueError("it is a link, not a file of this folder")
        text = read_text(path, MAX_BYTES)
    except FileNotFoundError:
        raise ValueError("the file does not exist") from None
    except UnicodeDecodeError:
        raise ValueError("it is damaged") from None
    except OSError as error:
        raise ValueError("it is damaged" if error.errno == errno.EIO else error.strerror) from None
    try:
        content: Any = json.loads(text)
        entries = {name: Entry(**values) for name, values in content["files"].items()}
        well_formed = all(
            type(entry.bytes) is int and entry.bytes >= 0 and re.fullmatch(r"[0-9a-f]{64}", entry.sha256)
            for entry in entries.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("it is damaged") from None
    if not well_formed or text != manifest_text(entries):
        raise ValueError("it is damaged")
    if outside := next((name for name in entries if not _is_inside(name)), None):
        raise ValueError(f"it lists a file outside its folder: {outside!r}")
    return entries


def _is_inside(name: str) -> bool:
    """Whether the name in a manifest is a path below its folder."""
    parts = name.split("/")
    return "\0" not in name and not {"", ".", ".."} & set(parts)


def differences(folder: Path, entries: Mapping[str, Entry], growing: tuple[str, ...] = ()) -> Iterator[Problem]:
    """The files that are missing, or differ from their entries.

    Args:
        growing: files that may have grown: only their beginning has to match.
    """
    for name, recorded in entries.items():
        path = folder / name
        try:
            status = path.lstat()
            if any((folder / parent).is_symlink() for parent in PurePosixPath(name).parents[:-1]):
                yield Problem(name, "is in a folder that is a link")
            elif not stat.S_ISREG(status.st_mode):
                yield Problem(name, "is not a regular file")
            elif status.st_size < recorded.bytes or (name not in growing and status.st_size > recorded.bytes):
                yield Problem(name, f"has {status.st_size:,} bytes, but {recorded.bytes:,} were written")
            elif entry_at(path, recorded.bytes) != recorded:
                yield Problem(name, "content has changed (sha256 differs)")
        except FileNotFoundError:
            yield Problem(name, "is missing")
        except OSError as error:
            yield Problem(name, f"cannot be read: {error.strerror}")


class FolderCheck:
    """Compares a folder with its manifest. Each file can be read as soon as it is there, while others are written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pool = ThreadPoolExecutor(HASHED_AT_ONCE)  # hashing is slower than reading what was just written
        self._begun: dict[tuple[str, Entry], Future[list[Problem]]] = {}

    def __enter__(self) -> FolderCheck:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def begin(self, name: str, entry: Entry) -> Future[list[Problem]]:
        """Read a file in a thread, if that was not begun before, and compare it with its entry."""
        if (name, entry) not in self._begun:
            compared = self._pool.submit(lambda: list(differences(self.folder, {name: entry})))
            self._begun[name, entry] = compared
        return self._begun[name, entry]

    def problems(self) -> list[Problem]:
        """All that differs from the manifest, once every file was read."""
        try:
            entries = read_manifest(self.folder / MANIFEST)
        except ValueError as error:
            return [Problem(MANIFEST, f"the manifest cannot be used: {error}")]
        each = [self.begin(name, entry) for name, entry in entries.items()]
        found = [problem for problems in each for problem in problems.result()]
        return found + [Problem(name, NOT_LISTED) for name in unknown(self.folder, entries)]


def check_folder(folder: Path) -> list[Problem]:
    """Compare a folder with its manifest; no problems if all is as it was written."""
    with FolderCheck(folder) as check:
        return check.problems()


def unknown(folder: Path, names: Iterable[str]) -> list[str]:
    """The paths below a folder that are not in `names`, not a folder on the way to one, and not the manifest."""
    known = {MANIFEST, *names}
    leading = {parent.as_posix() for name in known for parent in PurePosixPath(name).parents}
    found = ((path.relative_to(folder).as_posix(), path) for path in sorted(folder.rglob("*")))
    return [
        name for name, path in found
        if name not in known and not (name in leading and path.is_dir() and not path.is_symlink())
    ]  # fmt: skip
