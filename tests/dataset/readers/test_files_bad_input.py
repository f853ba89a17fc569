"""The corpus of bad input, files: what is written, and what `solotune data` says of it.

Each entry has the number of the corpus (in the project's reliability notes). Rows are in test_bad_rows.py. The file is
long because each message stands whole beside the file that causes it.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inline_snapshot import snapshot

from tests.dataset.conftest import Door, chat

Content = bytes | str | Callable[[Path], Any]

ROWS = [{"messages": chat(f"What is {n}?", f"It is {n}.")} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
DEEP = "[" * 100_000
MIB = 1 << 20


class Bad(NamedTuple):
    """One entry: a file, and what is said of it."""

    entry: int
    what: str
    name: str
    content: Content
    message: str


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


# a frame header that asks for a window of 2 GiB, and an empty block
WINDOW_OF_2_GIB = b"\x28\xb5\x2f\xfd\x00" + bytes([21 << 3]) + b"\x01\x00\x00"

REFUSED = [
    Bad(1, "an empty file", "a.jsonl", b"", snapshot("""\
a.jsonl: the file is empty
  seen:    0 bytes\
""")),
    Bad(2, "only blank lines", "a.jsonl", "\n \n\n", snapshot("""\
dataset: 0 rows
  seen:    a.jsonl
  change:  use a file that has rows, or another slice\
""")),
    Bad(2, "only blanks", "a.json", "\n \n\n", snapshot("""\
a.json: not a JSON array
  seen:    only whitespace
  allowed: [{...}, {...}]\
""")),
    Bad(3, "a folder", "a.jsonl", Path.mkdir, snapshot("""\
a.jsonl: a folder without data files
  allowed: jsonl, json, csv, tsv, parquet, arrow; the text formats also as .gz or .zst\
""")),
    Bad(3, "a socket", "a.jsonl", socket_at, snapshot("""\
a.jsonl: not a regular file
  allowed: a file or a folder of files: jsonl, json, csv, tsv, parquet, arrow; the text formats also as .gz or .zst\
""")),
    Bad(4, "a FIFO", "a.jsonl", os.mkfifo, snapshot("""\
a.jsonl: not a regular file
  allowed: a file or a folder of files: jsonl, json, csv, tsv, parquet, arrow; the text formats also as .gz or .zst\
""")),
    Bad(6, "a dangling link", "a.jsonl", lambda path: path.symlink_to("gone"), snapshot("""\
a.jsonl: cannot be read
  seen:    No such file or directory\
""")),
    Bad(6, "a link to itself", "a.jsonl", lambda path: path.symlink_to("a.jsonl"), snapshot("""\
a.jsonl: cannot be read
  seen:    Too many levels of symbolic links\
""")),
    Bad(8, "UTF-16 without a mark", "a.json", LINES.encode("utf-16-le"), snapshot("""\
a.json: not text
  seen:    NUL in the first bytes: b'{\\x00"\\x00m\\x00'
  change:  save it as UTF-8\
""")),
    Bad(10, "lone CR", "a.jsonl", LINES.replace("\n", "\r"), snapshot("""\
a.jsonl:1: a carriage return inside the line
  change:  end lines with \\n or \\r\\n\
""")),
    Bad(10, "lone CR", "a.json", LINES.replace("\n", "\r"), snapshot("""\
a.json:1: a second object on the line
  seen:    '{"messages": [{"role": "user", "content"'
  allowed: [{...}, {...}], or one object on each line, ended by \\n\
""")),
    Bad(10, "lone CR", "a.csv", "text\ra\rb\r", snapshot("""\
a.csv:1: not valid CSV
  seen:    a carriage return outside of quotes
  change:  end lines with \\n or \\r\\n\
""")),
    Bad(12, "a byte that is not UTF-8", "a.jsonl", LINES.encode() + b'{"text": "\xff"}', snapshot("""\
