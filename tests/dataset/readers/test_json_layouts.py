"""Rows inside one JSON object: wrapped, in columns, by index; what is beside them is named."""

from __future__ import annotations

import gzip
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

from solotune.dataset.readers import json_window
from solotune.dataset.readers.row import RowError
from solotune.dataset.readers.source import Source
from solotune.errors import InputError
from tests.dataset.conftest import Door, Writer, chat

ROWS: list[dict[str, Any]] = [{"messages": chat(f"What is {n}?", f"It is {n}."), "id": f"r{n}"} for n in range(12)]
NAMES = list(ROWS[0])
COLUMNS = {name: {str(n): row[name] for n, row in enumerate(ROWS)} for name in NAMES}
PAIRS = [{"q": f"q {n}", "a": f"a {n}"} for n in range(3)]

# layout -> the object, its rows, what is beside them
LAYOUTS: dict[str, tuple[Any, list[dict[str, Any]], list[str]]] = {
    "wrapped": ({"version": "1.0", "data": ROWS, "meta": {"n": [1, 2]}}, ROWS, ["version", "meta"]),
    "wrapped, other name": ({"conversation_list": ROWS}, ROWS, []),
    "wrapped, names that nobody knows": ({"items": PAIRS}, PAIRS, []),
    "wrapped twice": ({"ok": True, "result": {"page": 1, "items": ROWS}}, ROWS, ["ok", "result.page"]),
    "wrapped, beside a list of others": ({"tags": ["a", "b"], "authors": [{"name": "x"}], "rows": ROWS}, ROWS, ["tags (2 items)", "authors"]),
    "splits": ({"train": ROWS, "test": ROWS[:2]}, ROWS, ["test (2 items)"]),
    "one split": ({"validation": ROWS}, ROWS, []),
    "split of columns": ({"train": COLUMNS}, ROWS, []),
    "rows of the hub's API": ({"features": [1], "rows": [{"row_idx": n, "row": row, "truncated_cells": []} for n, row in enumerate(ROWS)]}, ROWS,
                              ["features", "rows.row_idx", "rows.truncated_cells"]),
    "pandas columns": (COLUMNS, ROWS, []),
    "pandas columns, one": ({"text": {"0": "a", "1": "b"}}, [{"text": "a"}, {"text": "b"}], []),
    "pandas columns, named rows": ({"text": {"x": "a", "y": "b"}}, [{"text": "a"}, {"text": "b"}], ["the names of the rows"]),
    "pandas columns, names that nobody knows": ({"q": {"0": "a", "1": "b"}, "a": {"0": "c", "1": "d"}},
                                                [{"q": "a", "a": "c"}, {"q": "b", "a": "d"}], []),
    "pandas index": ({str(n): row for n, row in enumerate(ROWS)}, ROWS, []),
    "by name": ({row["id"]: row for row in ROWS}, ROWS, ["the names of the rows"]),
    "pandas split": ({"columns": NAMES, "index": list(range(12)), "data": [[row[name] for name in NAMES] for row in ROWS]}, ROWS, ["index"]),
    "pandas table": ({"schema": {"fields": [{"name": "id"}]}, "data": ROWS}, ROWS, ["schema"]),
    "lists": ({name: [row[name] for row in ROWS] for name in NAMES}, ROWS, []),
    "lists of texts": ({"q": ["a", "b"], "a": ["c", "d"]}, [{"q": "a", "a": "c"}, {"q": "b", "a": "d"}], []),
    "chats without objects": ({"data": [row["messages"] for row in ROWS]}, [{"messages": row["messages"]} for row in ROWS], []),
    "a row": (ROWS[0], ROWS[:1], []),
    "a row with tools": ({**ROWS[0], "tools": [{"name": "f"}]}, [{**ROWS[0], "tools": [{"name": "f"}]}], []),
    "a row of a text": ({"text": "a", "spans": [{"begin": 0}]}, [{"text": "a", "spans": [{"begin": 0}]}], []),
    "a row of messages around an answer": ({"prompt": chat("a"), "completion": chat("a", "b")[1:]}, [{"prompt": chat("a"), "completion": chat("a", "b")[1:]}], []),
}  # fmt: skip


def read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    source = Source.of("dataset", str(path), "train")
    rows = [row.values for row in source]
    return rows, [name.removeprefix(f"{path.name}: ") for name in source.left_out.beside_rows]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(write: Writer, layout: str) -> None:
    value, rows, beside = LAYOUTS[layout]
    assert read(write("a.json", json.dumps(value, indent=1))) == (rows, beside)
    assert read(write("a.jsonl", json.dumps(value) + "\n")) == (rows, beside), "on the only line"
    assert read(write("a.json.gz", gzip.compress(json.dumps(value).encode()))) == (rows, beside)


