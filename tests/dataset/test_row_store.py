"""Rows lie on disk and not in memory, come back as they were, and a full disk is an error with words."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from array import array
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inline_snapshot import snapshot

from solotune.dataset import prepare, row_store
from solotune.dataset.chat.formats import Record
from solotune.dataset.example import Example, Examples, ids_of, lengths_of
from solotune.dataset.readers.row import RowError
from solotune.dataset.records import packed, unpacked
from solotune.dataset.row_store import Store
from solotune.errors import StorageError
from tests.dataset.conftest import ROOT, Writer, chat, config_of, tiny_tokenizer
from tests.messages import stable


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "solotune" / "data"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=st.lists(st.binary(max_size=30), max_size=20), tail=st.integers(1, 100))
def test_what_is_appended_comes_back(monkeypatch: pytest.MonkeyPatch, items: list[bytes], tail: int) -> None:
    """Read between the appends too, whatever part is still in memory."""
    monkeypatch.setattr(row_store, "TAIL_BYTES", tail)
    held = Store()
    for number, item in enumerate(items, 1):
        held.append(item)
        assert list(held) == items[:number]
    whole = b"".join(items)
    assert (len(held), held.num_bytes, b"".join(held.pieces())) == (len(items), len(whole), whole)
    assert [held.read(begin, len(whole)) for begin in range(len(whole))] == [whole[b:] for b in range(len(whole))]
    assert held[1:] == items[1:]
    if items:
        assert held[-1] == items[-1]
    with pytest.raises(IndexError):
        held[len(items)]


def test_small_data_touches_no_disk_and_large_data_has_no_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Store()
    held.append(b"x" * 1000)
    assert not place.exists()
    monkeypatch.setattr(row_store, "TAIL_BYTES", 1000)
    held.append(b"y" * 1000)
    assert list(place.iterdir()) == []
    assert list(held) == [b"x" * 1000, b"y" * 1000]


def test_a_folder_that_cannot_be_written_is_passed_over(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.parent.mkdir()
    place.write_text("a file where the folder should be")
    monkeypatch.setattr(row_store, "TAIL_BYTES", 1)
    held = Store()
    held.append(b"abc")
    assert held[0] == b"abc"


def test_a_file_that_was_cut_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b"headabcdef")
    with path.open("rb") as file:
        held = Store.of(file, 4, array("Q", [3, 6]))
        assert list(held) == [b"abc", b"def"]
        os.truncate(path, 8)
        assert held[0] == b"abc"
        with pytest.raises(StorageError) as caught:
            held[1]
        assert stable(caught.value) == snapshot("""\
<tmp>/solotune/data: temporary rows cannot be read back
  seen:    the file is shorter than it was\
""")


def test_a_full_disk_is_said_and_nothing_is_left(write: Writer, place: Path) -> None:
    """The real refusal: a limit on the size of files."""
    path = write("a.jsonl", *({"messages": chat(f"q {n}", "word " * 200)} for n in range(100)))
    code = f"""
import resource
from solotune.dataset import prepare, row_store
from tests.dataset.conftest import config_of, tiny_tokenizer
row_store.TAIL_BYTES = 10_000
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
prepare(config_of({str(path)!r}), tiny_tokenizer("chatml"))
"""
    done = in_a_process(code)
    assert done.stderr.splitlines()[-3:] == [
        f"solotune.errors.StorageError: {place}: temporary rows cannot be written",
        "  seen:    File too large, after 0.0 GiB",
        "  change:  free some disk space, or set XDG_CACHE_HOME to a folder on another disk",
    ]
    assert list(place.iterdir()) == []


def in_a_process(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=cwd)


RECORD = Record(
    "a.jsonl:1",
    messages=[
        {"role": "user", "content": 'é漢 "\n\u2028 \ud800'},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1.5}}}]},
    ],
    tools=[{"type": "function", "function": {"name": "f"}}],
    weights=(0.5,),
    weight=2.0,
    group="shop=3",
)


@pytest.mark.parametrize("record", [RECORD, Record("t[2]", text="a text", answer_start=2)])
def test_records_come_back(record: Record) -> None:
    assert unpacked(packed(record)[0]) == record


def test_what_json_has_not_is_refused_and_not_changed(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    call = {"function": {"name": "f", "arguments": {"day": datetime.date(2026, 1, 2)}}}
    rows = [{"messages": [*chat("q"), {"role": "assistant", "content": "a", "tool_calls": [call]}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(RowError) as caught:
        prepare(config_of(tmp_path / "a.parquet"), tiny_tokenizer("chatml"))
    assert stable(caught.value) == snapshot("""\
a.parquet[0]: tools or tool calls hold a value that is not JSON
  seen:    date 2026-01-02
  allowed: texts, numbers, true, false, null, lists and objects\
""")


@pytest.mark.parametrize("tail", [1, 1 << 20])
def test_examples_come_back(monkeypatch: pytest.MonkeyPatch, tail: int) -> None:
    monkeypatch.setattr(row_store, "TAIL_BYTES", tail)
    wanted = [
        Example(
            np.arange(n, dtype=np.int32),
            np.arange(n) % 3 == 0,
            f"a:{n}",
            chat("é", "b"),
            [{"a": n}] if n else None,
            np.arange(n, dtype=np.float32) / 3 if n % 2 else None,
        )
        for n in range(5)
    ]
    held = Examples()
    for one in wanted:
        held.append(one)
    for one, other in zip(held, wanted, strict=True):
        assert (one.where, one.messages, one.tools) == (other.where, other.messages, other.tools)
        assert (one.input_ids.dtype, one.loss_mask.dtype) == (np.int32, bool)
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.loss_mask.tolist() == other.loss_mask.tolist()
        assert (one.weights is None) == (other.weights is None)
        assert one.weights is None or one.weights.tolist() == other.weights.tolist()
    assert [*lengths_of(held)] == lengths_of(wanted) == [0, 1, 2, 3, 4]
    assert [ids.tolist() for ids in ids_of(held)] == [ids.tolist() for ids in ids_of(wanted)]


# everything but the tokenizer, whose minute for 200 MB is not what is tested
LONG_ROWS = """
import json
import numpy as np
from solotune.dataset import Example
from solotune.dataset.example import Examples
from solotune.dataset.prepare import _both_sides, _silent, _sources
from solotune.dataset.data_report import DataReport
from tests.dataset.conftest import chat, config_of

def peak_of(num_rows):
    with open("a.jsonl", "w") as file:
        for n in range(num_rows):
            print(json.dumps({"messages": chat(f"q {n}", f"{n}" + "a" * 150_000), "other": "b" * 50_000}), file=file)
    config = config_of("a.jsonl", validation_size=0.1)
    train, validation, _ = _both_sides(
        config.source, config.split, DataReport(""), *_sources(config.source), _silent
    )
    examples = Examples()
    for record in train:
        examples.append(Example(np.zeros(2048, np.int32), np.ones(2048, bool), record.where, record.messages))
    assert len(train) == num_rows * 9 // 10
    assert all(len(one.messages[1]["content"]) > 150_000 for one in examples)
    # not ru_maxrss: a process that was forked starts with its parent's
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

print(*map(peak_of, (20, 1000)))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, place: Path) -> None:
    """200 MB of rows, which take 50; examples held in memory take 150, records 280."""
    done = in_a_process(LONG_ROWS, cwd=tmp_path)
    few, many = map(float, done.stdout.split())
    assert many - few < 100, f"MiB: {few} for 20 rows, {many} for 1,000"
    assert list(place.iterdir()) == []
