"""CSV with any usual delimiter; tables whose rows are larger than the file says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from solotune.dataset.readers import tables
from solotune.dataset.readers.row import RowError
from solotune.dataset.readers.source import Source
from solotune.errors import InputError
from tests.dataset.conftest import Writer


def rows_of(path: Path) -> list[tuple[str, dict[str, Any]]]:
    return [(row.where, row.values) for row in Source.of("dataset", str(path), "train")]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters(write: Writer, name: str, delimiter: str) -> None:
    text = 'prompt;completion\r\nHow many, of 3?;"3; all\nof them"\r\n"a ""b""";c\r\n'.replace(";", delimiter)
    text = text.replace("many,", '"many') if delimiter == "," else text
    text = text.replace('How "many of 3?', "How many of 3?")
    many = "How many of 3?" if delimiter == "," else "How many, of 3?"
    assert rows_of(write(name, text)) == [
        (f"{name}:2", {"prompt": many, "completion": f"3{delimiter} all\nof them"}),
        (f"{name}:4", {"prompt": 'a "b"', "completion": "c"}),
    ]


def test_the_usual_delimiter_wins_and_excels_first_line_says_it(write: Writer) -> None:
    assert rows_of(write("a.csv", "a;b,c\n1;2,3\n")) == [("a.csv:2", {"a;b": "1;2", "c": "3"})]
    assert rows_of(write("a.csv", "text\na;b\n")) == [("a.csv:2", {"text": "a;b"})]
    assert rows_of(write("a.csv", "sep=;\r\na;b,c\r\n1;2,3\r\n")) == [("a.csv:3", {"a": "1", "b,c": "2,3"})]


def test_a_wrong_number_of_cells_is_a_bad_row(write: Writer) -> None:
    path = write("a.csv", "a;b\n1;2;3\n4;5\n6\n")
    with pytest.raises(RowError, match=r"a.csv:2: 3 cells, but the header has 2") as caught:
        rows_of(path)
    assert caught.value.change == "quote cells that contain a semicolon or a line break"
    source = Source.of("dataset", str(path), "train")
    found: list[RowError] = []
    source.on_bad_row = found.append
    assert [row.values for row in source] == [{"a": "4", "b": "5"}]
    assert (len(found), source.num_bad) == (2, 2)


def test_bounds_of_a_csv(write: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_ROW_BYTES", 200)
    monkeypatch.setattr(tables, "MAX_COLUMNS", 5)
    assert len(rows_of(write("a.csv", "text\n" + ("x" * 99 + "\n") * 9))) == 9
    with pytest.raises(InputError, match=r"the record is too long"):
        rows_of(write("a.csv", "text,b\n" + '"a\n","b\n",' * 99))
    with pytest.raises(InputError, match=r"too many columns"):
        rows_of(write("a.csv", ",".join(map(str, range(9))) + "\n"))


def test_rows_far_larger_than_the_file_are_read_few_at_a_time(tmp_path: Path) -> None:
    text = "x" * (8 << 20)
    pq.write_table(pa.table({"text": [text] * 60}), tmp_path / "a.parquet", dictionary_pagesize_limit=1 << 28)
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
    before = pa.total_allocated_bytes()
    for number, row in enumerate(Source.of("dataset", str(tmp_path / "a.parquet"), "train[:12]")):
        assert row.values["text"] == text
        assert pa.total_allocated_bytes() - before < 300 << 20, number
    pq.write_table(pa.table({"text": [json.dumps(n) * 40 for n in range(300)]}), tmp_path / "b.parquet")
    assert tables._num_batch_rows(pq.read_metadata(tmp_path / "b.parquet")) == 128


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_row_that_is_too_long_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(tables, "MAX_ROW_BYTES", 1000)
    table = pa.table({"text": ["a", "b" * 2000, "c"]})
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_file(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(RowError, match=r"\[1\]: the row is too long"):
        rows_of(tmp_path / name)