a.jsonl:4: not UTF-8
  seen:    byte 11 of the line: invalid start byte
  change:  save the file as UTF-8; or on_bad_row: drop leaves out this row\
""")),
    Bad(12, "a byte that is not UTF-8", "a.json", b'[\n{"text": "\xff"}]', snapshot("""\
a.json:2: not UTF-8
  seen:    byte 13 of the file: invalid start byte\
""")),
    Bad(12, "a byte that is not UTF-8", "a.csv", b"text\n\xff\n", snapshot("""\
a.csv:2: not UTF-8
  seen:    byte 1 of the line
  change:  save the file as UTF-8\
""")),
    Bad(13, "a lone surrogate", "a.jsonl", '{"text": "\\ud800"}', snapshot("""\
a.jsonl:1: not valid JSON
  seen:    a lone surrogate ('\\ud800') is not text\
""")),
    Bad(13, "a lone surrogate", "a.json", '[{"text": "\\ud800"}]', snapshot("""\
a.json:1: not valid JSON in record 1
  seen:    a lone surrogate ('\\ud800') is not text, column 2: '[{"text": "\\\\ud800"}]'
  allowed: an array of objects: [{...}, {...}]\
""")),
    Bad(15, "raw NUL", "a.jsonl", b'{"text": "a\0b"}', snapshot("""\
a.jsonl:1: not valid JSON
  seen:    Invalid control character at, column 12: '{"text": "a\\x00b"}'
  allowed: one complete object on each line\
""")),
    Bad(15, "raw NUL", "a.json", b'[{"text": "a\0b"}]', snapshot("""\
a.json:1: not valid JSON in record 1
  seen:    Invalid control character at, column 12: '{"text": "a\\x00b"}]'
  allowed: an array of objects: [{...}, {...}]\
""")),
    Bad(15, "raw NUL", "a.csv", b"text\na\0b\n", snapshot("""\
a.csv:2: not text
  seen:    NUL, byte 2 of the line\
""")),
    Bad(16, "a cut last line", "a.jsonl", LINES[:-9], snapshot("""\
a.jsonl:3: not valid JSON
  seen:    Unterminated string starting at, column 91: 'istant", "content": "It i'
  allowed: one complete object on each line
  change:  download the complete file, or remove its last line\
""")),
    Bad(16, "a cut array", "a.json", json.dumps(ROWS)[:-9], snapshot("""\
a.json:1: the file is cut off inside record 3, which starts in line 1
  seen:    Unterminated string starting at; the file ends with ', {"role": "assistant", "content": "It i'
  change:  download the complete file, or keep its first 2 records\
""")),
    Bad(17, "two objects on a line", "a.jsonl", LINES.replace("\n", ""), snapshot("""\
a.jsonl:1: not valid JSON
  seen:    Extra data, column 104: 'tent": "It is 0."}]}{"messages": [{"role'
  allowed: one complete object on each line\
""")),
    Bad(17, "two objects on a line", "a.json", LINES.replace("\n", " ", 1), snapshot("""\
a.json:1: a second object on the line
  seen:    '{"messages": [{"role": "user", "content"'
  allowed: [{...}, {...}], or one object on each line, ended by \\n\
""")),
    Bad(18, "an array", "a.jsonl", json.dumps(ROWS), snapshot("""\
a.jsonl:1: an array, not an object
  change:  if a.jsonl is one JSON array, rename it to .json\
""")),
    Bad(18, "an indented array", "a.jsonl", json.dumps(ROWS, indent=1), snapshot("""\
a.jsonl:1: not valid JSON (one of 38 bad rows; 38 were read)
  seen:    Expecting value, column 2: '['; also a.jsonl:2; a.jsonl:3; ...
  allowed: one complete object on each line
  change:  if a.jsonl is one JSON array, rename it to .json\
""")),
    Bad(18, "two arrays", "a.json", '[{"text": "a"}]\n[]', snapshot("""\
