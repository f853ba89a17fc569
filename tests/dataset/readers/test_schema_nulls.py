"""Nulls that the schema of a parquet or arrow file forced are dropped and counted; nulls that somebody wrote stay."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from solotune.dataset.readers.schema_nulls import SchemaNulls
from solotune.dataset.readers.source import Source
from tests.dataset.conftest import Door, chat


def calling(arguments: Any, **properties: Any) -> dict[str, Any]:
    """A row whose answer is a call, with a tool of these properties."""
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    function = {"name": "f", "parameters": {"type": "object", "properties": properties or {"x": {"type": "string"}}}}
    return {"messages": messages, "tools": [{"type": "function", "function": function}]}


def calls(rows: list[Any]) -> list[Any]:
    return [row.values["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in rows]


def written(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> Source:
    table = pa.Table.from_pylist(rows, schema)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    return Source.of("dataset", str(path), "train")


TWO = [
    calling({"day": "Monday"}, day={"type": "string"}),
    calling({"town": "Rome"}, town={"type": "string", "enum": ["Rome"]}),
    calling({}, town={"type": "string", "enum": ["Rome"]}),
]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_rows_come_back_as_they_were_written(tmp_path: Path, name: str) -> None:
    source = written(tmp_path / name, TWO)
    rows = list(source)
    assert [row.values for row in rows] == TWO
    assert source.left_out.schema_nulls == {
        "messages": 3,  # the user's tool_calls
        "messages.tool_calls.function.arguments": 4,
        "tools.function.parameters": 3,  # a property in each row
    }
    assert list(source) == rows
    assert source.left_out.schema_nulls.total() == 10, "a second pass starts at zero"


def test_they_are_named_for_a_person_and_in_data_json(door: Door) -> None:
    written(Path("a.parquet"), TWO)
    found = door("a.parquet", family="qwen3")
    assert found.content["schema_nulls"]["messages.tool_calls.function.arguments"] == 4
    text = door.text("a.parquet")
    assert "10 nulls dropped" in text
    assert "4 in messages.tool_calls.function.arguments" in text
    shown = "".join(piece for piece, _, _ in found.content["shown"][0]["pieces"])
    assert '"arguments": {"day": "Monday"}' in shown


def test_nulls_that_somebody_wrote_stay(tmp_path: Path) -> None:
    real = {"town": None, "tags": [None, "a"]}
    assert calls(list(written(tmp_path / "text.parquet", [calling(json.dumps(real))]))) == [json.dumps(real)]
    rows = [calling({"query": "a", "filter": None}), calling({"query": "b", "filter": None})]
    assert calls(list(written(tmp_path / "never.parquet", rows))) == [
        row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in rows
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps(calling(real)) + "\n")
    assert calls(list(Source.of("dataset", str(tmp_path / "a.jsonl"), "train"))) == [real]


def test_a_default_that_is_null_in_every_row_stays_and_one_among_forced_nulls_goes(tmp_path: Path) -> None:
    unit = {"type": "string", "default": None}
    (row,) = list(written(tmp_path / "a.parquet", [calling({"x": 1}, unit=unit)]))
    assert row.values["tools"][0]["function"]["parameters"]["properties"] == {"unit": unit}
    rows = list(written(tmp_path / "b.parquet", [calling({"x": 1, "y": None}), calling({"z": 2})]))
    assert calls(rows) == [{"x": 1}, {"z": 2}]


def test_a_map_is_an_object_and_its_nulls_are_data(tmp_path: Path) -> None:
    arguments = pa.map_(pa.string(), pa.string())
    function = pa.struct([("name", pa.string()), ("arguments", arguments)])
    message = pa.struct(
        [("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(pa.struct([("function", function)])))]
    )
    call = [{"function": {"name": "f", "arguments": [("town", None), ("day", "Monday")]}}]
    rows = [{"messages": [*chat("a"), {"role": "assistant", "content": "", "tool_calls": call}]}]
    source = written(tmp_path / "a.parquet", rows, pa.schema([("messages", pa.list_(message))]))
    assert calls(list(source)) == [{"town": None, "day": "Monday"}]


def test_content_parts_and_objects_in_maps(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image", "url": "u"}]
    (row,) = list(written(tmp_path / "a.parquet", [{"messages": [{"role": "user", "content": parts}]}]))
    assert row.values == {"messages": [{"role": "user", "content": parts}]}
    kind = pa.map_(pa.string(), pa.struct([("type", pa.string()), ("enum", pa.list_(pa.string()))]))
    counts: Counter[str] = Counter()
    values = SchemaNulls(pa.schema([("tools", kind)]), counts).drop(
        {"tools": {"a": {"type": "x", "enum": None}, "b": None}}
    )
    assert (values, counts) == ({"tools": {"a": {"type": "x"}, "b": None}}, {"tools": 1})


def test_rows_of_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(TWO))
    source = Source.of("dataset", "owner/calls", "train")
    assert [row.values for row in source] == TWO
    assert source.left_out.schema_nulls["messages.tool_calls.function.arguments"] == 4
