"""Trackers that fail, hang, crash and are slow: the run does not notice, and says each of it once.

The libraries are stand-ins that misbehave, in real processes; the real ones are in test_libraries_real.py.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

import solotune
from solotune.errors import InputError
from solotune.run.events import DeviceFailedEvent, DiagnosedEvent, EvalEvent, StartEvent, to_line
from solotune.run.record import RunRecord
from solotune.trackers import observer
from solotune.trackers.libraries import require
from solotune.trackers.observer import Trackers
from tests.display.test_progress import metrics

SECRET = "hf_abcdefghijklmnopqrstuvwx"
STAND_INS = {
    "tensorboardX": f'class SummaryWriter:\n    def __init__(self, *a, **k): raise OSError("403 for {SECRET}\\n...")',
    # a call of native code that never returns holds Python's global lock
    "wandb": "import re\ndef Settings(**k): pass\ndef init(**k): re.match('(a+)+$', 'a' * 64 + 'b')",
    "mlflow": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
    "trackio": """
import os, time
def say(*words): open(os.environ["TRACKIO_OUT"], "a").write(repr(words) + "\\n")
def init(**k): say("init", k["name"], k["config"])
def log(values, step): time.sleep(0.005); say(step, *values.items())
def finish(): say("finish")
""",
}


@pytest.fixture
def stand_ins(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "libraries"
    folder.mkdir()
    for name, text in STAND_INS.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("TRACKIO_OUT", str(tmp_path / "out"))
    return folder


def a_run(folder: Path, steps: int) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(f"lora_r: 16\nbf16: true\ndataset: [a.jsonl, 'http://u:{SECRET}@b']\nseed:\n")
    start = StartEvent(0, steps, 9, 9, None, 1, 1, 1, [], 1, "cpu")
    lines = [to_line(start), *(to_line(metrics(number, steps, grad_norm=float("nan"))) for number in range(1, steps))]
    lines.insert(2, to_line(DiagnosedEvent("F54", "measured", "x")) + to_line(DeviceFailedEvent("full", None)))
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_what_trackers_do_wrong_does_not_reach_the_run(stand_ins, tmp_path, monkeypatch):
    monkeypatch.setattr(observer, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(observer, "FINISH_SECONDS", 2.0)
    run, said = a_run(tmp_path / "run", 50), []
    names = ["tensorboard", "wandb", "mlflow", "trackio"]
    require(names)
    trackers, began = Trackers(names, run, said.append), time.monotonic()
    trackers.begin(50)
    processes = dict(trackers._processes)
    for number in range(1, 50):
        trackers.step(metrics(number))
    assert time.monotonic() - began < 1, "the run waited"
    with (run / "metrics.jsonl").open("a") as file:
        file.write(to_line(metrics(50)) + to_line(EvalEvent(50, 0.5, 1.25, 0.01, 99)))
    (run / "evaluation.json").write_text('{"base": {"loss": 2.5}, "tuned": {"loss": 1.25}}')
    trackers.close("finished")
    waited = time.monotonic() - began
    trackers.close("failed")  # as the run's last act; says nothing more
    processes["wandb"].kill()
    said = sorted(re.sub(r"process \d+", "process N", line) for line in said)
    assert said == [
        "trackio: trackio show --project solotune",
        "wandb is slow or does not answer: it has the run up to step 0. The rest is still being sent (process N); "
        "metrics.jsonl has everything",
        "warning: mlflow failed and gets nothing more of this run (its process ended with -11); the run is not "
        "affected",
        "warning: tensorboard failed and gets nothing more of this run (OSError: 403 for ***); the run is not affected",
    ]
    assert 2 <= waited < 5
    sent = [eval(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert sent[0] == ("init", "run", {"lora_r": 16, "bf16": True, "dataset": '["a.jsonl", "http://***@b"]'})
    assert [one[0] for one in sent[1:]] == [*range(1, 51), 50, 50, "finish"]
    assert ("train/loss", 2.0) in sent[1] and "train/grad_norm" not in dict(sent[1][1:])
    assert sent[-3][1:] == (("eval/loss", 1.25), ("eval/stderr", 0.01), ("eval/exact_match", 0.5))
    assert sent[-2][1:] == (("eval/base_loss", 2.5), ("eval/tuned_loss", 1.25))
    assert SECRET not in "".join(path.read_text() for path in (run / "trackers").iterdir())


def test_a_run_reports_to_its_trackers_and_is_not_changed_by_one_that_fails(stand_ins, tmp_path, chat_config):
    result = solotune.train(chat_config, report_to=["trackio", "mlflow"], max_steps=2)
    sent = [eval(line) for line in (tmp_path / "out").read_text().splitlines()]
    losses = [(one.step, one.loss) for one in RunRecord.read(result.run_dir).steps]
    assert [(one[0], dict(one[1:])["train/loss"]) for one in sent[1:-1] if "train/loss" in dict(one[1:])] == losses
    assert sent[0][2]["max_steps"] == 2 and sent[-1] == ("finish",)
    log = (result.run_dir / "log.txt").read_text()
    assert log.count("mlflow failed") == 1 and "trackio: trackio show --project solotune" in log
    assert solotune.verify(result.run_dir).ok, "the manifest leaves the trackers' own files out"


def test_a_library_that_is_not_installed_is_an_error_before_anything_else(stand_ins, tmp_path, monkeypatch):
    require([])
    (stand_ins / "wandb.py").unlink()
    (tmp_path / "wandb").mkdir()  # runs of an earlier day: not a package
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError) as caught:
        require(["trackio", "wandb"])
    assert str(caught.value) == (
        "report_to: wandb: wandb is not installed\n"
        "  change:  pip install 'solotune[wandb]', or remove it from report_to"
    )


def test_a_process_that_cannot_start_is_told(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(observer.sys, "executable", str(tmp_path / "none"))
    trackers = Trackers(["mlflow"], tmp_path, said.append)
    trackers.begin(9)
    trackers.close("failed")
    assert said == [
        "warning: mlflow failed and gets nothing more of this run (No such file or directory); the run is not affected"
    ]


def test_the_process_finds_this_package(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/a")
    assert observer._environment()["PYTHONPATH"] == f"{observer.SOURCE}{os.pathsep}/a"
