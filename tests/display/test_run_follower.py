"""A run told to a display from its files: joined late, killed, resumed, ended, of another version."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest

from solotune.display.progress import make_display
from solotune.display.run_follower import RunFollower
from solotune.run.events import (
    DiagnosedEvent,
    EndEvent,
    EvalEvent,
    NonFiniteEvent,
    ResumeEvent,
    SaveEvent,
    StartEvent,
    to_line,
)
from solotune.run.run_dir import RunDirectory
from tests.display.test_progress import metrics

START = StartEvent(0, 100, 9, 9, None, 60, 1, 1, [], 1, "cpu")


class Heard:
    """Remember each call: its name, and the step of its event."""

    def __init__(self) -> None:
        self.calls: list = []

    def __getattr__(self, name: str):
        def told(*values: object) -> None:
            self.calls.append((name, *(getattr(value, "step", value) for value in values)))

        return told

    def take(self) -> list:
        taken, self.calls = self.calls, []
        return taken


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.path.mkdir()
    made.checkpoints.mkdir()
    (made.path / "plan.json").write_text(json.dumps({"predicted": {"peak_bytes": 2.5e9}}))
    return made


def log(run: RunDirectory, *events: object) -> None:
    for event in events:
        run.log(event)  # type: ignore[arg-type]


def following(run: RunDirectory) -> tuple[RunFollower, Heard]:
    heard = Heard()
    return RunFollower(run, heard, lambda event: f"in words {event.code}"), heard  # type: ignore[arg-type]


@pytest.fixture
def locked(monkeypatch) -> list[bool]:
    state = [True]
    monkeypatch.setattr(RunDirectory, "is_locked", lambda self: state[0])
    return state


def test_from_before_its_first_line_to_its_end(run, locked):
    locked[0] = False
    follower, heard = following(run)
    assert (follower.poll(), heard.take()) == ("waiting", [])
    locked[0] = True
    assert (follower.poll(), heard.take()) == ("running", [("phase", "starting")])
    log(run, START, metrics(1), metrics(2))
    assert follower.poll() == "running"
    assert heard.take() == [("planned", 2_500_000_000), ("begin", 100, 0), ("step", 1), ("step", 2)]
    assert (follower.poll(), heard.take()) == ("running", [])
    log(run, EvalEvent(2, 0.5, 1.25, 0.01, 99), SaveEvent(2, "step-000002"), DiagnosedEvent("F54", "measured", "x"))
    follower.poll()
    saved = ("saved", 2, run.checkpoints / "step-000002")
    (diagnosed,) = [call for call in heard.calls if call[0] == "diagnosed"]
    assert heard.take() == [("evaluated", 2, 60), saved, diagnosed] and diagnosed[2] == "in words F54"
    log(run, *(metrics(number) for number in range(3, 101)))
    run.adapter.mkdir()
    follower.poll()
    assert heard.take()[-1] == ("phase", "comparing base and tuned on held-out rows")
    log(run, EndEvent(100, 1))
    assert (follower.poll(), heard.take()) == ("running", []), "it writes its last files"
    locked[0] = False
    assert (follower.poll(), heard.take()) == ("finished", [("finish",)])


def test_of_a_run_that_went_on_for_long_the_last_part_is_told(run, locked):
    evals = [EvalEvent(number, 0.5, 1.25, 0.01, 99) for number in range(10, 1000, 10)]
    log(run, replace(START, total_steps=2000), *evals, *(metrics(number, 2000) for number in range(1, 1000)))
    follower, heard = following(run)
    follower.poll()
    told = heard.take()
    assert told[1] == ("begin", 2000, 0) and len(told) == 2 + 5 + 20
    assert [call[1] for call in told if call[0] == "evaluated"] == [950, 960, 970, 980, 990]
    assert told[-1] == ("step", 999)


def test_killed_and_resumed_it_is_told_once(run, locked):
    log(run, START, *(metrics(number) for number in range(1, 6)), SaveEvent(4, "step-000004"))
    mark = (run.path / "metrics.jsonl").read_bytes().index(to_line(metrics(5)).encode())
    follower, heard = following(run)
    follower.poll()
    heard.take()
    locked[0] = False
    assert (follower.poll(), heard.take()) == ("gone", [("finish",)])
    assert (follower.last_step, follower.total_steps, follower.saved) == (5, 100, SaveEvent(4, "step-000004"))
    locked[0] = True
    whole = (run.path / "metrics.jsonl").read_bytes()
    (run.path / "metrics.jsonl").write_bytes(whole[:mark])
    log(run, ResumeEvent(4, True, [], []), metrics(5, loss=1.0), metrics(6))
    assert follower.poll() == "running"
    assert heard.take() == [("begin", 100, 4), ("step", 5), ("step", 6)]


def test_what_ended_it_is_known_until_it_is_resumed(run, locked):
    log(run, START, metrics(1), NonFiniteEvent(2, seen="loss nan"))
    locked[0] = False
    follower, _ = following(run)
    assert follower.poll() == "gone" and follower.failure == NonFiniteEvent(2, seen="loss nan")
    locked[0] = True
    log(run, ResumeEvent(1, True, [], []))
    follower.poll()
    assert follower.failure is None
    again, _ = following(run)
    again.poll()
    assert again.failure is None, "joined after the resume"


def test_a_run_of_another_version_without_its_numbers_is_shown(run, locked):
    line = b'{"event": "step", "step": 7}\n'
    (run.path / "metrics.jsonl").write_bytes(line)
    (run.path / "plan.json").write_text("{")
    follower, heard = following(run)
    follower.poll()
    assert heard.take() == [("begin", 7, 6), ("step", 7)]
    shown = io.StringIO()
    follower = RunFollower(run, make_display(1, shown), lambda event: "")
    log(run, replace(metrics(8), step_seconds=math.nan, num_tokens=0, total_weight=0.0, peak_bytes=0))
    follower.poll()
    assert [line.split()[:2] for line in shown.getvalue().splitlines()[1:]] == [["step", "7/7"], ["step", "8/7"]]
