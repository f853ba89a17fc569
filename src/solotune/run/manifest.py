"""Manifests: the size and the sha256 of each file of a folder, so that damage is found instead of believed.

    manifest.json   {"version": 1, "sha256": "2c26...", "files": {"state.json": {"bytes": 1234, "sha256": "9f86..."}}}

safetensors has no checksum of its own: a flipped bit loads in silence. The manifest has one, over its list, so that it
is the manifest which is called damaged if it is. And its text is written in one way only (sorted, indented by 1) and
compared with that way when it is read, so nothing of it can change unseen.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

MANIFEST = "manifest.json"
VERSION = 1
READ_BYTES = 1 << 20


class Entry(NamedTuple):
    """One file."""

    bytes: int
    sha256: str


class Problem(NamedTuple):
    """What is wrong with a file; `file` is relative to the folder that was looked at."""

    file: str
    problem: str


def entry_at(path: Path, limit: int | None = None) -> Entry:
    """Of a file on disk, or of its first `limit` bytes."""
    digest, count = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES if limit is None else min(READ_BYTES, limit - count)):
            digest.update(piece)
            count += len(piece)
    return Entry(count, digest.hexdigest())


def manifest_text(entries: Mapping[str, Entry]) -> str:
    """The file's content."""
    files = {name: entries[name]._asdict() for name in sorted(entries)}
    own = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return json.dumps({"version": VERSION, "sha256": own, "files": files}, indent=1) + "\n"


def read_manifest(path: Path) -> dict[str, Entry]:
    """Raises:
    ValueError: it is not what `manifest_text` writes; says how.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content: Any = json.loads(text)
        entries = {name: Entry(**values) for name, values in content["files"].items()}
        well_formed = all(
            type(entry.bytes) is int and re.fullmatch(r"[0-9a-f]{64}", entry.sha256) for entry in entries.values()
        )
    except FileNotFoundError:
        raise ValueError("there is none") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("it is damaged") from None
    if not well_formed or text != manifest_text(entries):
        raise ValueError("it is damaged")
    return entries


def differences(folder: Path, entries: Mapping[str, Entry], growing: tuple[str, ...] = ()) -> Iterator[Problem]:
    """The files that are missing, or are not what is written here.

    Args:
        growing: files whose recorded bytes only have to stand at their beginning.
    """
    for name, recorded in entries.items():
        path = folder / name
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                yield Problem(name, "is no regular file")
            elif status.st_size < recorded.bytes or (name not in growing and status.st_size > recorded.bytes):
                yield Problem(name, f"has {status.st_size:,} bytes, {recorded.bytes:,} were written")
            elif entry_at(path, recorded.bytes) != recorded:
                yield Problem(name, "its content is not what was written (sha256)")
        except FileNotFoundError:
            yield Problem(name, "is missing")
        except OSError as error:
            yield Problem(name, f"cannot be read: {error.strerror}")


def check_folder(folder: Path) -> list[Problem]:
    """What is wrong with a folder of files and its manifest; nothing where all is as it was written."""
    try:
        entries = read_manifest(folder / MANIFEST)
    except ValueError as error:
        return [Problem(MANIFEST, f"no manifest to compare with: {error}")]
    found = list(differences(folder, entries))
    return found + [Problem(name, "does not belong here: no manifest names it") for name in unknown(folder, entries)]


def unknown(folder: Path, names: Iterable[str]) -> list[str]:
    """What is below a folder and is none of these names, nor leads to one, nor is the manifest."""
    known = {MANIFEST, *names}
    leading = {parent.as_posix() for name in known for parent in PurePosixPath(name).parents}
    found = ((path.relative_to(folder).as_posix(), path) for path in sorted(folder.rglob("*")))
    return [
        name for name, path in found
        if name not in known and not (name in leading and path.is_dir() and not path.is_symlink())
    ]  # fmt: skip
