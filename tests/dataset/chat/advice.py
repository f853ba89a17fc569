"""Do what a message advises: take its `column_mapping`, and read the row again."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from solotune.dataset.chat.formats import Record, convert, recognise
from solotune.dataset.readers.column_mapping import check_mapping, mapped
from solotune.dataset.readers.row import Row
from solotune.errors import InputError
from tests.dataset.conftest import config_of

_MAPPING = r'column_mapping: (\{(?:"(?:[^"\\]|\\.)*"|[^{}"])*\})'


def read(values: dict[str, Any], mapping: dict[str, str] | None = None) -> Record | str:
    """Convert a row as `data` does, with a `column_mapping` that the config and the file accept."""
    row = Row("f.jsonl:1", values)
    mapping = config_of("f.jsonl", column_mapping=mapping or {}).column_mapping
    check_mapping([row], mapping)
    row = mapped(row, mapping)
    return convert(row, recognise([row])[0])


def refused(values: dict[str, Any], mapping: dict[str, str] | None = None) -> str:
    """The message for a row; the first mapping in it is also the value that the error carries."""
    with pytest.raises(InputError) as caught:
        read(values, mapping)
    said, carried = mappings_in(str(caught.value)), [one.settings["column_mapping"] for one in caught.value.advice]
    assert said[:1] == carried
    return str(caught.value)


def mappings_in(message: str) -> list[dict[str, str]]:
    """The mappings that a message advises."""
    return [yaml.safe_load(found) for found in re.findall(_MAPPING, message)]


def after_advice(values: dict[str, Any], mapping: dict[str, str] | None = None, number: int = 0) -> Record:
    """The row, read with the mapping of this number in the message that refused it."""
    record = read(values, mappings_in(refused(values, mapping))[number])
    assert isinstance(record, Record)
    return record
