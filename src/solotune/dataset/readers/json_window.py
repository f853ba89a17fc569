"""Parse JSON strictly, in one text or through a window over a stream.

A duplicate key, NaN, an infinity or a lone surrogate is an error here, where the line is known, and not a wrong row or
a bare TypeError later. The window is 1 MiB and grows to the largest record, so a file larger than memory can be sliced,
and the error for a file that is cut off names the record and line.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, BinaryIO, NoReturn

from solotune.dataset.readers.row import CHUNK_BYTES, MAX_ROW_BYTES
from solotune.errors import InputError

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_BLANKS = re.compile(r"[ \t\r\n]*")
_LONGEST_TOKEN = 16  # characters: a number's, an escape's or a name's part at the end of the window may be cut
MAX_DEPTH = 100  # the deepest values in real data are JSON schemas of tools, rarely above 20
ALLOWED_DEPTH = f"{MAX_DEPTH} levels of lists and objects"
LARGE_CHARACTERS = 4 << 20
MAX_VALUES = 2 << 20
"""Most lists, objects and keys in a row: 64 MiB of brackets would become 2 GB of objects."""


class TooLongError(InputError):
    """A record is larger than a row may be."""


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


DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_no_constant)


def check_value(value: Any, text: str, begin: int, end: int) -> None:
    """Refuse a lone surrogate, which would be a bare TypeError in the tokenizer, and values nested too deeply."""
    if _SURROGATE_ESCAPE.search(text, begin, end):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise _Fault(f"a lone surrogate ({error.object[error.start]!r}) is not text") from None
    if text.count("[", begin, end) + text.count("{", begin, end) > MAX_DEPTH:
        _check_depth(value)


def check_size(text: str, where: str, begin: int = 0) -> None:
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


def in_words(error: ValueError) -> str:
    # the decoder's only other ValueError contains advice for programmers
    return str(error) if isinstance(error, _Fault) else "an integer of more than 4,300 digits"


def parse_json(text: str) -> Any:
    """Parse one JSON value in a text, as strictly as a file.

    Raises:
        ValueError: its message describes the mistake.
    """
    try:
        value = DECODER.decode(text)
        check_value(value, text, 0, len(text))
    except RecursionError:
        raise _Fault(f"nested deeper than {ALLOWED_DEPTH}") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise _Fault(in_words(error)) from None
    return value


def text_around(text: str, position: int) -> str:
    """The text around a position, without the lines before it."""
    return repr(text[max(0, position - 20, text.rfind("\n", 0, position) + 1) : position + 20])


class JsonWindow:
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
            value, _ = DECODER.raw_decode(self.buffer, first.end() if first else self.position)
        except (ValueError, RecursionError):
            return False  # the reader says what is wrong
        return isinstance(value, dict) and not _MESSAGE_KEYS.isdisjoint(value) and ("role" in value or "from" in value)

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
                value, end = DECODER.raw_decode(self.buffer, self.position)
                check_value(value, self.buffer, self.position, end)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self.buffer) - _LONGEST_TOKEN
                if is_cut and len(self.buffer) - self.position > MAX_ROW_BYTES:
                    raise self.too_long(index) from None
                if not is_cut:
                    raise self.broken(index, error.msg, error.pos) from None
                begin = self.position
                if not self._more(size):
                    raise self.broken(index, error.msg, error.pos - begin) from None
                check_size(self.buffer, f"{self._label}: record {index + 1}")
                size *= 2
            except ValueError as error:
                raise self.broken(index, in_words(error), self.position) from None
            except RecursionError:
                raise self.broken(index, f"nested deeper than {ALLOWED_DEPTH}", self.position) from None
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
                change=f"download the complete file, or keep its first {index:,} records",
            )
        column = position - self.buffer.rfind("\n", 0, position)
        return InputError(
            f"{self._label}:{line}: not valid JSON in record {index + 1}",
            seen=f"{problem}, column {column}: {text_around(self.buffer, position)}",
            allowed="an array of objects: [{...}, {...}]",
        )