a.json:2: extra content after the end of the array
  seen:    '[]'
  allowed: one array: [{...}, {...}]\
""")),
    Bad(19, "a number", "a.jsonl", "42", snapshot("""\
a.jsonl:1: not an object
  seen:    42
  allowed: {"messages": [...]}\
""")),
    Bad(19, "null", "a.json", "[null]", snapshot("""\
a.json[0]: not an object
  seen:    null
  allowed: {"messages": [...]}\
""")),
    Bad(19, "a number among lines", "a.json", '{"text": "a"}\n42\n', snapshot("""\
a.json:2: not an object
  seen:    42
  allowed: {"messages": [...]}
  change:  on_bad_row: drop leaves out this row\
""")),
    Bad(20, "NaN", "a.jsonl", '{"text": NaN}', snapshot("""\
a.jsonl:1: not valid JSON
  seen:    NaN is not JSON\
""")),
    Bad(20, "infinity", "a.json", '[{"text": 1e999}]', snapshot("""\
a.json:1: not valid JSON in record 1
  seen:    1e999 is not a finite number, column 2: '[{"text": 1e999}]'
  allowed: an array of objects: [{...}, {...}]\
""")),
    Bad(21, "a key twice", "a.jsonl", '{"text": "a", "text": "b"}', snapshot("""\
a.jsonl:1: not valid JSON
  seen:    the key 'text' appears twice in one object\
""")),
    Bad(21, "a column twice", "a.csv", "text,text\na,b\n", snapshot("""\
a.csv:1: two columns have the same name
  seen:    text, text\
""")),
    Bad(21, "a column twice", "a.parquet", parquet(pa.table([["a"], ["b"]], names=["text", "text"])),
        snapshot("""\
a.parquet: two columns have the same name
  seen:    text, text\
""")),
    Bad(22, "100,000 lists", "a.jsonl", '{"text": ' + DEEP, snapshot("""\
a.jsonl:1: nested too deeply
  allowed: 100 levels of lists and objects\
""")),
    Bad(22, "100,000 lists", "a.json", '[{"text": ' + DEEP, snapshot("""\
a.json:1: not valid JSON in record 1
  seen:    nested deeper than 100 levels of lists and objects, column 2: '[{"text": [[[[[[[[[[['
  allowed: an array of objects: [{...}, {...}]\
""")),
    Bad(22, "900 lists, which JSON reads", "a.jsonl", '{"text": "a", "b": ' + DEEP[:900] + "]" * 900 + "}",
        snapshot("""\
a.jsonl:1: nested too deeply
  allowed: 100 levels of lists and objects\
""")),
    Bad(22, "100,000 lists in a text", "a.jsonl", json.dumps({**ROWS[0], "tools": DEEP}),
        snapshot("""\
