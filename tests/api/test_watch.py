"""`solotune watch`: a run seen from outside, from before its start to its end, killed, resumed, on any terminal."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from inline_snapshot import snapshot
from rich.console import Console

import solotune
from solotune.cli import main, results
from solotune.display.progress import LiveDisplay, PlainDisplay, SilentDisplay, make_console
from solotune.display.run_follower import RunFollower
from solotune.errors import InputError
from solotune.run.events import (
    DeviceFailedEvent,
    DiagnosedEvent,
    EndEvent,
    EvalEvent,
    NonFiniteEvent,
    ResumeEvent,
    SaveEvent,
    StartEvent,
)
from solotune.run.run_dir import RunDirectory
from tests.display.test_progress import Terminal, metrics

START = StartEvent(0, 4, 9, 9, None, 60, 1, 1, [], 1, "cpu")
EVALUATION = {
    "base": {"loss": 2.5, "stderr": 0.02},
    "tuned": {"loss": 1.25, "stderr": 0.01},
    "verdict": "better",
}
DIAGNOSIS = {"verdict": "fault", "culprits": [{"fault": "F17", "slug": "pad-masks-terminator"}]}
MEASURED = {
    "predicted": {"peak_bytes": 4 << 30, "seconds": {"step": 2.5}},
    "measured": {"peak_bytes": 3 << 30, "step_seconds": 2.0},
}


module = importlib.import_module("solotune.api.watch")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def started(path: str | Path = "run") -> RunDirectory:
    run = RunDirectory.create(str(path))
    (run.path / "config.yaml").write_text("logging_steps: 2\n")
    run.write_json("plan.json", MEASURED)
    run.log(START)
    return run


def ended(run: RunDirectory, diagnosis: object = None) -> None:
    run.log(EvalEvent(4, 0.5, 1.25, 0.01, 99))
    run.write_json("evaluation.json", EVALUATION)
    run.log(EndEvent(4, 3 << 30))
    run.write_json("diagnosis.json", diagnosis or {"verdict": "healthy"})
    run.release()


@pytest.fixture
def watched_while(monkeypatch):
    """A function: watch a run while another process writes it. Each time `watch` sleeps, that does its next part."""

    def watched(work: Iterator[None], **keys):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: next(work)))
        shown = io.StringIO()
        found = solotune.watch("run", display=PlainDisplay(25, make_console(shown)), **keys)
        return found, shown.getvalue().splitlines()

    return watched


def test_a_run_that_is_not_started_yet_is_waited_for_and_shown_to_its_end(watched_while):
    def work() -> Iterator[None]:
        yield
        run = started()
        for number in (1, 2):
            run.log(metrics(number, 4))
        yield
        run.log(SaveEvent(2, "step-000002"))
        run.log(DiagnosedEvent("F54", "measured", "3% moved"))
        for number in (3, 4):
            run.log(metrics(number, 4))
        ended(run)
        yield

    found, lines = watched_while(work())
    assert "\n".join(lines) == snapshot("""\
waiting for run: no run there yet ...
training for 4 steps
step 1/4  loss 2.0000  lr 2.0e-04  grad norm 0.50  epoch 0.02  3.0 GiB
step 2/4  loss 2.0000  lr 2.0e-04  grad norm 0.50  epoch 0.04  500 tok/s  3.0 GiB  0:04 left
step 2/4  saved run/checkpoints/step-000002
F54 updates-lost: 3% moved → keep the adapters in float32 (solotune explain F54)
step 3/4  loss 2.0000  lr 2.0e-04  grad norm 0.50  epoch 0.06  500 tok/s  3.0 GiB  0:02 left
step 4/4  loss 2.0000  lr 2.0e-04  grad norm 0.50  epoch 0.08  500 tok/s  3.0 GiB  0:00 left
step 4/4  held-out loss 1.2500 ± 0.0100  exact match 50.0% of 60 rows\
""")
    assert (found.status, found.step, found.exit_code) == ("finished", 4, 0)
    assert found.facts() == snapshot(
        {
            "run": "run",
            "status": "finished, step 4 of 4",
            "held-out loss": "2.5000 ± 0.0200 → 1.2500 ± 0.0100, better",
            "diagnosis": "healthy",
            "memory": "3.0 GiB measured, 4.0 GiB planned",
            "step time": "2 s measured, 2.5 s planned",
            "next": "solotune chat run --base",
        }
    )


def test_a_run_of_several_ranks_is_continued_on_as_many(watched_while):
    """On two machines of 8, the line leaves the address of the first to the user."""

    def work(local: int) -> Iterator[None]:
        run = RunDirectory.create("run")
        run.write_json("plan.json", {"predicted": {"ranks": {"on_one_machine": local}}})
        run.log(dataclasses.replace(START, world_size=16))
        run.log(metrics(1, 4))
        yield
        run.release()
        yield

    for local, how in ((16, "--standalone --nproc-per-node=16"), (8, "--nnodes=2 [...] --nproc-per-node=8")):
        found, lines = watched_while(work(local))
        line = f"torchrun {how} -m solotune train run/config.yaml output_dir=run --resume"
        assert lines[-1].endswith(f"Continue: {line}") and found.facts()["continue"] == line
        shutil.rmtree("run")


def test_a_run_that_is_killed_is_said_to_be_gone_and_waited_for(watched_while, monkeypatch):
    monkeypatch.setattr("solotune.api.watch.resume_command", lambda run, ranks: "RESUME")

    def work() -> Iterator[None]:
        run = started()
        run.log(metrics(1, 4))
        run.log(SaveEvent(1, "step-000001"))
        mark = (run.path / "metrics.jsonl").stat().st_size
        run.log(metrics(2, 4))
        yield
        run.release()
        yield
        run = RunDirectory.create("run", resume=True)
        run.truncate_metrics({"bytes": mark})
        run.log(ResumeEvent(1, True, [], []))
        for number in (2, 3, 4):
            run.log(metrics(number, 4, loss=1.0))
        yield
        ended(run, DIAGNOSIS)
        yield

    found, lines = watched_while(work(), wait_for_resume=True)
    assert "\n".join(lines) == snapshot("""\
