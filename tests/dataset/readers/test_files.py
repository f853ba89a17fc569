"""Files in, rows with places out; every kind of broken file is an error that says where."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inline_snapshot import snapshot

from solotune.dataset.readers.source import Source
from solotune.errors import InputError
from tests.dataset.conftest import Writer
from tests.messages import stable

ROWS = [{"text": f"row {number}"} for number in range(10)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def rows_of(source: Any, split: str = "train") -> list[tuple[str, dict[str, Any]]]:
    return [tuple(row) for row in Source.of("dataset", str(source) if isinstance(source, Path) else source, split)]


def message_of(source: Any, split: str = "train") -> str:
    with pytest.raises(InputError) as caught:
        rows_of(source, split)
    return str(caught.value)


# --- formats


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json"])
def test_lines_have_their_numbers(write: Writer, name: str) -> None:
    path = write(name, '{"text": "a"}\n\n{"text": "b"}\r\n{"text": "c"}')
    assert rows_of(path) == [(f"{name}:1", {"text": "a"}), (f"{name}:3", {"text": "b"}), (f"{name}:4", {"text": "c"})]


def test_byte_order_mark(write: Writer) -> None:
    assert rows_of(write("a.jsonl", b'\xef\xbb\xbf{"text": "a"}')) == [("a.jsonl:1", {"text": "a"})]
    assert rows_of(write("b.json", b'\xef\xbb\xbf[{"text": "a"}]')) == [("b.json[0]", {"text": "a"})]


def test_unicode_line_separators_inside_a_string_are_no_line_ends(write: Writer) -> None:
    path = write("a.jsonl", '{"text": "a\u2028b\u0085c"}\n{"text": "d"}\n')
    assert [where for where, _ in rows_of(path)] == ["a.jsonl:1", "a.jsonl:2"]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_array(write: Writer, indent: int | None) -> None:
    path = write("a.json", json.dumps(ROWS, indent=indent))
    assert rows_of(path) == [(f"a.json[{i}]", row) for i, row in enumerate(ROWS)]


def test_json_array_larger_than_the_window(write: Writer) -> None:
    rows = [{"text": "é漢" * size} for size in (1, 700_000, 3, 1_500_000, 5)]
    assert [values for _, values in rows_of(write("a.json", json.dumps(rows, ensure_ascii=False)))] == rows


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=20), max_size=3), min_size=1, max_size=5))
def test_any_strings_survive_jsonl_and_json(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    for name in ("a.jsonl", "a.json"):
        assert [values for _, values in rows_of(tmp_path / name)] == rows


def test_csv_and_tsv(write: Writer) -> None:
    path = write("a.csv", 'instruction,output\n"a\nb","c, d"\ne,f\n')
    assert rows_of(path) == [
        ("a.csv:2", {"instruction": "a\nb", "output": "c, d"}),
        ("a.csv:4", {"instruction": "e", "output": "f"}),
    ]
    assert rows_of(write("a.tsv", "text\tn\na, b\t1\n")) == [("a.tsv:2", {"text": "a, b", "n": "1"})]


def test_parquet_and_arrow(tmp_path: Path) -> None:
    table = pa.table({"messages": [[{"role": "user", "content": "a"}], None]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        assert rows_of(tmp_path / name) == [
            (f"{name}[0]", {"messages": [{"role": "user", "content": "a"}]}),
            (f"{name}[1]", {"messages": None}),
        ]


def test_a_folder_saved_by_datasets(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert [values for _, values in rows_of(tmp_path / "saved")] == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed(write: Writer, name: str, suffix: str) -> None:
    text = {"a.jsonl": LINES, "a.json": json.dumps(ROWS), "a.csv": "text\n" + "".join(f"row {n}\n" for n in range(10))}
    data = text[name].encode()
    half = len(data) // 2
    compress = gzip.compress if suffix == ".gz" else partial(pa.compress, codec="zstd", asbytes=True)
    path = write(name + suffix, compress(data[:half]) + compress(data[half:]))  # two members, as `cat a b` makes
    assert [values for _, values in rows_of(path)] == ROWS


# --- several files, folders, slices


def test_several_files_and_folders(write: Writer, tmp_path: Path) -> None:
    write("more/train-1.jsonl", {"text": "b"})
    write("more/test.jsonl", {"text": "c"})
    write("more/.hidden.jsonl", {"text": "d"})
    sources = [str(write("a.jsonl", {"text": "a"})), str(tmp_path / "more")]
    assert rows_of(sources) == [("a.jsonl:1", {"text": "a"}), ("train-1.jsonl:1", {"text": "b"})]
    assert rows_of(tmp_path / "more", "test") == [("test.jsonl:1", {"text": "c"})]
    assert message_of(tmp_path / "more", "val") == (
        f"dataset_split: {tmp_path}/more has no files of the split val\n"
        "  seen:    test.jsonl, train-1.jsonl\n"
        "  change:  give a file instead of the folder, or set dataset_split to a word in the file names"
    )
    assert message_of([str(tmp_path / "a.jsonl"), str(tmp_path / "more" / ".." / "a.jsonl")]) == (
        f"dataset: the same file is listed twice\n  seen:    {tmp_path}/a.jsonl and {tmp_path}/more/../a.jsonl\n"
        "  change:  list each file once"
    )


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train", range(10)),
        ("train[:3]", range(3)),
        ("[2:4]", range(2, 4)),
        ("train[7:]", range(7, 10)),
        ("train[-2:]", range(8, 10)),
        ("train[:-8]", range(2)),
        ("train[10%:35%]", range(1, 4)),
        ("train[50%:]", range(5, 10)),
        ("train[:99]", range(10)),
    ],
)
def test_slices(write: Writer, split: str, numbers: range) -> None:
    path = write("a.jsonl", LINES)
    assert [values["text"] for _, values in rows_of(path, split)] == [f"row {number}" for number in numbers]


def test_slices_mean_what_they_mean_in_datasets(write: Writer) -> None:
    import datasets

    whole = datasets.Dataset.from_list(ROWS)
    path = write("a.jsonl", LINES)
    for split in ("train[:33%]", "train[15%:45%]", "train[-25%:]", "train[3:-3]"):
        instruction = datasets.ReadInstruction.from_spec(split).to_absolute({"train": 10})[0]
        wanted = whole.select(range(instruction.from_, instruction.to))["text"]
        assert [values["text"] for _, values in rows_of(path, split)] == list(wanted), split


def test_a_slice_from_the_front_does_not_read_what_follows(write: Writer) -> None:
    path = write("a.jsonl", LINES + "broken")
    assert len(rows_of(path, "train[:10]")) == 10
    assert message_of(path).startswith("a.jsonl:11: not valid JSON")


def test_splits_that_cannot_be() -> None:
    assert message_of("x.jsonl", "train[1:2:3]") == (
        "dataset_split: not a split\n"
        "  seen:    train[1:2:3]\n"
        "  allowed: a name, with or without one slice: train, train[:100], train[10%:20%], train[-50:]"
    )


def test_a_file_has_no_named_splits(write: Writer) -> None:
    assert message_of(write("a.jsonl", LINES), "test[:3]") == (
        "dataset_split: a file has no split called test\n"
        "  seen:    test[:3]\n"
        "  allowed: train, or a slice such as train[:100]\n"
        "  change:  use train[:3]"
    )


# --- what is not there


def test_a_missing_file_is_not_taken_for_a_hub_dataset(write: Writer, tmp_path: Path) -> None:
    write("chats.jsonl", LINES)
    assert message_of(tmp_path / "chat.jsonl") == (
        f"{tmp_path}/chat.jsonl: no such file\n  seen:    looked in {tmp_path}\n  change:  did you mean chats.jsonl?"
    )
    for name in ("data.jsonl", "./data", "~/data", "data.csv.gz", "a/b/c"):
        assert f"{name}: no such file" in message_of(name)


def test_a_hub_dataset_that_cannot_be_had() -> None:
    message = message_of("owner/no-such-dataset-here")
    assert message.startswith(
        "dataset: the hub dataset owner/no-such-dataset-here could not be loaded\n  seen:    split train: "
    )
    assert message.endswith("for a gated dataset log in with `hf auth login`")


def test_keys_that_only_a_hub_dataset_has(write: Writer) -> None:
    with pytest.raises(InputError) as caught:
        Source.of("dataset", str(write("a.jsonl", LINES)), "train", revision="main")
    assert stable(caught.value) == snapshot("""\
