"""Bounds of what is parsed at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from solotune.dataset.readers import json_window
from solotune.dataset.readers.source import Source
from solotune.errors import InputError
from tests.dataset.conftest import Writer


def rows_of(path: Path, split: str = "train") -> list[dict[str, Any]]:
    return [row.values for row in Source.of("dataset", str(path), split)]


def test_too_many_values_are_refused_before_they_are_parsed(write: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_window, "LARGE_CHARACTERS", 2000)
    monkeypatch.setattr(json_window, "MAX_VALUES", 500)
    monkeypatch.setattr(json_window, "CHUNK_BYTES", 300)
    bomb = {"text": "a", "b": [[]] * 600}
    good = [{"text": "[" * 20 + "a" * n} for n in range(20)]
    for name, text in (
        ("a.jsonl", "".join(json.dumps(row) + "\n" for row in [*good, bomb])),
        ("a.json", json.dumps([*good, bomb])),
        ("b.json", json.dumps([{"text": "a" * 9000}, *good, bomb])),
    ):
        with pytest.raises(InputError, match=r"too many values in one row"):
            rows_of(write(name, text))
        assert len(rows_of(write(name, text), "train[:20]")) == 20
