"""Keys that nothing reads: counted for the report, so that none is dropped without a word.

    not used: thinking_time in 24 of 24 assistant messages, category in 24 of 24 rows

A key counts if it holds something: null, blank texts and empty lists lose nothing. Known keys are read or refused by
the readers; this module only asks them which keys they read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from solotune.dataset.chat import columns, weights
from solotune.dataset.chat import messages as msg
from solotune.dataset.chat.formats import Format
from solotune.dataset.chat.tool_calls import CALL_ID_KEYS, CALL_KEYS, arguments_holder, arguments_key, function_of
from solotune.dataset.readers.json_window import parse_json
from solotune.dataset.readers.row import CONVERSATION_KEYS, ID_KEYS, PARENT_KEYS, Row, is_blank

_LINKS = frozenset((*ID_KEYS, *CONVERSATION_KEYS, *PARENT_KEYS))
_BY_VALUE = _LINKS | frozenset(weights.ROW_KEYS)
"""Columns that are read only if their value is an identifier, or a switch."""
_PLACES = {name: f"{role} messages" for name, role in msg.SHAREGPT_ROLES.items()}
_MOST_NAMES = 500  # keys that are counted by name; a file may have a new one in each row
_LONGEST = 60  # characters of a key
_OTHERS = "other keys"


class UnusedKeys:
    """Counts of keys that nothing reads, by where they are."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._totals: Counter[str] = Counter()

    def add(self, row: Row, found: Format, also_read: str | None = None) -> None:
        """Count the keys of a row that its format has converted.

        Args:
            also_read: one more key of the row that is read.
        """
        values = row.values
        self._totals["rows"] += 1
        always_read = _always_read(found.reads)
        for key in values:
            if key in always_read or key == also_read:
                continue
            if not _is_read(key, values[key], found) and not is_blank(values[key]):
                self._count("rows", key)
        for key in (*found.keys, *columns.given(row, "history")):
            turns = msg.chat_list(values[key])
            if isinstance(turns, list):
                for turn in turns:
                    self._add_message(turn)

    def _add_message(self, message: Any) -> None:
        if not isinstance(message, dict):
            return
        message, keys = msg.in_our_case(message)
        name = message[keys.role].lower()
        place = _PLACES[name]
        self._totals[place] += 1
        for key in keys.others:
            if not is_blank(message[key]):
                self._count(place, key)
        content = message.get(keys.content)
        if name in msg.CALL_ROLES:
            self._add_calls(content)
        elif isinstance(content, list):
            for part in content:
                self._add("content parts", part, msg.keys_of_part(part) if isinstance(part, dict) else ())
        if not keys.is_plain:
            for key in CALL_KEYS:
                self._add_calls(message.get(key))

    def _add_calls(self, written: Any) -> None:
        calls = parse_json(written) if isinstance(written, str) and written else written
        for call in calls if isinstance(calls, list) else [calls]:
            if isinstance(call, dict):
                self._add_call(call)

    def _add_call(self, call: dict[str, Any]) -> None:
        function = function_of(call)
        own = ("name", arguments_key(call)) if function is call else ()
        own = (*own, "arguments") if arguments_holder(call) is call else own
        self._add("tool calls", call, (*CALL_ID_KEYS, "type", "function", *own))
        if function is not call and isinstance(function, dict):
            self._add("functions of tool calls", function, ("name", arguments_key(function)))

    def _add(self, place: str, values: Any, read: Iterable[str]) -> None:
        if isinstance(values, dict):
            self._totals[place] += 1
            for key in sorted(values.keys() - set(read)):
                if not is_blank(values[key]):
                    self._count(place, key)

    def _count(self, place: str, key: Any) -> None:
        name = str(key)
        name = name if len(name) <= _LONGEST else name[: _LONGEST - 3] + "..."
        if (place, name) not in self._counts and len(self._counts) >= _MOST_NAMES:
            name = _OTHERS
        self._counts[place, name] += 1

    def to_json(self) -> list[dict[str, Any]]:
        """`[{"key": "lang", "in": "assistant messages", "count": 24, "of": 24}, ...]`, the most frequent first."""
        ordered = sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        return [
            {"key": key, "in": place, "count": number, "of": self._totals[place]} for (place, key), number in ordered
        ]


@lru_cache
def _always_read(names: frozenset[str]) -> frozenset[str]:
    return names.union(weights.WEIGHT_KEYS) - _BY_VALUE


def _is_read(key: str, value: Any, found: Format) -> bool:
    """Whether a column is read with this value, though its name alone does not say so."""
    if key in _LINKS:
        return isinstance(value, (str, int))
    if key in msg.MEDIA_KEYS:
        return found.name != "text"  # refused
    if key in weights.ROW_KEYS:
        return weights.truth_of(value) is not None
    meaning = columns.meaning_of(key)
    return meaning is not None and meaning in found.meanings
