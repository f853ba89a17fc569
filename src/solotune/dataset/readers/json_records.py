"""Read rows of JSON text record by record: one object per line (jsonl), or one array of objects (json).

Parsing is strict: a duplicate key, NaN, an infinity or a lone surrogate is an error here, where the line is known, and
not a wrong row or a bare TypeError later. Lines end at `\\n` only: `str.splitlines` also splits at U+2028 and U+0085,
which are legal inside a JSON string, and would turn one row into two.

An array is read through a window of 1 MiB that grows to the largest record, so a file larger than memory can be
sliced, and the error for a file that is cut off names the record and line. The file is long because the window and the
readers share its positions and messages.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NoReturn

from solotune.dataset.readers.json_layouts import (
    ROW_KEYS,
    SPLIT_NAMES,
    chat_key,
    chosen_list,
    document_rows,
    holds_rows,
    row_of,
)
from solotune.dataset.readers.left_out import LeftOut
from solotune.dataset.readers.row import CHUNK_BYTES, MAX_ROW_BYTES, Row, RowError, lines
from solotune.errors import InputError

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_BLANKS = re.compile(r"[ \t\r\n]*")
_LONGEST_TOKEN = 16  # characters: a number's, an escape's or a name's part at the end of the window may be cut
MAX_DEPTH = 100  # the deepest values in real data are JSON schemas of tools, rarely above 20
_ALLOWED_DEPTH = f"{MAX_DEPTH} levels of lists and objects"
LARGE_CHARACTERS = 4 << 20
MAX_VALUES = 2 << 20
"""Most lists, objects and keys in a row: 64 MiB of brackets would become 2 GB of objects."""

OnBadRow = Callable[[RowError], None]
"""Called with the error of a row that the rest of the file does not depend on; it raises the error, or counts it."""


class TooLongError(InputError):
    """A record is larger than a row may be."""


_NOT_JSON = "not valid JSON"
_MESSAGE_KEYS = frozenset(("content", "value", "tool_calls"))


class _Fault(ValueError):
    """A value that JSON allows but this reader refuses; caught where the place is known."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _Fault(f"the key {next(key for key in keys if keys.count(key) > 1)!r} appears twice in one object")
    return values


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise _Fault(f"{text} is not a finite number")
    return number


