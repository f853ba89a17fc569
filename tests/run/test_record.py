"""Any run, read back: whole, crashed, damaged, of another version; and `solotune runs` over all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import solotune
from solotune.run.events import DeviceFailedEvent, DiagnosedEvent, EndEvent, NonFiniteEvent, SaveEvent
from solotune.run.record import RunRecord, json_object, number_in

SAMPLE = (Path(__file__).parents[1] / "data" / "metrics-0.1.0.jsonl").read_bytes()
NESTED = b'{"event": "step", "step": 9, "x": ' + b"[" * 100_000
STEP = {"event": "step", "step": 3, "total_steps": 9, "loss": 1.5, "tokens_per_second": 10.0, "peak_bytes": 2**30}


def a_run(folder: Path, metrics: bytes | None = SAMPLE, **files: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("model_name_or_path: m\ndataset: d.jsonl\nkey_of_tomorrow: 1\n")
    if metrics is not None:
        (folder / "metrics.jsonl").write_bytes(metrics)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content)
    return folder


def lines(*events: dict) -> bytes:
    return "".join(json.dumps(event) + "\n" for event in events).encode()


def test_a_whole_run(tmp_path):
    record = RunRecord.read(a_run(tmp_path / "run", evaluation='{"base": {"loss": 2.5}}', data="{}"))
    assert len(record.events) == len(SAMPLE.splitlines())
    assert record.start is not None and record.start.train_rows == 50
    assert [event.step for event in record.steps] == [1] and record.last_step == 1 and record.total_steps == 6
    assert [event.step for event in record.evals] == [6]
    assert record.resumed_steps == (3,)
    assert [type(failure) for failure in record.failures] == [NonFiniteEvent, NonFiniteEvent, DeviceFailedEvent]
    assert [event.code for event in record.of(DiagnosedEvent)] == ["F54"]
    assert record.of(SaveEvent) == (SaveEvent(2, "step-000002"),)
    assert record.is_finished and record.peak_bytes == 535638016
    assert record.medians()["step_seconds"] == 0.10849132399994232
    assert record.evaluation == {"base": {"loss": 2.5}} and record.data == {}
    assert record.config is not None and record.config["key_of_tomorrow"] == 1


def test_a_crashed_run_has_what_was_whole(tmp_path):
    torn = SAMPLE.splitlines(keepends=True)[:5]
    record = RunRecord.read(a_run(tmp_path / "run", b"".join(torn) + b'{"event": "eval", "step": 7, "lo'))
    assert len(record.events) == 5 and not record.is_finished and record.last_step == 1


@pytest.mark.parametrize("order", [["event", "step", "peak_bytes"], ["step", "peak_bytes", "event"]])
def test_the_end_is_found_with_its_offset_whatever_the_order_of_its_keys(tmp_path, order):
    end = {"event": "end", "step": 6, "peak_bytes": 1}
    before = lines(STEP) + '{"event": "diagnosed", "code": "é", "x": {"event": "end"}}\n'.encode() + b"junk \xff\n"
    record = RunRecord.read(a_run(tmp_path / "run", before + lines({key: end[key] for key in order}) + b"\n"))
    assert record.end == (len(before), EndEvent(6, 1))


def test_of_two_starts_and_ends_the_last_counts(tmp_path):
    first, second = ({"event": "start", "step": 0, "train_rows": rows} for rows in (7, 8))
    end = {"event": "end", "step": 6, "peak_bytes": 1}
    record = RunRecord.read(a_run(tmp_path / "run", lines(first, end, second, end)))
    assert record.start is not None and record.start.train_rows == 8
    assert record.end is not None and record.end.offset == len(lines(first, end, second))


@pytest.mark.parametrize(
    "made", [None, b"", b"\x00\xff\n", NESTED, b"[]\n7\n"], ids=["none", "empty", "bytes", "deep", "json"]
)
def test_nothing_that_can_be_read_is_an_empty_record(tmp_path, made):
    record = RunRecord.read(a_run(tmp_path / "run", made, data="[" * 100_000, plan="[1]", environment='{"a": '))
    (record.path / "diagnosis.json").mkdir()
    (record.path / "evaluation.json").write_bytes(b'{"a": "\xff"}')
    (record.path / "config.yaml").write_text("a: [")
    assert (record.events, record.steps, record.start, record.end) == ((), (), None, None)
    assert (record.last_step, record.total_steps, record.peak_bytes) == (0, None, None)
    assert record.medians() == {"step_seconds": None, "tokens_per_second": None}
    found = [record.config, record.environment, record.data, record.plan, record.evaluation, record.diagnosis]
    assert found == [None] * 6 and record.fingerprints is None
    assert RunRecord.read(tmp_path / "nowhere").events == ()


START = {"event": "start", "step": 0, "total_steps": 30}


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([], "1"),
        ([START], "1"),
        ([{**START, "world_size": 2}, {"event": "resume", "step": 10, "world_size": 2}], "2"),
        ([{**START, "world_size": 4}, {"event": "resume", "step": 10}], "4, then 1 from step 11 on"),
        ([START, {"event": "resume", "step": 1000, "world_size": 2}], "1, then 2 from step 1,001 on"),
        (  # the second resume went back to an older checkpoint
            [START, {"event": "resume", "step": 20, "world_size": 2}, {"event": "resume", "step": 10, "world_size": 4}],
            "1, then 4 from step 11 on",
        ),
        ([{**START, "world_size": -3}, {"event": "resume", "step": 10, "world_size": "x"}], "1"),
    ],
)
def test_how_many_ranks_a_run_had_and_from_where(tmp_path, events, words):
    record = RunRecord.read(a_run(tmp_path / "run", lines(*events)))
    assert record.ranks_in_words() == words
    assert record.has_several_ranks == (words != "1")


def test_medians_and_totals_leave_out_steps_that_lack_them(tmp_path):
    bare = {"event": "step", "step": 4}
    steps = [{**STEP, "tokens_per_second": speed} for speed in (30.0, 10.0, 20.0)]
    record = RunRecord.read(a_run(tmp_path / "run", lines(*steps, bare)))
    assert (record.last_step, record.total_steps, record.peak_bytes) == (4, 9, 2**30)
    assert record.medians() == {"step_seconds": None, "tokens_per_second": 20.0}


def test_numbers_in_json_are_finite_or_none():
    found = {"a": {"b": 1.5, "c": "1", "d": True, "e": float("nan"), "f": float("inf"), "g": 10**400, "h": [1]}}
    assert number_in(found, "a", "b") == 1.5
    assert [number_in(found, "a", key) for key in ("c", "d", "e", "f", "g", "h", "i")] == [None] * 7
    assert number_in(None, "a") is None and number_in([1], "a") is None and number_in(found, "a", "b", "c") is None


def test_a_file_too_large_to_be_of_a_run_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert json_object(tmp_path / "a.json") == {"a": 1}
    monkeypatch.setattr("solotune.run.record.MAX_JSON_BYTES", 7)
    assert json_object(tmp_path / "a.json") is None


DAMAGED = {
    "steps_without_keys": lines({"event": "step", "step": 2}),
    "steps_without_step": lines({"event": "step", "loss": 1.0}),
    "deep": NESTED,
    "not_numbers": lines(
        STEP | {"loss": float("nan"), "tokens_per_second": "x", "peak_bytes": [], "total_steps": None}
    ),
    "huge": lines(STEP | {"loss": 10**400, "total_steps": 10**400}),
    "bytes": b"\xff\xfe\x00",
}


def test_no_damaged_run_hides_the_others(tmp_path):
    """`solotune runs` lists each with what can be read of it."""
    for name, metrics in DAMAGED.items():
        a_run(tmp_path / name, metrics)
    for name, content in {"list": "[]", "text": '{"base": 1}', "torn": '{"base"', "deep2": "[" * 100_000}.items():
        a_run(tmp_path / name, lines(STEP), evaluation=content)
    good = {"base": {"loss": 2.5}, "tuned": {"loss": 1.5}, "scores": {"exact_match": {"tuned": 0.5}}}
    a_run(tmp_path / "good", lines(STEP, {"event": "end", "step": 9}), evaluation=json.dumps(good))
    found = {run.name: run for run in solotune.runs(tmp_path)}
    assert len(found) == len(DAMAGED) + 5
    assert found["good"].to_json() == {
        "name": "good", "path": str(tmp_path / "good"), "status": "finished", "steps": 3, "total_steps": 9,
        "train_loss": 1.5, "base_loss": 2.5, "tuned_loss": 1.5, "exact_match": 0.5, "tokens_per_second": 10.0,
        "peak_bytes": 2**30,
    }  # fmt: skip
    figures = {name: (run.steps, run.total_steps, run.train_loss, run.tokens_per_second) for name, run in found.items()}
    assert figures["steps_without_keys"] == (2, None, None, None)
    assert figures["steps_without_step"] == figures["deep"] == figures["bytes"] == (0, None, None, None)
    assert figures["not_numbers"] == (3, None, None, None)
    assert figures["huge"] == (3, None, None, 10.0)
    assert all(
        figures[name] == (3, 9, 1.5, 10.0) and found[name].base_loss is None for name in ("list", "text", "torn")
    )


def test_a_run_is_read_without_torch_and_rich():
    code = (
        "import sys; from solotune.display import observer; from solotune.run import events, record, run_dir, run_log; "
        "run_dir.summarize_run(run_dir.RunDirectory(run_dir.Path('.'))); "
        "sys.exit(bool({'torch', 'rich', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
