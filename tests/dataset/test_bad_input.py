"""The corpus of bad input, files: what is written, and what `solotune data` says of it.

Each entry has the number of the corpus (in the project's reliability notes). Rows are in test_bad_rows.py.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.dataset.conftest import Door, chat

Content = bytes | str | Callable[[Path], Any]

ROWS = [{"messages": chat(f"What is {n}?", f"It is {n}.")} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
DEEP = "[" * 100_000
MIB = 1 << 20


class Bad(NamedTuple):
    """One entry: a file, and what is said of it; a problem that begins with `:` or `[` comes after the name."""

    entry: int
    what: str
    name: str
    content: Content
    problem: str
    also: tuple[str, ...] = ()


def bad(entry: int, what: str, name: str, content: Content, problem: str, *also: str) -> Bad:
    return Bad(entry, what, name, content, name + problem if problem[0] in ":[" else problem, also)


def zst(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def sparse(head: bytes, size: int) -> Callable[[Path], None]:
    """A file that takes no space on the disk."""

    def make(path: Path) -> None:
        path.write_bytes(head)
        os.truncate(path, size)

    return make


def parquet(table: Any = None, *, change: Callable[[bytes], bytes] = bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        pq.write_table(pa.table({"messages": [row["messages"] for row in ROWS]}) if table is None else table, path)
        path.write_bytes(change(path.read_bytes()))

    return make


def arrow_extension(path: Path) -> None:
    """A column that claims to be a Python class; unpickling it would make a file."""
    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    metadata[b"ARROW:extension:metadata"] = b"cos\nsystem\n(S'touch unpickled'\ntR."
    inner = pa.struct([pa.field("inside", pa.string(), metadata=metadata)])
    table = pa.table({"text": pa.array([{"inside": "a"}], inner)})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


def invalid_utf8() -> pa.Table:
    """A column of texts that are none; Arrow does not look when a file is written."""
    texts = pa.array([b"a", b"b", b"\xff"], pa.binary())
    return pa.table({"text": pa.Array.from_buffers(pa.string(), 3, texts.buffers())})


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)


NOT_UTF8 = "save it as UTF-8"
ONE_A_LINE = "one complete object on each line"
NO_FILE = "not a regular file"
TOO_LONG = "64 MiB"
# a frame header that asks for a window of 2 GiB, and an empty block
WINDOW_OF_2_GIB = b"\x28\xb5\x2f\xfd\x00" + bytes([21 << 3]) + b"\x01\x00\x00"

REFUSED = [
    bad(1, "an empty file", "a.jsonl", b"", ": the file is empty", "0 bytes"),
    bad(2, "only blank lines", "a.jsonl", "\n \n\n", "dataset: 0 rows", "a.jsonl"),
    bad(2, "only blanks", "a.json", "\n \n\n", ": not a JSON array", "only blanks"),
    bad(3, "a folder", "a.jsonl", Path.mkdir, ": a folder without data files"),
    bad(3, "a socket", "a.jsonl", socket_at, f": {NO_FILE}"),
    bad(4, "a FIFO", "a.jsonl", os.mkfifo, f": {NO_FILE}"),
    bad(6, "a dangling link", "a.jsonl", lambda path: path.symlink_to("gone"), ": cannot be read", "No such file"),
    bad(6, "a link to itself", "a.jsonl", lambda path: path.symlink_to("a.jsonl"), ": cannot be read", "symbolic"),
    bad(8, "UTF-16", "a.jsonl", LINES.encode("utf-16"), ": not UTF-8", "UTF-16", NOT_UTF8),
    bad(8, "UTF-16 without a mark", "a.json", LINES.encode("utf-16-le"), ": not text", "NUL", NOT_UTF8),
    bad(10, "lone CR", "a.jsonl", LINES.replace("\n", "\r"), ":1: a carriage return inside the line", "\\r\\n"),
    bad(10, "lone CR", "a.json", LINES.replace("\n", "\r"), ":1: a second object on the line", "ended by \\n"),
    bad(10, "lone CR", "a.csv", "text\ra\rb\r", ":1: not valid CSV", "carriage return", "\\r\\n"),
    bad(12, "a byte that is not UTF-8", "a.jsonl", LINES.encode() + b'{"text": "\xff"}', ":4: not UTF-8", "byte 11"),
    bad(12, "a byte that is not UTF-8", "a.json", b'[\n{"text": "\xff"}]', ":2: not UTF-8", "byte 13 of the file"),
    bad(12, "a byte that is not UTF-8", "a.csv", b"text\n\xff\n", ":2: not UTF-8", "byte 1"),
    bad(13, "a lone surrogate", "a.jsonl", '{"text": "\\ud800"}', ":1: not valid JSON", "surrogate"),
    bad(13, "a lone surrogate", "a.json", '[{"text": "\\ud800"}]', ":1: not valid JSON in record 1", "surrogate"),
    bad(15, "raw NUL", "a.jsonl", b'{"text": "a\0b"}', ":1: not valid JSON", "control character"),
    bad(15, "raw NUL", "a.json", b'[{"text": "a\0b"}]', ":1: not valid JSON in record 1", "control character"),
    bad(15, "raw NUL", "a.csv", b"text\na\0b\n", ":2: not text", "NUL, byte 2"),
    bad(16, "a cut last line", "a.jsonl", LINES[:-9], ":3: not valid JSON", ONE_A_LINE),
    bad(16, "a cut array", "a.json", json.dumps(ROWS)[:-9], ":1: the file is cut off inside record 3, "
        "which begins in line 1", "get the whole file, or keep its first 2 records"),
    bad(17, "two objects on a line", "a.jsonl", LINES.replace("\n", ""), ":1: not valid JSON", "Extra data"),
    bad(17, "two objects on a line", "a.json", LINES.replace("\n", " ", 1), ":1: a second object on the line"),
    bad(18, "an array", "a.jsonl", json.dumps(ROWS), ":1: an array, not an object", "name it .json"),
    bad(18, "an indented array", "a.jsonl", json.dumps(ROWS, indent=1), ":1: not valid JSON", "name it .json"),
    bad(18, "two arrays", "a.json", '[{"text": "a"}]\n[]', ":2: something follows the end of the array", "one array"),
    bad(19, "a number", "a.jsonl", "42", ":1: not an object", '{"messages": [...]}'),
    bad(19, "null", "a.json", "[null]", "[0]: not an object", "None"),
    bad(19, "a number among lines", "a.json", '{"text": "a"}\n42\n', ":2: not an object", "42"),
    bad(20, "NaN", "a.jsonl", '{"text": NaN}', ":1: not valid JSON", "NaN is not JSON"),
    bad(20, "infinity", "a.json", '[{"text": 1e999}]', ":1: not valid JSON in record 1", "1e999 is not a finite"),
    bad(21, "a key twice", "a.jsonl", '{"text": "a", "text": "b"}', ":1: not valid JSON", "'text' stands twice"),
    bad(21, "a column twice", "a.csv", "text,text\na,b\n", ":1: two columns have the same name", "text, text"),
    bad(21, "a column twice", "a.parquet", parquet(pa.table([["a"], ["b"]], names=["text", "text"])),
        ": two columns have the same name", "text, text"),
    bad(22, "100,000 lists", "a.jsonl", '{"text": ' + DEEP, ":1: nested too deeply", "100 lists"),
    bad(22, "100,000 lists", "a.json", '[{"text": ' + DEEP, ":1: not valid JSON in record 1", "100 lists"),
    bad(22, "900 lists, which JSON reads", "a.jsonl", '{"text": "a", "b": ' + DEEP[:900] + "]" * 900 + "}",
        ":1: nested too deeply", "100 lists"),
    bad(22, "100,000 lists in a text", "a.jsonl", json.dumps({**ROWS[0], "tools": DEEP}),
        ":1: tools is not valid JSON", "100 lists"),
    bad(23, "5,000 digits", "a.jsonl", '{"text": ' + "9" * 5000 + "}", ":1: not valid JSON", "4,300 digits"),
    bad(24, "a line of 300 MiB", "a.jsonl", sparse(b'{"text": "', 300 * MIB), ":1: the line is too long", TOO_LONG),
    bad(24, "a record of 70 MiB", "a.json", b'[{"text": "' + b"a" * (70 * MIB), ":1: record 1 is too long", TOO_LONG),
    bad(24, "a cell of 70 MiB", "a.csv", b'text\n"' + (b"a" * 1023 + b"\n") * (70 << 10), ":2: not valid CSV", "limit"),
    bad(24, "a mistake before 70 MiB", "a.json", b'[{"text": "a"},\n{"text" "b"},' + b'{"text": "a"},' * (5 * MIB),
        ":2: not valid JSON in record 2", "':' delimiter, column 9"),
    bad(26, "gzip", "a.jsonl", gzip.compress(LINES.encode()), ": the name does not match the content", "gzip"),
    bad(26, "gzip", "a.parquet", gzip.compress(LINES.encode()), ": the name does not match the content", "gzip"),
    bad(27, "plain text", "a.jsonl.gz", LINES, ": the name does not match the content", "no gzip data"),
    bad(27, "plain text", "a.csv.zst", LINES, ": the name does not match the content", "no zstd data"),
    bad(28, "cut", "a.jsonl.gz", gzip.compress(LINES.encode())[:-9], ": damaged gzip data", "end-of-stream"),
    bad(28, "junk at the end", "a.json.gz", gzip.compress(LINES.encode()) + b"junk", ": damaged gzip data"),
    bad(28, "a wrong checksum", "a.csv.gz", gzip.compress(b"text\na\n")[:-8] + bytes(8), ": damaged gzip data"),
    bad(28, "cut", "a.jsonl.zst", zst(LINES.encode())[:-9], ": damaged zstd data", "Truncated"),
    bad(28, "cut in the second frame", "a.jsonl.zst", zst(LINES.encode()) + zst(b"{}")[:-3], ": damaged zstd data"),
    bad(28, "junk at the end", "a.jsonl.zst", zst(LINES.encode()) + b"junk", ": damaged zstd data"),
    bad(29, "1 GiB in a line", "a.jsonl.zst", zst(bytes(MIB)) * 1024, ":1: the line is too long", TOO_LONG),
    bad(29, "1 GiB of line ends", "a.jsonl.zst", zst(b"\n" * MIB) * 1024, ":4194305: 4 MiB of blank lines"),
    bad(29, "200 MiB of blanks", "a.json.gz", gzip.compress(b" " * (200 * MIB), 1), ": not a JSON array"),
    bad(29, "a window of 2 GiB", "a.jsonl.zst", WINDOW_OF_2_GIB, ": damaged zstd data", "too much memory"),
    bad(30, "cut", "a.parquet", parquet(change=lambda data: data[:-9]), ": not a readable parquet file", "footer"),
    bad(30, "wrong magic", "a.parquet", parquet(change=lambda data: b"PARX" + data[4:]),
        ": the name does not match the content", "no parquet"),
    bad(30, "text", "a.parquet", LINES, ": the name does not match the content", "no parquet"),
    bad(30, "text", "a.arrow", LINES, ": not a readable arrow file"),
    bad(30, "parquet", "a.jsonl", parquet(), ": the name does not match the content", "parquet"),
    bad(30, "a column of bytes", "a.parquet", parquet(pa.table({"text": [b"a\xff"]})), "[0]: text is bytes, not text"),
    bad(30, "not UTF-8", "a.parquet", parquet(invalid_utf8()), ": not a readable parquet file", "string index 2"),
    bad(30, "no rows", "a.parquet", parquet(pa.table({"text": pa.array([], pa.string())})), "dataset: 0 rows"),
    bad(31, "a known extension type", "a.parquet", parquet(pa.table({"id": pa.array([b"0" * 16], pa.uuid())})),
        ": columns of an extension type", "id", "plain columns"),
    bad(31, "a Python class, inside", "a.arrow", arrow_extension, ": columns of an extension type", "text"),
]  # fmt: skip


def write(name: str, content: Content) -> None:
    path = Path(name)
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case.entry} {case.name}: {case.what}")
def test_files_that_are_refused(door: Door, case: Bad) -> None:
    write(case.name, case.content)
    door.refuses(case.name, case.problem, *case.also)


def test_5_a_missing_file(door: Door) -> None:
    write("chats.jsonl", LINES)
    door.refuses("chat.jsonl", "chat.jsonl: no such file", f"looked in {Path.cwd()}", "did you mean chats.jsonl?")
    door.refuses("a/b.jsonl", "a/b.jsonl: no such file", "looked in a (which does not exist)")
    door.refuses("~nobody-here/a.jsonl", "~nobody-here/a.jsonl: no such file")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_5_an_unreadable_file(door: Door, model_folders: Path, name: str) -> None:
    write(name, LINES if name == "a.jsonl" else parquet())
    shutil.copytree(model_folders / "chatml", "model")
    assert door(name, model_name_or_path="model").code == 0  # what is imported late is imported
    Path(name).chmod(0)
    is_root = os.geteuid() == 0
    if is_root:  # root reads everything
        Path().chmod(0o777)
        Path("config.yaml").unlink()
        os.seteuid(65534)
    try:
        door.refuses(name, f"{name}: cannot be read", "Permission denied", model_name_or_path="model")
    finally:
        if is_root:
            os.seteuid(0)


def test_31_nothing_was_unpickled(door: Door) -> None:
    arrow_extension(Path("a.arrow"))
    door("a.arrow")
    assert not Path("unpickled").exists()


# --- what works

WORKS: list[tuple[int, str, str, Content, int]] = [
    (7, "byte order mark", "a.jsonl", b"\xef\xbb\xbf" + LINES.encode(), 3),
    (7, "byte order mark", "a.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode(), 3),
    (7, "byte order mark", "a.csv", b"\xef\xbb\xbfprompt,completion\na,b\n", 1),
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
    for other in ("./a.jsonl", "link.jsonl", str(Path("a.jsonl").resolve())):
        door.refuses(["a.jsonl", other], "dataset: the same file is listed twice", f"a.jsonl and {Path(other)}")
    write("copy.jsonl", LINES)
    found = door(["a.jsonl", "copy.jsonl"])
    assert found.content["rows"]["dropped"] == {"exact duplicate": 3}
    assert found.finding("F39")["severity"] == "warning"
    door.refuses("a.jsonl", "eval_dataset: 3 of 3 validation rows are known from training", "link.jsonl:1 is a.jsonl:1",
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
    door.refuses(name, f"{name}:1: not valid JSON")


def test_54_names_that_cannot_be(door: Door) -> None:
    write("b.jsonl", LINES)
    name = "x" * 300 + ".jsonl"
    door.refuses(name, f"{name}: no such file")
    assert "config.yaml line 1, dataset: 'xxx" in door("x" * 5000 + "/b.jsonl").shown
    door.refuses("a\0.jsonl", "config.yaml line 1, dataset: a NUL character")


def test_54_a_name_that_is_not_utf8(door: Door) -> None:
    Path("folder").mkdir()
    write(os.fsdecode(b"folder/a\xff.jsonl"), "{")
    door.refuses("folder", "a\\xff.jsonl:1: not valid JSON")
    write(os.fsdecode(b"folder/a\xff.jsonl"), LINES)
    assert door("folder").content["examples"][0]["where"] == "a\\xff.jsonl:1"
    door.refuses(os.fsdecode(b"folder/a\xff.jsonl"), "dataset: the name is not UTF-8, so the run could not record it",
                 "folder/a\\xff.jsonl", "rename the file")  # fmt: skip
