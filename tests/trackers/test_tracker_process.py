"""What a tracker's process sends: each step once, also after a resume; how the run ended; and its time limits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from solotune.run.events import EvalEvent, to_line
from solotune.run.output_dir import check_destination
from solotune.trackers import tracker_process
from solotune.trackers.libraries import Library, TrackedRun
from solotune.trackers.tracker_process import main
from tests.display.test_progress import metrics
from tests.trackers.test_observer import SECRET, a_run


class Recorded:
    """A tracker that remembers."""

    calls: list = []  # noqa: RUF012

    def start(self, config, run: TrackedRun):
        self.calls.append(("start", run.id, run.resumed_step))
        return "id-1", "somewhere"

    def log(self, step, values):
        self.calls.append((step, *(name for name in values if name.endswith("loss"))))

    def finish(self, status):
        self.calls.append(status)


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setitem(tracker_process.LIBRARIES, "mlflow", Library("mlflow", Recorded))
    monkeypatch.setattr(tracker_process, "ended", lambda seconds: "killed")
    Recorded.calls = []
    return Recorded.calls


def test_a_resumed_run_goes_on_as_the_same_run_without_what_was_sent(calls, tmp_path):
    run = a_run(tmp_path / "run", 4)
    assert main("mlflow", run, None) == 0
    assert calls[1:] == [(1, "train/loss"), (2, "train/loss"), (3, "train/loss"), "killed"]
    del calls[:]
    with (run / "metrics.jsonl").open("a") as file:  # the evaluation after the checkpoint was made after the resume
        file.write(to_line(EvalEvent(3, 0.5, 1.25, 0.01, 99)) + to_line(metrics(4)))
    check_destination(str(run), "command line", "model")  # a resumed run may find the trackers' folder
    assert main("mlflow", run, 3) == 0
    assert calls == [("start", "id-1", 3), (3, "eval/loss"), (4, "train/loss"), "killed"]
    assert json.loads((run / "trackers/mlflow.json").read_text()) == {
        "id": "id-1", "where": "somewhere", "step": 4, "problem": "", "finished": True,
    }  # fmt: skip
    (run / "trackers/mlflow.json").write_text("{")
    del calls[:]
    main("mlflow", run, 3)
    assert calls[0][2] is None, "without its id it is a new run there, and gets all steps from the file"


def test_a_failure_stands_in_the_report_without_secrets(calls, tmp_path, monkeypatch):
    def log(self, step, values):
        raise SystemExit(f"no access with {SECRET}")

    monkeypatch.setattr(Recorded, "log", log)
    assert main("mlflow", a_run(tmp_path / "run", 4), None) == 1
    report = json.loads((tmp_path / "run/trackers/mlflow.json").read_text())
    assert (report["problem"], report["step"]) == ("SystemExit: no access with ***", 0)


@pytest.mark.parametrize(
    ("sent", "status"), [(b"finished\n", "finished"), (b"failed\n", "failed"), (b"", "killed"), (b"x", "killed")]
)
def test_how_a_run_ended(sent, status):
    orders, run = os.pipe()
    assert tracker_process.ended(0.0, orders) is None, "it goes on"
    os.write(run, sent)
    os.close(run)
    assert tracker_process.ended(5.0, orders) == status
    os.close(orders)


def test_a_call_that_never_returns_is_ended_by_the_kernel():
    program = (
        "import re; from solotune.trackers import tracker_process as process; process.CALL_SECONDS = 0.1\n"
        "with process.limited(): re.match('(a+)+$', 'a' * 64 + 'b')"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=20).returncode == -signal.SIGALRM


def test_numbers_that_are_not_finite_are_left_out():
    event = replace(metrics(1), loss=float("nan"), grad_norm=float("inf"))
    assert {"train/learning_rate", "train/epoch"} <= (found := tracker_process.values_of(event)).keys()
    assert not {"train/loss", "train/grad_norm"} & found.keys()