def _no_constant(text: str) -> NoReturn:
    raise _Fault(f"{text} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_no_constant)


def _check(value: Any, text: str, begin: int, end: int) -> None:
    """Refuse a lone surrogate, which would be a bare TypeError in the tokenizer, and values nested too deeply."""
    if _SURROGATE_ESCAPE.search(text, begin, end):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise _Fault(f"a lone surrogate ({error.object[error.start]!r}) is not text") from None
    if text.count("[", begin, end) + text.count("{", begin, end) > MAX_DEPTH:
        _check_depth(value)


def _check_size(text: str, where: str, begin: int = 0) -> None:
    """Refuse a large text of JSON that holds more values than a row ever does, before it is parsed.

    Raises:
        TooLongError: more than MAX_VALUES lists, objects and keys.
    """
    if len(text) - begin <= LARGE_CHARACTERS:
        return
    num_values = sum(text.count(mark, begin) for mark in ("[", "{", '":'))
    if num_values > MAX_VALUES:
        raise TooLongError(
            f"{where}: too many values in one row",
            seen=f"{num_values:,} lists, objects and keys",
            allowed=f"{MAX_VALUES:,}",
            change="write one row for each conversation",
        )


def _check_depth(value: Any) -> None:
    """Refuse values too deep for templates and `json.dumps`, which are recursive.

    Raises:
        RecursionError: more than MAX_DEPTH levels of lists and objects.
    """
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = [list(one.values()) if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        level = [item for items in inner for item in items]
        if not inner:
            return
    raise RecursionError


def _in_words(error: ValueError) -> str:
    # the decoder's only other ValueError contains advice for programmers
    return str(error) if isinstance(error, _Fault) else "an integer of more than 4,300 digits"


def parse_json(text: str) -> Any:
    """Parse one JSON value in a text, as strictly as a file.

    Raises:
        ValueError: its message describes the mistake.
    """
    try:
        value = _DECODER.decode(text)
        _check(value, text, 0, len(text))
    except RecursionError:
        raise _Fault(f"nested deeper than {_ALLOWED_DEPTH}") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise _Fault(_in_words(error)) from None
    return value


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
        is_cut = not line.endswith(b"\n")  # then the file is damaged, whatever is done about bad rows
        line = line.removesuffix(b"\n").removesuffix(b"\r").strip(b" \t")
        if line:
            try:
                row = Row(where, _row_of_line(where, label, line))
            except RowError as error:
                if is_cut and error.reason == _NOT_JSON:
                    change = "get the whole file, or remove its last line"
                    raise InputError(error.problem, seen=error.seen, allowed=error.allowed, change=change) from None
                on_bad_row(error)
            else:
                yield row


def _row_of_line(where: str, label: str, line: bytes) -> dict[str, Any]:
    """Parse one line of JSON as a row."""

    def wrong(problem: str, *, reason: str = _NOT_JSON, **parts: Any) -> RowError:
        return RowError(f"{where}: {problem}", reason=reason, **parts)

    if b"\r" in line:
        what = "a carriage return inside the line"
        raise wrong(what, reason=what, change="end lines with \\n or \\r\\n")
    try:
        text = line.decode()
        _check_size(text, where)
        value = _DECODER.decode(text)
        _check(value, text, 0, len(text))
    except UnicodeDecodeError as error:
        seen = f"byte {error.start + 1} of the line: {error.reason}"
        raise wrong("not UTF-8", reason="not UTF-8", seen=seen, change="save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        change = f"if {label} is one JSON array, rename it to .json" if line.startswith(b"[") else None
        if line == b"{":
            change = f"if the objects of {label} span several lines, rename it to .json"
        raise wrong(
            "not valid JSON",
            seen=f"{error.msg}, column {error.colno}: {_around(error.doc, error.pos)}",
            allowed="one complete object on each line",
            change=change,
        ) from None
    except ValueError as error:
        raise wrong("not valid JSON", seen=_in_words(error)) from None
    except RecursionError:
        raise wrong("nested too deeply", reason="nested too deeply", allowed=_ALLOWED_DEPTH) from None
    if isinstance(value, list) and chat_key(value) is None and not (value and isinstance(value[0], str)):
        what, change = "an array, not an object", f"if {label} is one JSON array, rename it to .json"
        raise wrong(what, reason=what, change=change)
    return row_of(value, where)


def _around(text: str, position: int) -> str:
    """The text around a position, without the lines before it."""
    return repr(text[max(0, position - 20, text.rfind("\n", 0, position) + 1) : position + 20])


def read_json(stream: BinaryIO, label: str, left_out: LeftOut, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Yield the rows of a JSON file.

    Read are an array of objects, record by record; one object per line, which is often named .json; one array per line,
    each of them a chat; and one object that holds the rows (`json_layouts.py`).
    """
    text = _Text(stream, label)
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


def _rows_of_array(text: _Text, label: str, place: str, on_bad_row: OnBadRow) -> Iterator[Row]:
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


def _chats(text: _Text, label: str, on_bad_row: OnBadRow) -> Iterator[Row]:
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


def _objects(text: _Text, label: str, left_out: LeftOut, on_bad_row: OnBadRow) -> Iterator[Row]:
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


def _large_object(text: _Text, label: str, left_out: LeftOut, on_bad_row: OnBadRow) -> Iterator[Row]:
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


class _Text:
    """A window of decoded text over a stream, with the current line number; grows to one record, not to the file."""

    def __init__(self, stream: BinaryIO, label: str) -> None:
        self._stream, self._label = stream, label
        self._undecoded, self._num_bytes = b"", 0
        self._ahead, self._num_used = "", 0  # text after the buffer
        self._line, self._counted = 1, 0
        self.buffer, self.position = "", 0
        self._more(CHUNK_BYTES)
        self.buffer = self.buffer.removeprefix("\ufeff")

    @property
    def line(self) -> int:
        """The line of `position`, counted from 1."""
        self._line += self.buffer.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._line

    def _more(self, size: int) -> bool:
        """Drop the text before `position` and read more; False at the end of the file."""
        if self._num_used < len(self._ahead):
            text = self._ahead[self._num_used : self._num_used + size]
            self._num_used += len(text)
            self._append(text)
            return True
        raw = self._stream.read(size)
        data = self._undecoded + raw
        try:
            text, self._undecoded = data.decode(), b""
        except UnicodeDecodeError as error:
            if not raw or error.reason != "unexpected end of data":
                line = self.line + self.buffer.count("\n", self.position) + data.count(b"\n", 0, error.start)
                place = self._num_bytes - len(self._undecoded) + error.start
                raise InputError(
                    f"{self._label}:{line}: not UTF-8", seen=f"byte {place + 1} of the file: {error.reason}"
                ) from None
            text, self._undecoded = data[: error.start].decode(), data[error.start :]
        self._num_bytes += len(raw)
        self._append(text)
        return bool(raw)

    def _append(self, text: str) -> None:
        self._line = self.line
        self.buffer, self.position, self._counted = self.buffer[self.position :] + text, 0, 0

    def skip(self) -> str:
        """Skip whitespace; return the next character, or an empty string at the end of the file."""
        while True:
            if blanks := _BLANKS.match(self.buffer, self.position):
                self.position = blanks.end()
            if self.position < len(self.buffer):
                return self.buffer[self.position]
            if not self._more(CHUNK_BYTES):
                return ""

    def begins_with_message(self) -> bool:
        """Whether the array at `position` begins with a message of a chat, whole in the window."""
        first = _BLANKS.match(self.buffer, self.position + 1)
        try:
            value, _ = _DECODER.raw_decode(self.buffer, first.end() if first else self.position)
        except (ValueError, RecursionError):
            return False  # the reader says what is wrong
        return chat_key([value]) is not None and not _MESSAGE_KEYS.isdisjoint(value)

    def take(self, character: str) -> bool:
        """Consume the character if it is the next one."""
        found = self.buffer.startswith(character, self.position)
        self.position += found
        return found

    def record(self, index: int) -> Any:
        """Parse the JSON value at `position`; while it is incomplete, read more, twice as much each time."""
        size = CHUNK_BYTES
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.position)
                _check(value, self.buffer, self.position, end)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self.buffer) - _LONGEST_TOKEN
                if is_cut and len(self.buffer) - self.position > MAX_ROW_BYTES:
                    raise self.too_long(index) from None
                if not is_cut:
                    raise self.broken(index, error.msg, error.pos) from None
                begin = self.position
                if not self._more(size):
                    raise self.broken(index, error.msg, error.pos - begin) from None
                _check_size(self.buffer, f"{self._label}: record {index + 1}")
                size *= 2
            except ValueError as error:
                raise self.broken(index, _in_words(error), self.position) from None
            except RecursionError:
                raise self.broken(index, f"nested deeper than {_ALLOWED_DEPTH}", self.position) from None
            else:
                self.position = end
                self._narrow()
                return value

    def _narrow(self) -> None:
        """Set aside what a large record has read too much, so that the next large record grows the window again."""
        if len(self.buffer) - self.position > 2 * LARGE_CHARACTERS:
            begin = self.position + LARGE_CHARACTERS
            self._ahead = self.buffer[begin:] + self._ahead[self._num_used :]
            self._num_used, self.buffer = 0, self.buffer[:begin]

    def too_long(self, index: int, change: str | None = None) -> TooLongError:
        """The error for record `index`, which is larger than a row may be."""
        return TooLongError(
            f"{self._label}:{self.line}: record {index + 1} is too long",
            allowed=f"{MAX_ROW_BYTES >> 20} MiB",
            change=change,
        )

    def broken(self, index: int, problem: str, position: int) -> InputError:
        """The error for record `index`, which starts at `self.position` and is wrong at `position` in the window."""
        at_the_end = position >= len(self.buffer.rstrip()) or problem.startswith("Unterminated string")
        begin = self.line
        line = begin + self.buffer.count("\n", self.position, len(self.buffer) if at_the_end else position)
        if at_the_end:
            return InputError(
                f"{self._label}:{line}: the file is cut off inside record {index + 1}, which starts in line {begin}",
                seen=f"{problem}; the file ends with {self.buffer.rstrip()[-40:]!r}",
                change=f"get the whole file, or keep its first {index:,} records",
            )
        column = position - self.buffer.rfind("\n", 0, position)
        return InputError(
            f"{self._label}:{line}: not valid JSON in record {index + 1}",
            seen=f"{problem}, column {column}: {_around(self.buffer, position)}",
            allowed="an array of objects: [{...}, {...}]",
        )
