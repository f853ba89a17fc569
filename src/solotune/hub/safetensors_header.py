"""Read the header of a safetensors file strictly: names, dtypes, shapes and offsets, before any tensor.

    8 bytes    n, the header's length, little endian
    n bytes    JSON: {"name": {"dtype": "BF16", "shape": [..], "data_offsets": [begin, end]}, ..., "__metadata__": {..}}
    the rest   the tensors' bytes, one after the other, without gaps or overlaps

Why not the library's own checks: they run one file at a time, when the file is mapped, and do not name the tensor. Here
the headers of all files of a model are read in milliseconds, so that a damaged file is refused before memory is taken,
with a clear message. The format has no checksum: see `base_fingerprint.py` for what can be compared instead.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

from solotune.errors import InputError
from solotune.hub.safe_files import parsed
from solotune.regular_files import open_regular
from solotune.units import first_line

MAX_HEADER_BYTES = 32 << 20  # 300,000 tensors; the library's own limit is 100 MB
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16}
BITS |= {"BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "F4": 4}
BITS |= {"F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "C64": 64}


class Entry(NamedTuple):
    """A tensor of a file; `begin` and `end` are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Entry]:
    """Tensors of a safetensors file, in the order of their offsets.

    Raises:
        InputError: the file does not match its header exactly.
    """

    def damaged(seen: str) -> InputError:
        return InputError(f"{path}: not a readable safetensors file", seen=seen, change="download the file again")

    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise damaged(f"{size} bytes")
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise damaged(f"a header of {length:,} bytes in a file of {size:,}")
            header = parsed(file.read(length))
    except OSError as error:
        raise InputError(f"{path}: cannot be read", seen=error.strerror) from None
    except (ValueError, RecursionError) as error:
        raise damaged(f"its header is not valid JSON: {first_line(error)}") from None
    if not isinstance(header, dict):
        raise damaged("its header is not a JSON object")
    header.pop("__metadata__", None)
    entries: dict[str, Entry] = {}
    for name, raw in header.items():
        entry = _entry(raw, 8 + length)
        if entry is None:
            raise damaged(f"{name}: {str(raw)[:200]}")
        entries[name] = entry
    offset = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != offset:
            raise damaged(f"{name}: {'overlaps the tensor' if entry.begin < offset else 'leaves a gap'} before it")
        offset = entry.end
    if offset != size:
        raise damaged(f"{abs(offset - size):,} {'missing' if offset > size else 'extra'} bytes at its end")
    return dict(sorted(entries.items(), key=lambda item: item[1][2:]))


def _entry(raw: Any, data: int) -> Entry | None:
    """Parse the description of a tensor; None if it is not valid."""
    if not isinstance(raw, dict) or raw.keys() != {"dtype", "shape", "data_offsets"}:
        return None
    if not isinstance(raw["dtype"], str) or raw["dtype"] not in BITS:
        return None
    shape, offsets = raw["shape"], raw["data_offsets"]
    has_lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not has_lists or any(type(number) is not int or not 0 <= number < 1 << 63 for number in (*shape, *offsets)):
        return None
    begin, end = offsets
    entry = Entry(raw["dtype"], tuple(shape), data + begin, data + end)
    return entry if 8 * (end - begin) == BITS[raw["dtype"]] * entry.numel else None
