"""Valid files with some bytes changed: each is read as rows, or refused by its name. Never another exception.

`campaign` is the same for as long as one likes:

    python -c "from tests.dataset.readers.test_files_byte_edits import campaign; campaign(seconds=600, seed=0)"
"""

from __future__ import annotations

import gzip
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from solotune.dataset.readers.files import read_file
from solotune.errors import InputError
from tests.dataset.conftest import chat

ROWS = [
    {"messages": chat(f"Wie heißt {n}? 漢\U0001f600", f'Zahl\n{n}, "so".'), "id": n, "score": n / 7, "note": None}
    for n in range(9)
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
CSV = 'prompt,completion\n"a, ""b""\nc",d\né,f\n'.encode()


def _ipc(new: Callable[..., pa.ipc.RecordBatchStreamWriter]) -> bytes:
    table = pa.Table.from_pylist(ROWS)
    sink = pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return sink.getvalue().to_pybytes()


@cache
def whole() -> dict[str, bytes]:
    """Valid files by name."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=4)
    return {
        "a.jsonl": LINES,
        "a.json": json.dumps(ROWS, indent=1).encode(),
        "lines.json": LINES,
        "a.csv": CSV,
        "a.tsv": CSV.replace(b",", b"\t"),
        "a.parquet": sink.getvalue().to_pybytes(),
        "file.arrow": _ipc(pa.ipc.new_file),
        "stream.arrow": _ipc(pa.ipc.new_stream),
        "a.jsonl.gz": gzip.compress(LINES, mtime=0),
        "a.json.gz": gzip.compress(json.dumps(ROWS).encode(), mtime=0),
        "a.jsonl.zst": pa.compress(LINES, codec="zstd", asbytes=True),
        "a.csv.zst": pa.compress(CSV, codec="zstd", asbytes=True) * 2,
    }


Edit = tuple[str, int, int, bytes]
EDITS = ("flip", "set", "insert", "delete", "repeat", "cut")


def edited(data: bytes, edits: list[Edit]) -> bytes:
    """Each edit is (what, where, how long or which bit, new bytes)."""
    for what, place, number, new in edits:
        at = place % (len(data) + 1)
        rest = data[at:]
        if what == "flip" and rest:
            rest = bytes([rest[0] ^ 1 << number % 8]) + rest[1:]
        elif what == "set":
            rest = new + rest[len(new) :]
        elif what == "insert":
            rest = new + rest
        elif what == "delete":
            rest = rest[number:]
        elif what == "repeat":
            rest = rest[:number] + rest
        elif what == "cut":
            rest = b""
        data = data[:at] + rest
    return data


def outcome(path: Path, name: str, data: bytes) -> str:
    """`rows`, or `refused` with a message that names the file."""
    path = path / name
    path.write_bytes(data)
    problem, rows = name, []
    try:
        rows = list(read_file(path, name))
    except InputError as error:
        problem = error.problem
    assert problem.startswith(name)
    for row in rows:
        assert row.where.startswith(name)
        json.dumps(row.values, default=str).encode()  # no value that cannot be looked at
    return "rows" if rows or problem == name else "refused"


# bytes that mean something somewhere, and any others
_NEW = st.sampled_from(
    [b"\0", b"\n", b"\r", b'"', b"\\", b"\\ud800", b"{", b"[", b"]", b"NaN", b"1e999", b"\xff", b"\xff" * 8, b"PAR1"]
)
_EDIT = st.tuples(
    st.sampled_from(EDITS), st.integers(0, 9999), st.integers(0, 99), _NEW | st.binary(min_size=1, max_size=9)
)


@pytest.mark.parametrize("name", whole())
def test_the_whole_files_are_read(tmp_path: Path, name: str) -> None:
    assert outcome(tmp_path, name, whole()[name]) == "rows"


@pytest.mark.parametrize("name", whole())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(_EDIT, min_size=1, max_size=4))
@example(edits=[("cut", 9999, 0, b"")])
def test_files_with_changed_bytes(tmp_path: Path, name: str, edits: list[Edit]) -> None:
    outcome(tmp_path, name, edited(whole()[name], edits))


@pytest.mark.parametrize("edit", [("flip", 3275, 46, b""), ("set", 2586, 0, b"#vO\x90\x85")], ids=str)
def test_columns_with_damaged_metadata_do_not_end_the_process(tmp_path: Path, edit: Edit) -> None:
    """Arrow's `RowGroupMetaData.column` ends the process for these."""
    assert outcome(tmp_path, "a.parquet", edited(whole()["a.parquet"], [edit])) in ("refused", "rows")


def campaign(seconds: float, seed: int) -> None:
    """Random edits until the time is up; prints counts by file and outcome, and the slowest reading."""
    draw, until, counts, slowest = (
        random.Random(seed),
        time.monotonic() + seconds,
        Counter[tuple[str, str]](),
        (0.0, ""),
    )
    new = [b"\0", b"\n", b"\r", b'"', b"\\", b"\\ud800", b"{", b"[", b"NaN", b"1e999", b"\xff", b"\xff" * 8, b"PAR1"]
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < until:
            name = draw.choice(list(whole()))
            edits = [
                (draw.choice(EDITS), draw.randrange(10**4), draw.randrange(100), draw.choice([*new, draw.randbytes(4)]))
                for _ in range(draw.randint(1, 4))
            ]
            Path(folder, "edits.txt").write_text(f"{name} {edits}")  # what to look at after a crash of native code
            started = time.monotonic()
            counts[name, outcome(Path(folder), name, edited(whole()[name], edits))] += 1
            slowest = max(slowest, (time.monotonic() - started, f"{name} {edits}"))
    for (name, result), number in sorted(counts.items()):
        print(f"{name:13} {result:8} {number:,}")
    print(f"{counts.total():,} files; slowest {slowest}")
