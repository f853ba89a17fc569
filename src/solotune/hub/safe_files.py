"""Read files of an untrusted folder safely: inside the folder, regular, of limited size, and valid JSON.

A model folder is untrusted. An index can name `../../secret`, a link can lead out of the folder, a device or FIFO can
block forever, JSON can hold a key twice so that two readers see different values. Everything that solotune reads from
such a folder itself is checked here, before transformers sees the folder.

Links may lead out of the folder in one case: in the hub's cache, snapshots are links into `blobs/` next to them.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from solotune.errors import InputError
from solotune.regular_files import read_bytes
from solotune.units import first_line

MAX_JSON_BYTES = 8 << 20  # config.json has some KB, an index of 100,000 tensors 8 MB
MAX_DEPTH = 64
MAX_VALUES = 4_000_000  # of any JSON: 3 bytes of it (`[],`) become 64 bytes of memory
READ = {".json", ".safetensors", ".jinja", ".model", ".txt", ".tiktoken"}


def contained(folder: Path, name: object) -> Path:
    """Path of a file that is named by a folder or by an index in it.

    Raises:
        InputError: it is not a plain file name, leads out of the folder, or is not a regular file.
    """
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        raise InputError(f"{folder}: refers to a file outside the folder", seen=repr(name), allowed="a plain file name")
    path = folder / name
    check_regular(folder, path)
    return path


def check_regular(folder: Path, path: Path) -> None:
    """Check that a path is a regular file of the folder.

    Raises:
        InputError: it is a link out of the folder, or a device, FIFO, socket or directory.
    """
    try:
        mode = os.stat(path).st_mode
        target, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    except OSError as error:
        raise InputError(f"{path}: cannot be read", seen=error.strerror) from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: not a regular file")
    blobs = root.parents[1] / "blobs" if len(root.parents) > 1 and root.parent.name == "snapshots" else None
    if not target.is_relative_to(root) and (blobs is None or not target.is_relative_to(blobs)):
        raise InputError(
            f"{path}: a link to a file outside the folder",
            seen=str(target),
            allowed="files in the folder itself, and links of the hub's cache",
            change="copy the file into the folder",
        )


def check_links(folder: Path) -> None:
    """Check every link and FIFO in a folder that a library might open, including files that solotune does not read.

    Raises:
        InputError: a link leads out of the folder, or a device, FIFO or socket has the name of a file.
    """
    for path in sorted(folder.iterdir()):
        is_plain = not path.is_symlink() and (path.is_file() or path.is_dir())
        if path.suffix in READ and not is_plain and path.exists():
            check_regular(folder, path)


def json_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a file with one JSON object; duplicate keys and numbers outside the JSON standard are refused.

    Raises:
        InputError: the file is not such an object, or too large.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise InputError(f"{path}: too large", seen=f"{size:,} bytes", allowed=f"at most {max_bytes:,} bytes")
        content = parsed(read_bytes(path, max_bytes))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not valid JSON", seen=error.msg) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read", seen=error.strerror) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise InputError(f"{path}: not valid JSON", seen=reason) from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object", seen=type(content).__name__)
    return content


def parsed(content: bytes) -> Any:
    """Parse strict JSON, or raise ValueError: Python's json also accepts duplicate keys, NaN and UTF-16."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise ValueError(f"the key {twice[:100]!r} appears twice")
        return made

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    check_count(content)
    found = json.loads(content.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    if is_deeper(found, MAX_DEPTH):
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    check_text(content, found)
    return found


def check_text(content: bytes, found: Any) -> None:
    """Check that a parsed JSON has no half of a surrogate pair, which can be neither printed nor a file's name.

    Raises:
        ValueError: it has one.
    """
    if re.search(rb"\\u[dD][89a-fA-F]", content):
        json.dumps(found, ensure_ascii=False).encode()


def check_count(content: bytes) -> None:
    """Check the number of values of a JSON text before they are built.

    Raises:
        ValueError: more than `MAX_VALUES`.
    """
    if sum(content.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES:,} values")


def is_deeper(value: Any, limit: int) -> bool:
    """Whether dicts and lists are nested more than `limit` levels deep; works level by level, without recursion."""
    level = [value]
    for _ in range(limit):
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        level = [item for items in inner for item in items]
        if not level:
            return False
    return True
