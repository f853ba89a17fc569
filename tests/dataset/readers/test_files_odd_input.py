"""Files that are unusual and have to be read, and odd file names."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path

import pytest
from inline_snapshot import snapshot

from tests.dataset.conftest import Door
from tests.dataset.readers.test_files_bad_input import LINES, ROWS, Content, write, zst

# --- what works

WORKS: list[tuple[int, str, str, Content, int]] = [
    (7, "byte order mark", "a.jsonl", b"\xef\xbb\xbf" + LINES.encode(), 3),
    (7, "byte order mark", "a.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode(), 3),
    (7, "byte order mark", "a.csv", b"\xef\xbb\xbfprompt,completion\na,b\n", 1),
    (8, "UTF-16", "a.jsonl", LINES.encode("utf-16"), 3),
    (8, "UTF-16, the other order", "a.json", b"\xfe\xff" + json.dumps(ROWS).encode("utf-16-be"), 3),
    (8, "UTF-16 from Excel", "a.csv", "prompt\tcompletion\r\n漢\té\r\n".encode("utf-16"), 1),
    (8, "UTF-16, packed", "a.jsonl.gz", gzip.compress(LINES.encode("utf-16")), 3),
    (9, "CRLF", "a.jsonl", LINES.replace("\n", "\r\n"), 3),
    (9, "CRLF", "a.csv", "prompt,completion\r\na,b\r\n", 1),
    (11, "line separators in a string", "a.jsonl", json.dumps({"text": "a\u2028b\u0085c"}, ensure_ascii=False), 1),
    (16, "no line end at the end", "a.jsonl", LINES.removesuffix("\n"), 3),
    (25, "5,000 rows", "a.jsonl", "".join(f'{{"text": "{random.Random(n).random()}"}}\n' for n in range(5000)), 5000),
    (28, "two members", "a.jsonl.gz", gzip.compress(LINES.encode()) + gzip.compress(b"\n"), 3),
    (28, "two frames", "a.jsonl.zst", zst(LINES[:50].encode()) + zst(LINES[50:].encode()), 3),
]  # fmt: skip


@pytest.mark.parametrize("case", WORKS, ids=lambda case: f"{case[0]} {case[2]}: {case[1]}")
def test_files_that_work(door: Door, case: tuple[int, str, str, Content, int]) -> None:
    *_, name, content, num_rows = case
    write(name, content)
    found = door(name)
    assert found.code == 0
    rows = found.content["rows"]
    assert (rows["read"], rows["kept"], rows["dropped"]) == (num_rows, num_rows, {})


# --- 53, 54: names


def test_53_the_same_file_twice(door: Door) -> None:
    write("a.jsonl", LINES)
    Path("link.jsonl").symlink_to("a.jsonl")
    door.refuses(
        ["a.jsonl", "./a.jsonl"],
        snapshot("""\
dataset: the same file is listed twice
  seen:    a.jsonl and a.jsonl
  change:  list each file once\
"""),
    )
    door.refuses(
        ["a.jsonl", "link.jsonl"],
        snapshot("""\
dataset: the same file is listed twice
  seen:    a.jsonl and link.jsonl
  change:  list each file once\
"""),
    )
    door.refuses(
        ["a.jsonl", str(Path("a.jsonl").resolve())],
        snapshot("""\
dataset: the same file is listed twice
  seen:    a.jsonl and <tmp>/a.jsonl
  change:  list each file once\
"""),
    )
    write("copy.jsonl", LINES)
    found = door(["a.jsonl", "copy.jsonl"])
    assert found.content["rows"]["dropped"] == {"exact duplicate": 3}
    assert found.finding("F39")["severity"] == "warning"
    door.refuses("a.jsonl", snapshot("""\
eval_dataset: 3 of 3 validation rows are equal or close to training rows
  seen:    link.jsonl:1 equals a.jsonl:1; link.jsonl:2 equals a.jsonl:2; link.jsonl:3 equals a.jsonl:3
  allowed: no row on both sides: the loss on rows seen in training says nothing about new rows
  change:  remove these rows from dataset or from eval_dataset, or remove eval_dataset to hold out rows of dataset instead\
"""),
                 eval_dataset="link.jsonl", code=3)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["a b.jsonl", "a\nb.jsonl", "'a\".jsonl", "a;rm -rf *.jsonl", "$(touch made).jsonl", "-rf.jsonl",
     "*.jsonl", "[b].jsonl", "~a.jsonl", "%s{}.jsonl", "a\x1b[31mb.jsonl", "ü漢\u202e.jsonl", "x" * 249 + ".jsonl"],
)  # fmt: skip
def test_54_odd_names(door: Door, name: str) -> None:
    write(name, LINES)
    assert door(name).content["rows"]["kept"] == 3
    write(name, "{")
    assert door(name).content["error"]["problem"].startswith(f"{name}:1: ")


def test_54_names_that_cannot_be(door: Door) -> None:
    write("b.jsonl", LINES)
    door.refuses(
        "x" * 300 + ".jsonl",
        snapshot("""\
xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx.jsonl: no such file
  seen:    looked in <tmp>
  change:  check the path; a hub dataset is named owner/name\
"""),
    )
    door.refuses(
        "x" * 5000 + "/b.jsonl",
        snapshot(
            "config.yaml line 1, dataset: 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx... (5,010 characters) (str) is not allowed; allowed: text, or a list of names"
        ),
    )
    door.refuses(
        "a\0.jsonl",
        snapshot("""\
config.yaml line 1, dataset: a NUL character
  seen:    'a\\x00.jsonl'\
"""),
    )


def test_54_a_name_that_is_not_utf8(door: Door) -> None:
    Path("folder").mkdir()
    write(os.fsdecode(b"folder/a\xff.jsonl"), "{")
    door.refuses(
        "folder",
        snapshot("""\
a\\xff.jsonl:1: not valid JSON
  seen:    Expecting property name enclosed in double quotes, column 2: '{'
  allowed: one complete object on each line
  change:  if the objects of a\\xff.jsonl span several lines, rename it to .json\
"""),
    )
    write(os.fsdecode(b"folder/a\xff.jsonl"), LINES)
    assert door("folder").content["examples"][0]["where"] == "a\\xff.jsonl:1"
    door.refuses(os.fsdecode(b"folder/a\xff.jsonl"), snapshot("""\
dataset: the name is not UTF-8, so the run could not record it
  seen:    folder/a\\xff.jsonl
  change:  rename the file, or give its folder instead\
"""))  # fmt: skip