a.jsonl:1: tools is not valid JSON
  seen:    nested deeper than 100 levels of lists and objects, in "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[...\
""")),
    Bad(23, "5,000 digits", "a.jsonl", '{"text": ' + "9" * 5000 + "}", snapshot("""\
a.jsonl:1: not valid JSON
  seen:    an integer of more than 4,300 digits\
""")),
    Bad(24, "a line of 300 MiB", "a.jsonl", sparse(b'{"text": "', 300 * MIB), snapshot("""\
a.jsonl:1: the line is too long
  allowed: 64 MiB\
""")),
    Bad(24, "a record of 70 MiB", "a.json", b'[{"text": "' + b"a" * (70 * MIB), snapshot("""\
a.json:1: record 1 is too long
  allowed: 64 MiB\
""")),
    Bad(24, "a cell of 70 MiB", "a.csv", b'text\n"' + (b"a" * 1023 + b"\n") * (70 << 10), snapshot("""\
a.csv:65537: the record is too long
  allowed: 64 MiB
  change:  look for a quote that is not closed\
""")),
    Bad(24, "a mistake before 70 MiB", "a.json", b'[{"text": "a"},\n{"text" "b"},' + b'{"text": "a"},' * (5 * MIB),
        snapshot("""\
a.json:2: not valid JSON in record 2
  seen:    Expecting ':' delimiter, column 9: '{"text" "b"},{"text": "a"},{'
  allowed: an array of objects: [{...}, {...}]\
""")),
    Bad(26, "gzip", "a.jsonl", gzip.compress(LINES.encode()), snapshot("""\
a.jsonl: the name does not match the content
  seen:    gzip data
  change:  rename it to a.jsonl.gz\
""")),
    Bad(26, "gzip", "a.parquet", gzip.compress(LINES.encode()), snapshot("""\
a.parquet: the name does not match the content
  seen:    gzip data
  change:  rename it to a.jsonl.gz\
""")),
    Bad(27, "plain text", "a.jsonl.gz", LINES, snapshot("""\
a.jsonl.gz: the name does not match the content
  seen:    no gzip data
  change:  rename it to a.jsonl, if it is not compressed\
""")),
    Bad(27, "plain text", "a.csv.zst", LINES, snapshot("""\
a.csv.zst: the name does not match the content
  seen:    no zstd data
  change:  rename it to a.csv, if it is not compressed\
""")),
    Bad(28, "cut", "a.jsonl.gz", gzip.compress(LINES.encode())[:-9], snapshot("""\
a.jsonl.gz: damaged gzip data
  seen:    Compressed file ended before the end-of-stream marker was reached\
""")),
    Bad(28, "junk at the end", "a.json.gz", gzip.compress(LINES.encode()) + b"junk", snapshot("""\
a.json.gz: damaged gzip data
  seen:    Not a gzipped file (b'ju')\
""")),
    Bad(28, "a wrong checksum", "a.csv.gz", gzip.compress(b"text\na\n")[:-8] + bytes(8), snapshot("""\
a.csv.gz: damaged gzip data
  seen:    CRC check failed 0x0 != 0x61291f44\
""")),
    Bad(28, "cut", "a.jsonl.zst", zst(LINES.encode())[:-9], snapshot("""\
a.jsonl.zst: damaged zstd data
  seen:    Truncated compressed stream\
""")),
    Bad(28, "cut in the second frame", "a.jsonl.zst", zst(LINES.encode()) + zst(b"{}")[:-3], snapshot("""\
a.jsonl.zst: damaged zstd data
  seen:    Truncated compressed stream\
""")),
    Bad(28, "junk at the end", "a.jsonl.zst", zst(LINES.encode()) + b"junk", snapshot("""\
a.jsonl.zst: damaged zstd data
  seen:    ZSTD decompress failed: Unknown frame descriptor\
""")),
    Bad(29, "1 GiB in a line", "a.jsonl.zst", zst(bytes(MIB)) * 1024, snapshot("""\
a.jsonl.zst:1: the line is too long
  allowed: 64 MiB\
""")),
    Bad(29, "1 GiB of line ends", "a.jsonl.zst", zst(b"\n" * MIB) * 1024, snapshot("""\
a.jsonl.zst:4194305: 4 MiB of blank lines
  change:  remove them\
""")),
    Bad(29, "200 MiB of blanks", "a.json.gz", gzip.compress(b" " * (200 * MIB), 1), snapshot("""\
a.json.gz: not a JSON array
  seen:    only whitespace
  allowed: [{...}, {...}]\
""")),
    Bad(29, "a window of 2 GiB", "a.jsonl.zst", WINDOW_OF_2_GIB, snapshot("""\
a.jsonl.zst: damaged zstd data
  seen:    ZSTD decompress failed: Frame requires too much memory for decoding\
""")),
    Bad(30, "cut", "a.parquet", parquet(change=lambda data: data[:-9]), snapshot("""\
a.parquet: not a readable parquet file
  seen:    Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file.\
""")),
    Bad(30, "wrong magic", "a.parquet", parquet(change=lambda data: b"PARX" + data[4:]),
        snapshot("""\
a.parquet: the name does not match the content
  seen:    no parquet
  change:  rename it to the suffix of its format: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow\
""")),
    Bad(30, "text", "a.parquet", LINES, snapshot("""\
a.parquet: the name does not match the content
  seen:    no parquet
  change:  rename it to the suffix of its format: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow\
""")),
    Bad(30, "text", "a.arrow", LINES, snapshot("""\
a.arrow: not a readable arrow file
  seen:    Expected to read 1701651067 metadata bytes, but only read 308\
""")),
    Bad(30, "parquet", "a.jsonl", parquet(), snapshot("""\
a.jsonl: the name does not match the content
  seen:    parquet
  change:  rename it to a.parquet\
""")),
    Bad(30, "a column of bytes", "a.parquet", parquet(pa.table({"text": [b"a\xff"]})), snapshot("""\
a.parquet[0]: text is bytes, not text
  seen:    "b'a\\\\xff'"
  allowed: text\
""")),
    Bad(30, "not UTF-8", "a.parquet", parquet(invalid_utf8()), snapshot("""\
a.parquet: not a readable parquet file
  seen:    In column 0: Invalid: Invalid UTF8 sequence at string index 2\
""")),
    Bad(30, "no rows", "a.parquet", parquet(pa.table({"text": pa.array([], pa.string())})), snapshot("""\
dataset: 0 rows
  seen:    a.parquet
  change:  use a file that has rows, or another slice\
""")),
    Bad(31, "a known extension type", "a.parquet", parquet(pa.table({"id": pa.array([b"0" * 16], pa.uuid())})),
        snapshot("""\
a.parquet: columns of an extension type
  seen:    id
  allowed: plain columns\
""")),
    Bad(31, "a Python class, inside", "a.arrow", arrow_extension, snapshot("""\
a.arrow: columns of an extension type
  seen:    text
  allowed: plain columns\
""")),
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
    door.refuses(case.name, case.message)


