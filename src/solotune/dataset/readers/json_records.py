"""Read rows of JSON text record by record: one object per line (jsonl), or one array of objects (json).

Lines end at `\\n` only: `str.splitlines` also splits at U+2028 and U+0085, which are legal inside a JSON string, and
would turn one row into two.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from solotune.dataset.readers.json_layouts import (
    ROW_KEYS,
    SPLIT_NAMES,
    chat_key,
    chosen_list,
    document_rows,
    holds_rows,
    row_of,
)
from solotune.dataset.readers.json_window import (
    ALLOWED_DEPTH,
    DECODER,
    JsonWindow,
    TooLongError,
    check_size,
    check_value,
    in_words,
    text_around,
)
from solotune.dataset.readers.left_out import LeftOut
from solotune.dataset.readers.row import Row, RowError, lines
from solotune.errors import InputError

OnBadRow = Callable[[RowError], None]
"""Called with the error of a row that the rest of the file does not depend on; it raises the error, or counts it."""


NOT_JSON = "not valid JSON"


def read_jsonl(stream: BinaryIO, label: str, left_out: LeftOut, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Yield one object per line; blank lines are skipped. The only line of a file may hold all rows in one object."""
    rows = _rows_of_lines(stream, label, on_bad_row)
    first = next(rows, None)
    if first is not None and holds_rows(first.values, label):
        second = next(rows, None)
        if second is None:
            yield from document_rows(first.values, label, first.where, left_out, on_bad_row)
            return
        yield from (first, second)
    elif first is not None:
        yield first
    yield from rows


def _rows_of_lines(stream: BinaryIO, label: str, on_bad_row: OnBadRow) -> Iterator[Row]:
    for number, line in lines(stream, label):
        where = f"{label}:{number}"
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        is_cut = not line.endswith(b"\n")  # with an incomplete object the file is damaged, whatever bad rows may be
        line = line.removesuffix(b"\n").removesuffix(b"\r").strip(b" \t")
        if line:
            try:
                row = Row(where, _row_of_line(where, label, line))
            except RowError as error:
                if is_cut and isinstance(error, _CutOffError):
                    change = "download the complete file, or remove its last line"
                    raise InputError(error.problem, seen=error.seen, allowed=error.allowed, change=change) from None
                on_bad_row(error)
            else:
                yield row


class _CutOffError(RowError):
    """The text of a line ends within its object."""


