"""The lines of metrics.jsonl: the bytes that version 0.1.0 wrote, every event there and back, and lines of others."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path

import pytest

from solotune.run import events
from solotune.run.events import (
    NAMES,
    EndEvent,
    EvalEvent,
    NonFiniteEvent,
    PreflightEvent,
    ResumeEvent,
    SaveEvent,
    StartEvent,
    StepEvent,
    from_line,
    to_line,
)

RECORDED = (Path(__file__).parents[1] / "data" / "metrics-0.1.0.jsonl").read_bytes().splitlines(keepends=True)
"""Written by runs of the code before `events` was a module: each kind of line, both forms of non_finite."""


@pytest.mark.parametrize("line", RECORDED, ids=lambda line: line[11:24].decode())
def test_recorded_lines_come_back_byte_for_byte(line):
    event = from_line(line)
    assert event is not None
    assert to_line(event).encode() == line


def test_every_kind_is_among_the_recorded_lines():
    assert {type(from_line(line)) for line in RECORDED} == set(NAMES)
    assert [len(NAMES), len(set(NAMES.values()))] == [10, 10]


@pytest.mark.parametrize(
    "event",
    [
        StartEvent(0, 6, 50, 50, 0.97, 0, 7424, 85568, [{"r": 4, "target_modules": ["q_proj"]}], 1, "cuda"),
        ResumeEvent(3, False, ["torch was 2.10, is 2.11"], ["step-000006: random.safetensors: é\u2028"]),
        PreflightEvent(4, 152, 0, 0, 2**40, 1.5, 0.25, 0, 0.08, 0),
        EvalEvent(4, 0.5, 1.25, math.inf, 91),  # one row has no standard error
        NonFiniteEvent(4, tensors=[]),
        NonFiniteEvent(4, [], "loss nan", [], [], "transient"),
        EndEvent(0, 0),
    ],
    ids=lambda event: type(event).__name__,
)
def test_an_event_goes_there_and_back(event):
    line = to_line(event)
    assert line.count("\n") == 1 and line.endswith("\n")
    assert from_line(line.encode()) == event


def test_keys_stand_in_the_order_of_the_fields_and_defaults_are_left_out():
    assert list(json.loads(to_line(EndEvent(6, 1)))) == ["event", "step", "peak_bytes"]
    assert to_line(NonFiniteEvent(4, tensors=["a"])) == '{"event": "non_finite", "step": 4, "tensors": ["a"]}\n'


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b'{"event": "step", "st',
        b'{"event": "save", "step": 1, "path": "\xc3',
        b"7",
        b"[1]",
        b"null",
        b'"step"',
        b"{}",
        b'{"event": "stop", "step": 1}',
        b'{"event": null, "step": 1}',
        b'{"event": ["step"], "step": 1}',
        b'{"event": "step"}',
        b'{"event": "step", "step": "x"}',
        b'{"event": "step", "step": 1.5}',
        b'{"event": "step", "step": true}',
        b'{"event": "step", "step": 1' + b"0" * 30 + b"}",
        b'{"event": "step", "step": 1' + b"0" * 5000 + b"}",
        b'{"event": "step", "step": 1, "x": ' + b"[" * 200_000,
        b'{"event": "start", "step": 0, "x": ' + b'{"a":' * 200_000 + b"1" + b"}" * 200_001,
    ],
    ids=lambda line: line[:34].decode(errors="replace"),
)
def test_what_is_no_event_is_none(line):
    assert from_line(line) is None


def test_keys_of_other_versions_are_passed_over_and_absent_ones_are_unknown():
    event = from_line(b'{"new": {"a": 1}, "step": 3, "event": "step", "loss": 2}')
    assert isinstance(event, StepEvent)
    assert (event.step, event.loss, event.total_steps, event.peak_bytes) == (3, 2, 0, 0)
    assert math.isnan(event.learning_rate) and math.isnan(event.step_seconds)
    start = from_line(b'{"event": "start", "step": 0}')
    assert start == StartEvent(0, None, None, None, None, None, None, None, [], None, "")


@pytest.mark.parametrize("value", ['"1"', "null", "true", "[]", "{}", "NaN", "-Infinity", "1e400", "1" + "0" * 400])
def test_values_of_other_types_never_raise_and_never_pass_as_the_fields_own(value):
    for kind, name in NAMES.items():
        keys = [field.name for field in fields(kind) if field.name != "step"]
        line = f'{{"event": "{name}", "step": 1, {", ".join(f"{json.dumps(key)}: {value}" for key in keys)}}}'
        event = from_line(line.encode())
        assert type(event) is kind
        for field in fields(kind):
            found, hint = getattr(event, field.name), str(field.type)
            types = {"int": int, "float": (int, float), "str": str, "bool": bool, "dict[str, Any]": dict}
            allowed = types.get(hint.split(" |")[0], list)
            assert isinstance(found, allowed) or (found is None and "None" in hint), (kind, field.name)
            assert not isinstance(found, bool) or hint == "bool"
            assert not isinstance(found, int) or abs(found) < 2**63


def test_events_are_read_without_torch_and_rich():
    source = Path(events.__file__).read_text()
    assert "torch" not in source and "rich" not in source
    assert from_line(to_line(SaveEvent(2, "step-000002")).encode()) == SaveEvent(2, "step-000002")