def test_pandas_writes_these(write: Writer) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS)
    for orient in ("columns", "index", "split", "records", "table"):
        rows, beside = read(write("a.json", frame.to_json(orient=orient)))
        assert [{name: row[name] for name in NAMES} for row in rows] == ROWS, orient
        assert beside == {"split": ["index"], "table": ["schema"]}.get(orient, [])


def test_places(write: Writer) -> None:
    def first(value: Any) -> str:
        return next(iter(Source.of("dataset", str(write("a.json", json.dumps(value))), "train"))).where

    assert first({"result": {"items": ROWS}}) == "a.json:result.items[0]"
    assert first(COLUMNS) == "a.json[0]"
    assert first(ROWS[0]) == "a.json:1"


@pytest.mark.parametrize(
    "text", ["".join(json.dumps(row["messages"]) + "\n" for row in ROWS), json.dumps([row["messages"] for row in ROWS])]
)
def test_chats_without_objects(write: Writer, text: str) -> None:
    wanted = [{"messages": row["messages"]} for row in ROWS]
    assert read(write("a.json", text))[0] == wanted
    if "\n" in text:
        assert read(write("a.jsonl", text))[0] == wanted
        turns = [[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]] * 2
        assert (
            read(write("b.jsonl", "".join(json.dumps(one) + "\n" for one in turns)))[0]
            == [{"conversations": turns[0]}] * 2
        )


def test_a_single_array_of_messages_is_no_chat_since_it_may_be_many(door: Door) -> None:
    Path("a.json").write_text(json.dumps(ROWS[0]["messages"] + ROWS[1]["messages"]))
    door.refuses("a.json", snapshot("""\
a.json[0]: not a known format
  seen:    the keys role, content
  allowed: messages, conversations, instruction + output, prompt + completion, or text
  change:  each row is a single message; put all messages of a conversation into one row, as a list under messages\
"""))  # fmt: skip


def test_several_lists_are_refused_with_a_command_that_works(door: Door) -> None:
    Path("a.json").write_text(json.dumps({"good": ROWS, "bad": ROWS[:2]}))
    door.refuses("a.json", snapshot("""\
a.json: one object with several lists that may be the rows
  seen:    good, bad
  allowed: [{...}, {...}], one object on each line, or one list under a key: {"data": [{...}, {...}]}
  change:  save one of the lists: python -c "import json; json.dump(json.load(open('a.json'))['good'], open('good.json', 'w'))"\
"""))  # fmt: skip
    change = door("a.json").content["error"]["change"].partition(": ")[2]
    subprocess.run([sys.executable, *shlex.split(change)[1:]], check=True)
    assert door("good.json").content["rows"]["read"] == 12


def test_cells_that_the_hubs_api_cut_off_are_bad_rows(write: Writer) -> None:
    items = [{"row_idx": n, "row": row, "truncated_cells": ["messages"] * (n == 3)} for n, row in enumerate(ROWS)]
    with pytest.raises(RowError, match=r"row 3: the hub's API has cut off cells"):
        read(write("a.json", json.dumps({"rows": items})))


def test_texts_in_an_array_say_how_to_write_them(write: Writer) -> None:
    for name, text in (("a.json", '[["q", "a"], ["q", "a"]]'), ("a.jsonl", '["q", "a"]\n["q", "a"]\n')):
        with pytest.raises(RowError, match=r'write each row as an object: {"prompt": "...", "completion": "..."}'):
            read(write(name, text))


LARGE = {
    "list last": ({"version": 1, "rows": ROWS}, ["version"]),
    "list first": ({"rows": ROWS, "version": {"a": [1]}}, ["version"]),
    "splits": ({"test": ROWS[:3], "train": ROWS, "dev": ROWS[:1]}, ["test (3 items)", "dev (1 items)"]),
}


@pytest.mark.parametrize("layout", LARGE)
def test_an_object_larger_than_a_row_is_read_row_by_row(
    write: Writer, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(json_window, "MAX_ROW_BYTES", 400)
    monkeypatch.setattr(json_window, "CHUNK_BYTES", 100)
    value, beside = LARGE[layout]
    assert read(write("a.json", json.dumps(value, indent=1))) == (ROWS, beside)


def test_a_large_object_without_one_list_of_rows_is_refused(write: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_window, "MAX_ROW_BYTES", 400)
    monkeypatch.setattr(json_window, "CHUNK_BYTES", 100)
    for value, problem in (
        ({"a": ROWS, "b": ROWS}, "several lists that may be the rows"),
        (COLUMNS, "record 1 is too long"),
        ({"a": "x" * 900, "b": "y" * 900}, "record 1 is too long"),
    ):
        with pytest.raises(InputError, match=problem):
            read(write("a.json", json.dumps(value)))
    with pytest.raises(InputError, match=r"cut off"):
        read(write("a.json", json.dumps({"rows": ROWS})[:-60]))