def _row_of_line(where: str, label: str, line: bytes) -> dict[str, Any]:
    """Parse one line of JSON as a row."""

    def wrong(problem: str, *, reason: str = NOT_JSON, **parts: Any) -> RowError:
        return RowError(f"{where}: {problem}", reason=reason, **parts)

    if b"\r" in line:
        what = "a carriage return inside the line"
        raise wrong(what, reason=what, change="end lines with \\n or \\r\\n")
    try:
        text = line.decode()
        check_size(text, where)
        value = DECODER.decode(text)
        check_value(value, text, 0, len(text))
    except UnicodeDecodeError as error:
        seen = f"byte {error.start + 1} of the line: {error.reason}"
        raise wrong("not UTF-8", reason="not UTF-8", seen=seen, change="save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        change = f"if {label} is one JSON array, rename it to .json" if line.startswith(b"[") else None
        if line == b"{":
            change = f"if the objects of {label} span several lines, rename it to .json"
        is_incomplete = error.pos >= len(text) or error.msg.startswith("Unterminated string")
        raise (_CutOffError if is_incomplete and len(line) > 1 else RowError)(
            f"{where}: not valid JSON",
            reason=NOT_JSON,
            seen=f"{error.msg}, column {error.colno}: {text_around(error.doc, error.pos)}",
            allowed="one complete object on each line",
            change=change,
        ) from None
    except ValueError as error:
        raise wrong("not valid JSON", seen=in_words(error)) from None
    except RecursionError:
        raise wrong("nested too deeply", reason="nested too deeply", allowed=ALLOWED_DEPTH) from None
    if isinstance(value, list) and chat_key(value) is None and not (value and isinstance(value[0], str)):
        what, change = "an array, not an object", f"if {label} is one JSON array, rename it to .json"
        raise wrong(what, reason=what, change=change)
    return row_of(value, where)


def read_json(stream: BinaryIO, label: str, left_out: LeftOut, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Yield the rows of a JSON file.

    Read are an array of objects, record by record; one object per line, which is often named .json; one array per line,
    each of them a chat; and one object that holds the rows (`json_layouts.py`).
    """
    text = JsonWindow(stream, label)
    first = text.skip()
    if first == "{":
        yield from _objects(text, label, left_out, on_bad_row)
    elif first != "[":
        raise InputError(
            f"{label}: not a JSON array", seen=repr(first) if first else "only whitespace", allowed="[{...}, {...}]"
        )
    elif text.begins_with_message():
        yield from _chats(text, label, on_bad_row)
    else:
        yield from _rows_of_array(text, label, label, on_bad_row)
        if text.skip():
            rest = text.buffer[text.position : text.position + 40]
            raise InputError(
                f"{label}:{text.line}: extra content after the end of the array",
                seen=repr(rest),
                allowed="one array: [{...}, {...}]",
            )


def _rows_of_array(text: JsonWindow, label: str, place: str, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Yield the rows of the array that begins at the position, and step over its end."""
    text.take("[")
    for index in range(1 << 62):
        if text.skip() == "]":
            text.take("]")
            return
        if index and not text.take(","):
            raise text.broken(index, "Expecting ',' or ']'", text.position)
        text.skip()
        where = f"{place}[{index}]"
        try:
            row = Row(where, row_of(text.record(index), where))
        except RowError as error:
            on_bad_row(error)
        else:
            yield row


def _chats(text: JsonWindow, label: str, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Arrays of messages: several are a chat each; of a single one each message is a row, as it may be many chats."""
    line = text.line
    try:
        messages = text.record(0)
    except TooLongError:  # rows with the keys of a message
        yield from _rows_of_array(text, label, label, on_bad_row)
        return
    if not text.skip():
        yield from (Row(f"{label}[{index}]", row_of(one, f"{label}[{index}]")) for index, one in enumerate(messages))
        return
    number = 0
    while True:
        try:
            row = Row(f"{label}:{line}", row_of(messages, f"{label}:{line}"))
        except RowError as error:
            on_bad_row(error)
        else:
            yield row
        if not text.skip():
            return
        number, line = number + 1, text.line
        messages = text.record(number)


def _objects(text: JsonWindow, label: str, left_out: LeftOut, on_bad_row: OnBadRow) -> Iterator[Row]:
    index = last_line = 0
    while text.skip():
        line = text.line
        if line == last_line:
            raise InputError(
                f"{label}:{line}: a second object on the line",
                seen=repr(text.buffer[text.position : text.position + 40]),
                allowed="[{...}, {...}], or one object on each line, ended by \\n",
            )
        where = f"{label}:{line}"
        try:
            values = text.record(index)
        except TooLongError:
            if index:
                raise
            yield from _large_object(text, label, left_out, on_bad_row)
            return
        last_line = text.line
        if not index and isinstance(values, dict) and not text.skip():
            yield from document_rows(values, label, where, left_out, on_bad_row)
            return
        try:
            row = Row(where, row_of(values, where))
        except RowError as error:
            on_bad_row(error)
        else:
            yield row
        index += 1


def _large_object(text: JsonWindow, label: str, left_out: LeftOut, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Yield the rows of an object larger than a row may be: of its only list, or of its list `train`, one at a time."""
    text.take("{")
    found = None
    while text.skip() != "}":
        key = text.record(0)
        if not isinstance(key, str) or text.skip() != ":":
            raise text.broken(0, "Expecting a key and ':'", text.position)
        text.take(":")
        is_list = text.skip() == "["
        if is_list and key not in ROW_KEYS and (key not in SPLIT_NAMES or key == "train"):
            if found is not None:
                chosen_list([found, key], {}, label)
            found = key
            yield from _rows_of_array(text, label, f"{label}:{key}", on_bad_row)
        elif is_list:
            num_left = sum(1 for _ in _rows_of_array(text, label, f"{label}:{key}", on_bad_row))
            left_out.beside_rows[f"{label}: {key} ({num_left:,} items)"] += 1
        else:
            text.record(0)
            left_out.beside_rows[f"{label}: {key}"] += 1
        text.skip()
        if not text.take(",") and text.skip() != "}":
            raise text.broken(0, "Expecting ',' or '}'", text.position)
    text.take("}")
    if found is None:
        raise text.too_long(0, "save the rows as a list, or one object on each line")
