"""Read rows of JSON text record by record: one object per line (jsonl), or one array of objects (json).

Parsing is strict: a duplicate key, NaN, an infinity or a lone surrogate is an error here, where the line is known, and
not a wrong row or a bare TypeError later. Lines end at `\\n` only: `str.splitlines` also splits at U+2028 and U+0085,
which are legal inside a JSON string, and would turn one row into two.

An array is read through a window of 1 MiB that grows to the largest record, so a file larger than memory can be
sliced, and the error for a file that is cut off names the record and line.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

from solotune.dataset.readers.row import CHUNK_BYTES, MAX_ROW_BYTES, Row, lines
from solotune.errors import InputError

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_BLANKS = re.compile(r"[ \t\r\n]*")
_LONGEST_TOKEN = 16  # characters: a number's, an escape's or a name's part at the end of the window may be cut
MAX_DEPTH = 100  # the deepest values in real data are JSON schemas of tools, rarely above 20
_ALLOWED_DEPTH = f"{MAX_DEPTH} levels of lists and objects"


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


def read_jsonl(stream: BinaryIO, label: str) -> Iterator[Row]:
    """Yield one object per line; blank lines are skipped."""
    for number, line in lines(stream, label):
        where = f"{label}:{number}"
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        line = line.removesuffix(b"\n").removesuffix(b"\r").strip(b" \t")
        if line:
            yield Row(where, _object(where, label, line))


def _object(where: str, label: str, line: bytes) -> dict[str, Any]:
    """Parse one line of JSON as a dict."""
    if b"\r" in line:
        raise InputError(f"{where}: a carriage return inside the line", change="end lines with \\n or \\r\\n")
    try:
        text = line.decode()
        value = _DECODER.decode(text)
        _check(value, text, 0, len(text))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8", seen=f"byte {error.start + 1} of the line: {error.reason}") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not valid JSON",
            seen=f"{error.msg}, column {error.colno}: {_around(error.doc, error.pos)}",
            allowed="one complete object on each line",
            change=f"if {label} is one JSON array, rename it to .json" if line.startswith(b"[") else None,
        ) from None
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON", seen=_in_words(error)) from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply", allowed=_ALLOWED_DEPTH) from None
    if isinstance(value, list):
        raise InputError(
            f"{where}: an array, not an object", change=f"if {label} is one JSON array, rename it to .json"
        )
    if not isinstance(value, dict):
        raise InputError(f"{where}: not an object", seen=line[:60].decode(), allowed='{"messages": [...]}')
    return value


def _around(text: str, position: int) -> str:
    """The text around a position, without the lines before it."""
    return repr(text[max(0, position - 20, text.rfind("\n", 0, position) + 1) : position + 20])


def read_json(stream: BinaryIO, label: str) -> Iterator[Row]:
    """Yield the objects of an array, record by record; also accepts one object per line, which is often named .json."""
    text = _Text(stream, label)
    first = text.skip()
    if first == "{":
        yield from _json_lines(text, label)
        return
    if first != "[":
        raise InputError(
            f"{label}: not a JSON array", seen=repr(first) if first else "only whitespace", allowed="[{...}, {...}]"
        )
    text.position += 1
    for index in range(1 << 62):
        if text.skip() == "]":
            text.take("]")
            if text.skip():
                rest = text.buffer[text.position : text.position + 40]
                raise InputError(
                    f"{label}:{text.line}: extra content after the end of the array",
                    seen=repr(rest),
                    allowed="one array: [{...}, {...}]",
                )
            return
        if index and not text.take(","):
            raise text.broken(index, "Expecting ',' or ']'", text.position)
        text.skip()
        values = text.record(index)
        if not isinstance(values, dict):
            raise InputError(f"{label}[{index}]: not an object", seen=repr(values)[:60], allowed='{"messages": [...]}')
        yield Row(f"{label}[{index}]", values)


def _json_lines(text: _Text, label: str) -> Iterator[Row]:
    index = last_line = 0
    while text.skip():
        line = text.line
        if line == last_line:
            raise InputError(
                f"{label}:{line}: a second object on the line",
                seen=repr(text.buffer[text.position : text.position + 40]),
                allowed="[{...}, {...}], or one object on each line, ended by \\n",
            )
        values = text.record(index)
        if not isinstance(values, dict):
            raise InputError(f"{label}:{line}: not an object", seen=repr(values)[:60], allowed='{"messages": [...]}')
        last_line = text.line
        is_alone = not index and not text.skip()
        key = next((key for key, value in values.items() if isinstance(value, list)), None)
        if is_alone and len(values) == 1 and key not in (None, "messages", "conversations"):
            raise InputError(
                f"{label}: one object, not a list of rows",
                seen=f"an object with the key {key}",
                allowed="[{...}, {...}], or one object on each line",
                change=f"save only the list under {key}",
            )
        yield Row(f"{label}:{line}", values)
        index += 1


class _Text:
    """A window of decoded text over a stream, with the current line number; grows to one record, not to the file."""

    def __init__(self, stream: BinaryIO, label: str) -> None:
        self._stream, self._label = stream, label
        self._undecoded, self._num_bytes = b"", 0
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
        self._line = self.line
        self.buffer, self.position, self._counted = self.buffer[self.position :] + text, 0, 0
        return bool(raw)

    def skip(self) -> str:
        """Skip whitespace; return the next character, or an empty string at the end of the file."""
        while True:
            if blanks := _BLANKS.match(self.buffer, self.position):
                self.position = blanks.end()
            if self.position < len(self.buffer):
                return self.buffer[self.position]
            if not self._more(CHUNK_BYTES):
                return ""

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
                    raise InputError(
                        f"{self._label}:{self.line}: record {index + 1} is too long",
                        allowed=f"{MAX_ROW_BYTES >> 20} MiB",
                    ) from None
                if not is_cut:
                    raise self.broken(index, error.msg, error.pos) from None
                begin = self.position
                if not self._more(size):
                    raise self.broken(index, error.msg, error.pos - begin) from None
                size *= 2
            except ValueError as error:
                raise self.broken(index, _in_words(error), self.position) from None
            except RecursionError:
                raise self.broken(index, f"nested deeper than {_ALLOWED_DEPTH}", self.position) from None
            else:
                self.position = end
                return value

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
