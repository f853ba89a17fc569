"""Read the two binary logs of training runs without their libraries: TensorBoard events and W&B's offline datastore.

    for step, values in tensorboard(path): ...       {"train/loss": 2.3}, and texts: {"args/text_summary": "{...}"}
    history, config, console, code = wandb(path)     [{"train/loss": 2.3, "train/global_step": 1}], {"learning_rate": 1}

Both are protobuf messages in frames. Checksums are not compared: a file that was cut off gives what stands before the
cut. A field of the wrong type is skipped; at most `MAX_BYTES` of a file and `MAX_RECORDS` messages are read.

Source: tensorboard 2.21 (event.proto, summary.proto, TFRecord), wandb 0.31 (wandb_internal.proto, LevelDB's log).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from solotune.regular_files import open_regular
from solotune.run.record import parse_json

MAX_BYTES = 256 << 20
MAX_MESSAGE = 8 << 20
MAX_RECORDS = 2_000_000
MAX_FIELDS = 10_000
"""Fields of one message that are read; a step logs some dozens."""
_BLOCK = 32 << 10
_WANDB_HEADER = 7

Field = tuple[int, int | bytes]


def fields(message: bytes) -> Iterator[Field]:
    """(number, value) of each field: an int, or the bytes of a text, message or float; ends where it is damaged."""
    at, size = 0, len(message)
    for _ in range(MAX_FIELDS):
        key, at = _varint(message, at)
        if at < 0 or at > size:
            return
        kind, number = key & 7, key >> 3
        if kind == 0:
            value, at = _varint(message, at)
            if at < 0:
                return
            yield number, value
            continue
        length = {1: 8, 5: 4}.get(kind, 0)
        if kind == 2:
            length, at = _varint(message, at)
        if kind not in (1, 2, 5) or at < 0 or at + length > size:
            return
        yield number, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """(value, next place); place -1 at the end or where it is damaged."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            return 0, -1
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    return 0, -1


# --- TensorBoard


def tensorboard(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, tag -> number or text) of each event with a summary.

    Raises:
        OSError: no regular file.
    """
    for message in _tfrecords(path):
        step, values = 0, {}
        for number, value in fields(message):
            if number == 2 and isinstance(value, int):
                step = value
            elif number == 5 and isinstance(value, bytes):
                for inner, one in fields(value):
                    if inner == 1 and isinstance(one, bytes) and (found := _summary(one)) is not None:
                        values[found[0]] = found[1]
        if values and step < 1 << 53:
            yield step, values


def _tfrecords(path: Path) -> Iterator[bytes]:
    """The frames: length (8 bytes), its checksum (4), the message, its checksum (4)."""
    with open_regular(path) as file:
        read = 0
        for _ in range(MAX_RECORDS):
            head = file.read(12)
            if len(head) < 12:
                return
            length = struct.unpack("<Q", head[:8])[0]
            read += length + 16
            if length > MAX_MESSAGE or read > MAX_BYTES:
                return
            message = file.read(length)
            if len(message) < length:
                return
            file.read(4)
            yield message


def _summary(message: bytes) -> tuple[str, Any] | None:
    """Tag and value of one Summary.Value: a number, or a text of `add_text`."""
    tag, value = "", None
    for number, found in fields(message):
        if not isinstance(found, bytes):
            continue
        if number == 1:
            tag = found.decode("utf-8", "replace")
        elif number == 2 and len(found) == 4:
            value = _float32(found)
        elif number == 8:
            value = _tensor(found)
    return (tag, value) if tag and value is not None else None


def _tensor(message: bytes) -> Any:
    """The one number or text of a TensorProto; None if it is something else."""
    for number, found in fields(message):
        if not isinstance(found, bytes):
            continue
        if number in (4, 5) and len(found) == 4:
            return _float32(found)
        if number == 8:
            return found.decode("utf-8", "replace")
    return None


def _float32(four: bytes) -> float:
    """A float32 with the digits that it has: 0.001, not 0.0010000000474974513."""
    return float(f"{struct.unpack('<f', four)[0]:.7g}")


# --- Weights & Biases


def wandb(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any], list[str], int | None]:
    """(rows of the history, config, lines of the console, exit code or None) of run-*.wandb.

    Raises:
        OSError: no regular file.
    """
    history: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    console: list[str] = []
    code: int | None = None
    for record in _leveldb(path):
        for number, value in fields(record):
            if not isinstance(value, bytes):
                continue
            if number == 2:
                history.append(_items(value, 1))
            elif number == 5:
                config |= _items(value, 1)
            elif number == 17:
                for inner, one in fields(value):
                    if inner == 4 and isinstance(one, bytes):
                        config |= _items(one, 1)
            elif number in (4, 13) and len(console) < 100_000:
                console += [one.decode("utf-8", "replace") for inner, one in fields(value)
                            if inner == 3 and isinstance(one, bytes)]  # fmt: skip
            elif number == 18:
                code = next((one for inner, one in fields(value) if inner == 1 and isinstance(one, int)), 0)
    return history, config, console, code


def _items(message: bytes, repeated: int) -> dict[str, Any]:
    """Key (or the nested keys joined with `/`) -> value, of the items of a record."""
    found = {}
    for number, item in fields(message):
        if number != repeated or not isinstance(item, bytes):
            continue
        key, nested, value = "", [], b""
        for inner, one in fields(item):
            if not isinstance(one, bytes):
                continue
            if inner == 1:
                key = one.decode("utf-8", "replace")
            elif inner == 2:
                nested.append(one.decode("utf-8", "replace"))
            elif inner == 16:
                value = one
        if name := key or "/".join(nested):
            found[name] = _json(value)
    return found


def _json(value: bytes) -> Any:
    try:
        return parse_json(value)
    except (ValueError, RecursionError):
        text = value.decode("utf-8", "replace").strip('"')
        return float(text) if text in ("NaN", "Infinity", "-Infinity") else None


def _leveldb(path: Path) -> Iterator[bytes]:
    """The records of LevelDB's log format: blocks of 32 KiB; a header of 7 bytes (checksum, length, type) for each
    part; type 1 is a whole record, 2 its first part, 3 a middle one, 4 its last."""
    with open_regular(path) as file:
        head = file.read(_WANDB_HEADER)
        if head[:4] != b":W&B":
            return
        parts: list[bytes] = []
        at, count = _WANDB_HEADER, 0
        while at < MAX_BYTES and count < MAX_RECORDS:
            room = _BLOCK - at % _BLOCK
            if room < 7:
                file.read(room)
                at += room
                continue
            header = file.read(7)
            if len(header) < 7:
                return
            length, kind = struct.unpack("<HB", header[4:])
            data = file.read(length)
            if len(data) < length or kind not in (1, 2, 3, 4):
                return
            at += 7 + length
            parts = [data] if kind in (1, 2) else [*parts, data]
            if kind in (1, 4):
                count += 1
                yield b"".join(parts)
                parts = []
            elif len(parts) * _BLOCK > MAX_MESSAGE:
                return