dataset_revision: only for hub datasets, but dataset is local
  seen:    main
  change:  remove it\
""")


def test_a_hub_dataset_names_its_rows_by_index(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(*args: Any, **keys: Any) -> datasets.Dataset:
        asked.append((args, keys))
        return datasets.Dataset.from_list(ROWS[:2])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = Source.of("dataset", "owner/chats", "train_sft[:2]", config_name="small", revision="v1")
    assert [row.where for row in rows] == ["owner/chats[0]", "owner/chats[1]"]
    assert asked == [(("owner/chats", "small"), {"split": "train_sft[:2]", "revision": "v1"})]


def test_special_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    assert message_of(tmp_path / "a.jsonl").startswith(f"{tmp_path}/a.jsonl: not a regular file")
    assert message_of("/dev/null").startswith("/dev/null: not a regular file")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone")
    assert (
        message_of(tmp_path / "b.jsonl") == f"{tmp_path}/b.jsonl: cannot be read\n  seen:    No such file or directory"
    )
    (tmp_path / "empty").mkdir()
    assert message_of(tmp_path / "empty").startswith(f"{tmp_path}/empty: a folder without data files")


@pytest.mark.parametrize("name", ["my texts", "my texts/a.txt"])
def test_advice_for_texts_works_when_pasted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my texts").mkdir()
    (tmp_path / "my texts" / "a.txt").write_text("one\nline\n\ntwo")
    (tmp_path / "my texts" / "b.txt").write_text("three")
    change = message_of(name).partition("change:")[2].strip()
    command = change.removeprefix("make a row of each paragraph: ")
    assert command != change
    subprocess.run(["sh", "-c", command], check=True)
    texts = ["one\nline", "two"] + ["three"] * (name == "my texts")
    assert [values for _, values in rows_of("rows.jsonl")] == [{"text": text} for text in texts]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_no_permission(write: Writer) -> None:
    path = write("a.jsonl", LINES)
    path.chmod(0)
    assert message_of(path) == "a.jsonl: cannot be read\n  seen:    Permission denied"


@pytest.mark.parametrize("name", ["a b.jsonl", "a\nb.jsonl", "a\"'b;rm -rf.jsonl", "ü漢.jsonl", "x" * 249 + ".jsonl"])
def test_odd_names(write: Writer, name: str) -> None:
    assert rows_of(write(name, '{"text": "a"}')) == [(f"{name}:1", {"text": "a"})]


# --- broken files: the whole message for some, the first line for all

ZSTD = pa.compress(LINES.encode(), codec="zstd", asbytes=True)
DEEP = "[" * 100_000
BROKEN: dict[str, tuple[str, bytes | str, str]] = {
    "empty": ("a.jsonl", b"", "a.jsonl: the file is empty"),
    "blank lines": ("a.jsonl", "\n \n\n", "dataset: 0 rows"),
    "blank json": ("a.json", "\n \n", "a.json: not a JSON array"),
    "utf-16, cut": (
        "a.jsonl",
        LINES.encode("utf-16")[:-1],
        "a.jsonl: not UTF-16, but it begins with the mark of UTF-16",
    ),
    "utf-32": ("a.jsonl", LINES.encode("utf-32"), "a.jsonl: not UTF-8"),
    "bad byte": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl:2: not UTF-8"),
    "bad byte in json": ("a.json", b'[{"text": "a"},\n{"text": "\xff"}]', "a.json:2: not UTF-8"),
    "bad byte in csv": ("a.csv", b"text\na\n\xff\n", "a.csv:3: not UTF-8"),
    "lone surrogate": ("a.jsonl", '{"text": "\\ud800"}', "a.jsonl:1: not valid JSON"),
    "lone surrogate in json": ("a.json", '[{"text": "\\ud800"}]', "a.json:1: not valid JSON in record 1"),
    "carriage returns": ("a.jsonl", '{"text": "a"}\r{"text": "b"}', "a.jsonl:1: a carriage return inside the line"),
    "raw NUL": ("a.jsonl", b'{"text": "\x00"}', "a.jsonl:1: not valid JSON"),
    "cut line": ("a.jsonl", '{"text": "a"}\n{"text": "b', "a.jsonl:2: not valid JSON"),
    "two objects": ("a.jsonl", '{"text": "a"} {"text": "b"}', "a.jsonl:1: not valid JSON"),
    "array in jsonl": ("a.jsonl", '[{"text": "a"}]', "a.jsonl:1: an array, not an object"),
    "scalar": ("a.jsonl", "42", "a.jsonl:1: not an object"),
    "null": ("a.json", "[null]", "a.json[0]: not an object"),
    "NaN": ("a.jsonl", '{"text": NaN}', "a.jsonl:1: not valid JSON"),
    "infinity": ("a.jsonl", '{"text": 1e999}', "a.jsonl:1: not valid JSON"),
    "duplicate key": ("a.jsonl", '{"text": "a", "text": "b"}', "a.jsonl:1: not valid JSON"),
    "deep": ("a.jsonl", '{"a":' + DEEP, "a.jsonl:1: nested too deeply"),
    "deep json": ("a.json", '[{"a":' + DEEP, "a.json:1: not valid JSON in record 1"),
    "long integer": ("a.jsonl", '{"a": ' + "9" * 5000 + "}", "a.jsonl:1: not valid JSON"),
    "gzip as jsonl": ("a.jsonl", gzip.compress(b"{}"), "a.jsonl: the name does not match the content"),
    "text as gzip": ("a.jsonl.gz", "{}", "a.jsonl.gz: the name does not match the content"),
    "text as zstd": ("a.jsonl.zst", "{}", "a.jsonl.zst: the name does not match the content"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(LINES.encode())[:-4], "a.jsonl.gz: damaged gzip data"),
    "junk after gzip": ("a.jsonl.gz", gzip.compress(LINES.encode()) + b"junk", "a.jsonl.gz: damaged gzip data"),
    "cut zstd": (
        "a.jsonl.zst",
        pa.compress(LINES.encode(), codec="zstd", asbytes=True)[:-9] + b"x" * 9,
        "a.jsonl.zst: damaged zstd data",
    ),
    "text as parquet": ("a.parquet", LINES, "a.parquet: the name does not match the content"),
    "text as arrow": ("a.arrow", LINES, "a.arrow: not a readable arrow file"),
    "csv with too many cells": ("a.csv", "text\na\nb,c\n", "a.csv:3: 2 cells, but the header has 1"),
    "csv with an open quote": ("a.csv", 'text\na\n"b\n', "a.csv:3: not valid CSV"),
    "csv with equal columns": ("a.csv", "a,a\n1,2\n", "a.csv:1: two columns have the same name"),
    "two lists of rows": (
        "a.json",
        '{"a": [{"text": "a"}], "b": [{"text": "a"}]}',
        "a.json: one object with several lists that may be the rows",
    ),
    "text file": ("a.txt", "hello", "{path}: not a data file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(write: Writer, case: str) -> None:
    name, content, problem = BROKEN[case]
    path = write(name, content)
    assert message_of(path).split("\n")[0] == problem.replace("{path}", name)


def test_a_json_file_that_is_cut_off_says_where(write: Writer) -> None:
    whole = json.dumps([{"text": "first"}, {"text": "second\nline"}, {"text": "third"}], indent=1)
    path = write("a.json", whole[: whole.index("rd")])
    assert message_of(path) == (
        "a.json:9: the file is cut off inside record 3, which starts in line 8\n"
        "  seen:    Unterminated string starting at; the file ends with "
        """'{\\n  "text": "thi'\n"""
        "  change:  download the complete file, or keep its first 2 records"
    )
    assert len(rows_of(path, "train[:2]")) == 2


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_json_file_cut_anywhere_is_an_error(tmp_path: Path, data: st.DataObject) -> None:
    whole = json.dumps(
        [{"text": "é\n", "n": [1, 2.5, None, True]}, {"text": "b", "n": {"a": "漢"}}], ensure_ascii=False
    )
    size = data.draw(st.integers(min_value=1, max_value=len(whole.encode()) - 1))
    (tmp_path / "a.json").write_bytes(whole.encode()[:size])
    with pytest.raises(InputError, match=r"^a\.json:"):
        rows_of(tmp_path / "a.json")


def test_a_json_file_with_a_mistake_says_where(write: Writer) -> None:
    path = write("a.json", '[\n{"text": "a"},\n{"text": b},\n{"text": "c"}\n]')
    assert message_of(path) == (
        "a.json:3: not valid JSON in record 2\n"
        """  seen:    Expecting value, column 10: '{"text": b},\\n{"text": "c"}\\n]'\n"""
        "  allowed: an array of objects: [{...}, {...}]"
    )


def test_jsonl_message_whole(write: Writer) -> None:
    assert message_of(write("a.jsonl", '{"text": "a"}\n{"text": a}\n')) == (
        "a.jsonl:2: not valid JSON\n"
        "  seen:    Expecting value, column 10: '{\"text\": a}'\n"
        "  allowed: one complete object on each line"
    )


def test_one_endless_line_does_not_fill_the_memory(write: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("solotune.dataset.readers.row.MAX_ROW_BYTES", 1 << 16)
    path = write("a.jsonl", b'{"text": "' + b"a" * (20 << 20) + b'"}')
    tracemalloc.start()
    assert message_of(path).startswith("a.jsonl:1: the line is too long")
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_extension_types_are_refused(tmp_path: Path) -> None:
    table = pa.table({"id": pa.array([b"0" * 16], pa.uuid())})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert message_of(tmp_path / "a.arrow").startswith("a.arrow: columns of an extension type\n  seen:    id")
