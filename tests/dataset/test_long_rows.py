"""Rows far longer than max_length: the same ids as from the whole text, without tokenising it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solotune.dataset import Prepared, long_rows, prepare
from solotune.dataset.chat.answer_spans import Rendered
from solotune.dataset.chat.encode import Encoder
from solotune.dataset.chat.formats import Record
from solotune.dataset.readers.row import RowError
from solotune.dataset.records import row_hash
from solotune.errors import InputError
from tests.dataset.conftest import Writer, chat, config_of, tiny_tokenizer

CHATML = tiny_tokenizer("chatml")
LONG = "What is the capital of France? " * 3000  # 93,000 characters
ROWS: list[dict[str, Any]] = [
    {"messages": chat("a", "b")},
    {"messages": chat("long answer", LONG)},
    {"messages": chat("many", *(["x", "word " * 900] * 40), "y")},
    {"text": LONG},
    {"prompt": "p" * 300, "completion": LONG},
]


@pytest.fixture(autouse=True)
def bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_rows, "SHORT_ROW", 1000)
    monkeypatch.setattr(long_rows, "LONGEST_ROW", 40_000)


def prepared(path: Path, **keys: Any) -> Prepared:
    return prepare(config_of(path, **{"max_length": 400, **keys}), CHATML)


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("keys", [{}, {"assistant_only_loss": False}, {"train_on_last_turn": False}])
def test_the_same_tokens_as_from_the_whole_row(
    write: Writer, monkeypatch: pytest.MonkeyPatch, number: int, keys: dict[str, Any]
) -> None:
    path = write("a.jsonl", ROWS[number])
    longest: list[int] = []
    encode = Encoder.encode

    def noted(self: Encoder, rows: Any, places: Any) -> Any:
        longest.append(max(len(row.text) for row in rows))
        return encode(self, rows, places)

    monkeypatch.setattr(Encoder, "encode", noted)
    (cut,) = prepared(path, **keys).train
    monkeypatch.setattr(long_rows, "SHORT_ROW", 1 << 30)
    (whole,) = prepared(path, **keys).train
    assert np.array_equal(cut.input_ids, whole.input_ids)
    assert np.array_equal(cut.loss_mask, whole.loss_mask)
    assert longest[0] <= 20_000
    assert number == 0 or longest[1] > 90_000


def test_it_is_counted_and_said(write: Writer) -> None:
    report = prepared(write("a.jsonl", *ROWS[:3])).report
    assert (report.num_cut_as_text, report.num_truncated) == (2, 2)
    assert report.to_json()["rows"]["cut_as_text"] == 2
    assert report.notes()["very long"].startswith("2 rows tokenised only at the beginning")
    assert report.to_json()["labels"]["answers"] == 1 + 1 + 41


def test_other_ways_with_long_rows(write: Writer) -> None:
    path = write("a.jsonl", *ROWS[:2])
    assert prepared(path, overflow="drop").report.dropped == {"longer than max_length": 1}
    with pytest.raises(InputError, match=r"longer than max_length, and overflow is error"):
        prepared(path, overflow="error")
    with pytest.raises(RowError, match=r"a.jsonl:2: the row is too long to be tokenised as a whole") as caught:
        prepared(path, overflow="split")
    change = "write it as several rows, or set overflow: truncate; or on_bad_row: drop leaves out this row"
    assert caught.value.change == change
    with pytest.raises(RowError, match=r"too long to be tokenised as a whole"):
        prepared(path, max_length=1_000_000)
    assert prepared(path, max_length=1_000_000, on_bad_row="drop").report.num_kept == 1


def test_rows_that_are_short_enough_are_split(write: Writer) -> None:
    path = write("a.jsonl", {"messages": chat("a", LONG[:30_000])})
    report = prepared(path, overflow="split").report
    assert (report.num_split, report.num_cut_as_text) == (1, 0)


def test_a_long_rendering_of_short_messages_is_cut_too(write: Writer) -> None:
    arguments = {"a": "word " * 20_000}
    calls = [{"function": {"name": "f", "arguments": arguments}}]
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x", "tool_calls": calls}]}
    qwen3 = tiny_tokenizer("qwen3")
    result = prepare(config_of(write("a.jsonl", row), max_length=400), qwen3)
    assert result.report.num_cut_as_text == 1
    assert len(result.train[0].input_ids) == 400


@pytest.mark.parametrize("is_chat", [True, False])
def test_a_cut_rendering_is_of_the_same_kind(is_chat: bool) -> None:
    rows = long_rows.LongRows(config_of("a.jsonl", max_length=400).rendering, CHATML)
    found = rows.cut(Rendered(LONG, [], [(0, len(LONG))], is_chat=is_chat), "a.jsonl:1")
    assert (found.is_chat, len(found.text) < len(LONG)) == (is_chat, True)


def test_a_very_long_text_is_hashed_in_pieces() -> None:
    def hashed(text: str) -> bytes:
        return row_hash(Record("f:1", text=text))

    long = "Word " * 300_000
    assert hashed(long) == hashed(long.lower())
    assert len({hashed(long), hashed(long[:-5] + "other"), hashed(long[5:])}) == 3