def test_5_a_missing_file(door: Door) -> None:
    write("chats.jsonl", LINES)
    door.refuses(
        "chat.jsonl",
        snapshot("""\
chat.jsonl: no such file
  seen:    looked in <tmp>
  change:  did you mean chats.jsonl?\
"""),
    )
    door.refuses(  # the config is used in the folder of the data, and not where it was written for
        "mine/chats.jsonl",
        snapshot("""\
mine/chats.jsonl: no such file
  seen:    looked in mine (which does not exist)
  change:  did you mean chats.jsonl?\
"""),
    )
    door.refuses(
        "a/b.jsonl",
        snapshot("""\
a/b.jsonl: no such file
  seen:    looked in a (which does not exist)
  change:  check the path; a hub dataset is named owner/name\
"""),
    )
    door.refuses(
        "~nobody-here/a.jsonl",
        snapshot("""\
~nobody-here/a.jsonl: no such file
  seen:    looked in ~nobody-here (which does not exist)
  change:  check the path; a hub dataset is named owner/name\
"""),
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "a.jsonl",
            snapshot("""\
a.jsonl: cannot be read
  seen:    Permission denied\
"""),
        ),
        (
            "a.parquet",
            snapshot("""\
a.parquet: cannot be read
  seen:    Permission denied\
"""),
        ),
    ],
    ids=["text", "pq"],
)
def test_5_an_unreadable_file(door: Door, model_folders: Path, name: str, message: str) -> None:
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
        door.refuses(name, message, model_name_or_path="model")
    finally:
        if is_root:
            os.seteuid(0)


def test_31_nothing_was_unpickled(door: Door) -> None:
    arrow_extension(Path("a.arrow"))
    door("a.arrow")
    assert not Path("unpickled").exists()
