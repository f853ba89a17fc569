"""metrics.jsonl read while it grows, in pieces of any size, and cut back by a resumed run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from solotune.run.events import ResumeEvent, StepEvent, to_line
from solotune.run.record import RunRecord
from solotune.run.tail import MetricsTail
from tests.display.test_progress import metrics

SAMPLE = (Path(__file__).parents[1] / "data" / "metrics-0.1.0.jsonl").read_bytes()


def steps(*numbers: int, loss: float = 2.0) -> bytes:
    return "".join(to_line(metrics(number, loss=loss)) for number in numbers).encode()


def add(folder: Path, content: bytes) -> None:
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(content)


@pytest.mark.parametrize("size", [7, 1000])
def test_in_pieces_it_is_what_it_is_at_once(tmp_path, size):
    tail, found = MetricsTail(tmp_path), []
    assert tail.poll().events == [], "not there yet"
    for begin in range(0, len(SAMPLE), size):
        add(tmp_path, SAMPLE[begin : begin + size])
        new = tail.poll()
        found += new.events
        assert not new.is_again
    assert repr(found) == repr(list(RunRecord.read(tmp_path).events)) and len(found) > 10


def test_a_torn_line_waits_for_its_end(tmp_path):
    tail = MetricsTail(tmp_path)
    whole = steps(1, 2)
    add(tmp_path, whole[:-1])  # the last line is whole JSON already
    assert [event.step for event in tail.poll().events] == [1]
    assert tail.poll().events == []
    add(tmp_path, b"\n")
    assert [event.step for event in tail.poll().events] == [2]


@pytest.mark.parametrize("more", [0, 1, 5, 40])
def test_after_a_resume_it_begins_again_also_if_the_file_is_longer_by_then(tmp_path, more):
    tail = MetricsTail(tmp_path)
    add(tmp_path, steps(1, 2, 3, 4))
    assert len(tail.poll().events) == 4
    (tmp_path / "metrics.jsonl").write_bytes(steps(1, 2))
    add(tmp_path, to_line(ResumeEvent(2, True, [], [])).encode() + steps(*range(3, 3 + more), loss=1.0))
    new = tail.poll()
    assert new.is_again
    assert [event.step for event in new.events if isinstance(event, StepEvent)] == [1, 2, *range(3, 3 + more)]
    assert tail.poll() == type(new)()


def test_a_folder_or_a_fifo_in_its_place_is_no_event(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert MetricsTail(tmp_path).poll().events == []