waiting for run: no run there yet ...
training for 4 steps
step 1/4  loss 2.0000  lr 2.0e-04  grad norm 0.50  epoch 0.02  3.0 GiB
step 2/4  loss 2.0000  lr 2.0e-04  grad norm 0.50  epoch 0.04  500 tok/s  3.0 GiB  0:04 left
the process of this run is gone; it was at step 2 of 4 (newest checkpoint: step 1). Continue: RESUME
waiting for --resume (Ctrl-C ends this view) ...
training for 3 steps, from step 2 on
step 2/4  loss 1.0000  lr 2.0e-04  grad norm 0.50  epoch 0.04  500 tok/s  3.0 GiB  0:04 left
step 3/4  loss 1.0000  lr 2.0e-04  grad norm 0.50  epoch 0.06  500 tok/s  3.0 GiB  0:02 left
step 4/4  loss 1.0000  lr 2.0e-04  grad norm 0.50  epoch 0.08  500 tok/s  3.0 GiB  0:00 left
step 4/4  held-out loss 1.2500 ± 0.0100  exact match 50.0% of 60 rows\
""")
    assert (found.status, found.exit_code) == ("finished", 3), "the diagnosis found a fault"
    assert found.facts()["diagnosis"] == "fault: F17 pad-masks-terminator"


@pytest.mark.parametrize(
    ("last", "problem", "code"),
    [
        (SaveEvent(1, "step-000001"), "", 3),
        (NonFiniteEvent(2, seen="loss nan"), "values are not finite in step 2 (loss nan)", 6),
        (NonFiniteEvent(2, tensors=["a", "b"]), "values are not finite in step 2 (a, b)", 6),
        (DeviceFailedEvent("the GPU's memory is full", None), "the GPU's memory is full", 7),
    ],
)
def test_a_run_that_is_dead_already_ends_at_once_with_its_exit_code(last, problem, code, capsys):
    run = started()
    run.log(metrics(1, 4))
    run.log(last)
    run.release()
    found = solotune.watch("run", wait_for_resume=True)
    assert (found.status, found.problem, found.exit_code) == ("gone", problem, code)
    assert main(["watch", "run", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["problem"] == (problem or None)
    assert main(["watch", "run"]) == code
    shown = capsys.readouterr().out
    assert "the process of this run is gone; it was at step 1 of 4" in shown and "--resume" in shown
    assert ("newest checkpoint: step 1" if code == 3 else "no checkpoint") in shown


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "iso-8859-1"])
def test_at_60_columns_and_without_utf_8_every_line_fits(encoding):
    run = started()
    for number in (1, 2, 3, 4):
        run.log(metrics(number, 4))
        run.log(EvalEvent(number, 0.5, 1.25 + number / 10, 0.01, 99))
    run.log(DiagnosedEvent("F54", "measured", "lora_A \x1b[2J is hostile " * 9))
    raw = io.BytesIO()

    class Stream(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    stream = Stream(raw, encoding=encoding)
    make_console(stream)  # as the command does
    console = Console(file=stream, width=60, force_terminal=True, color_system=None, markup=False)
    display = LiveDisplay(1, console)
    RunFollower(run, display, lambda event: f"{event.code}: {event.says}").poll()
    display._live.refresh()
    stream.flush()
    live = raw.getvalue().decode(encoding).split("\x1b[2K")[-1]
    bar, *below = live.replace("\r", "").splitlines()
    assert max(map(len, [bar, *below])) <= 60 and "4/4  loss 2.0000" in bar
    assert below[0] == ("held-out 1.6500 ± 0.0100 (step 4), best 1.3500 (step 1)" if encoding != "ascii" else
                        "held-out 1.6500 +- 0.0100 (step 4), best 1.3500 (step 1)")  # fmt: skip
    assert below[1] == "memory 3.0 of 4.0 GiB planned" and below[2].startswith("F54: lora_A ")
    assert len(below[2]) == 60 and below[2].endswith("…" if encoding == "utf-8" else ".")  # cut
    assert "\x1b[2J" not in live
    run.release()


def test_the_summary_is_in_words_and_fits_60_columns():
    run = started()
    run.log(metrics(4, 4))
    ended(run)
    stream = Terminal()
    console = Console(file=stream, width=60, force_terminal=True, color_system=None, markup=False)
    results.print_watched(solotune.watch("run"), console)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 60 and any("2.5000 ± 0.0200 → 1.2500 ± 0.0100, better" in line for line in lines)


def test_what_is_no_run_is_refused_or_waited_for(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file: a file"):
        solotune.watch("file")

    class Impatient(SilentDisplay):
        def phase(self, name: str) -> None:
            raise TimeoutError(name)

    with pytest.raises(TimeoutError, match="waiting for later: no run there yet"):
        solotune.watch("later", display=Impatient())
