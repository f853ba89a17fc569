"""Observers of a run: the order of their calls, and whose failure ends the run."""

from __future__ import annotations

import inspect
import os
import signal
import warnings
from pathlib import Path

import pytest
import torch
from tiny import metrics_of, random_rows

from solotune.display.observer import Observers, Resilient, RunObserver, SilentObserver
from solotune.display.progress import PlainDisplay
from solotune.errors import StorageError
from solotune.model.loading import load_model
from solotune.run.events import DeviceFailedEvent, DiagnosedEvent, EvalEvent, NonFiniteEvent, SaveEvent, StepEvent
from solotune.run.run_dir import RunDirectory
from solotune.run.run_log import RunLog
from solotune.runtime import signals, watchdog
from solotune.runtime.signals import StopRequested
from solotune.training import loop

STEP = StepEvent(1, 200, 0.1, 2.0, 0.1, 1e-3, 1.0, 99, 9, 9.0, 0.1, 990.0, 0)
CALLS = {
    "phase": ("loading model",),
    "note": ("a fact",),
    "choices": ([],),
    "progress": (1, 9, "rows"),
    "planned": (1 << 30,),
    "begin": (9, 3),
    "step": (STEP,),
    "evaluated": (EvalEvent(4, 0.5, 1.25, 0.01, 91), 10),
    "saved": (SaveEvent(4, "step-000004"), Path("run/checkpoints/step-000004")),
    "diagnosed": (DiagnosedEvent("F54", "measured", "3% moved"), "F54 updates-lost: 3% moved"),
    "failed": (DeviceFailedEvent("the GPU's memory is full", None),),
    "finish": (),
}
RECORDED = ("step", "evaluated", "saved", "diagnosed", "failed")


class Heard:
    """Record each call with the observer's name."""

    def __init__(self, name: str = "", into: list | None = None, error: BaseException | None = None) -> None:
        self.name, self.calls, self.error = name, [] if into is None else into, error

    def __getattr__(self, method: str):
        def hear(*args: object) -> None:
            self.calls.append((self.name, method, args))
            if self.error is not None:
                raise self.error

        return hear


def methods(of: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(of, inspect.isfunction) if not name.startswith("_")}


@pytest.mark.parametrize("kind", [SilentObserver, Observers, Resilient, RunLog, PlainDisplay])
def test_every_observer_has_every_method_with_the_same_parameters(kind):
    assert methods(RunObserver) == set(CALLS)
    assert methods(kind) >= set(CALLS)
    for name in CALLS:
        assert str(inspect.signature(getattr(kind, name))) == str(inspect.signature(getattr(RunObserver, name))), name


@pytest.mark.parametrize("name", CALLS)
def test_observers_are_told_in_their_order_what_was_told(name):
    calls = []
    observer = Observers(Heard("a", calls), Observers(Resilient(Heard("b", calls))), Heard("c", calls))
    getattr(observer, name)(*CALLS[name])
    assert calls == [(who, name, CALLS[name]) for who in "abc"]


@pytest.mark.parametrize("name", CALLS)
def test_what_one_raises_those_after_it_do_not_hear(name):
    calls = []
    with pytest.raises(ValueError, match="stop"):
        getattr(Observers(Heard("a", calls, ValueError("stop")), Heard("b", calls)), name)(*CALLS[name])
    assert [who for who, *_ in calls] == ["a"]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("error", "failure"),
    [(BrokenPipeError(32, "Broken pipe"), "Broken pipe"), (OSError("odd"), "odd"), (SystemExit(1), "Broken pipe")],
    ids=repr,
)
def test_a_display_that_fails_falls_silent(name, error, failure, recwarn):
    display = Heard(error=error)
    observer = Resilient(display)
    getattr(observer, name)(*CALLS[name])
    assert observer.failure == failure and not recwarn
    getattr(observer, name)(*CALLS[name])
    observer.note("more")
    assert len(display.calls) == 1


def test_a_bug_of_an_observer_is_told_once_and_is_not_the_runs():
    observer = Resilient(Heard(error=ValueError("a bug")))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        observer.step(STEP)
        observer.step(STEP)
    (told,) = seen
    assert str(told.message) == "Heard failed and is not called any more in this run: ValueError('a bug')"
    assert told.filename == __file__


@pytest.mark.parametrize("error", [StorageError("full"), KeyboardInterrupt(), StopRequested(signal.SIGTERM)], ids=repr)
def test_the_runs_log_and_a_stop_pass_through(error):
    with pytest.raises(type(error)):
        Resilient(Heard(error=error)).step(STEP)


def test_the_stage_is_what_was_shown_last(monkeypatch):
    said = []
    monkeypatch.setattr(watchdog, "set_stage", said.append)
    observer = Resilient(Heard())
    assert observer.stage == "getting ready"
    observer.phase("reading data")
    assert observer.stage == "reading data"
    observer.note("x")
    observer.begin(3)
    assert observer.stage == "training" and said == ["reading data", "training"]


@pytest.mark.parametrize("name", CALLS)
def test_each_call_is_a_safe_place_to_stop_but_for_a_failure(name, monkeypatch):
    polls = []
    monkeypatch.setattr(signals, "check_stop", lambda: polls.append(1))
    getattr(Resilient(Heard(error=OSError())), name)(*CALLS[name])
    assert len(polls) == (0 if name == "failed" else 1)


def test_the_runs_log_writes_events_and_nothing_else(tmp_path):
    run = RunDirectory(tmp_path)
    for name, args in CALLS.items():
        getattr(RunLog(run), name)(*args)
    assert [line["event"] for line in metrics_of(run)] == ["step", "eval", "save", "diagnosed", "device_failed"]
    RunLog(run).failed(NonFiniteEvent(3, tensors=["a"]))
    assert metrics_of(run)[-1] == {"event": "non_finite", "step": 3, "tensors": ["a"]}


@pytest.mark.parametrize("name", RECORDED)
def test_a_log_that_cannot_be_written_fails(name, tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(StorageError):
        getattr(RunLog(RunDirectory(tmp_path)), name)(*CALLS[name])


# --- in a run


@pytest.fixture
def start(tiny_config, tmp_path):
    config = tiny_config(
        max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=1, save_steps=2,
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    run = RunDirectory.create(config.output_dir)
    return load_model(config, torch.device("cpu"), torch.float32), config, run


def test_each_thing_is_in_the_log_before_anybody_hears_of_it(start):
    model, config, run = start
    seen = []

    class LayerProfile(SilentObserver):
        def step(self, event):
            seen.append((metrics_of(run)[-1]["event"], event.step))

        def evaluated(self, event, num_rows):
            seen.append((metrics_of(run)[-1]["event"], event.step))
            assert num_rows == 4

        def saved(self, event, path):
            seen.append((metrics_of(run)[-1]["event"], event.step))
            assert path == run.checkpoints / event.path and path.is_dir()

    rows = random_rows(12)
    loop.train(model, rows[:8], rows[8:], config, run, LayerProfile())
    assert seen == [("step", 1), ("step", 2), ("save", 2), ("step", 3), ("eval", 3), ("save", 3)]
    assert seen == [(line["event"], line["step"]) for line in metrics_of(run)]


def test_an_observer_that_fails_does_not_stop_a_run(start):
    model, config, run = start
    display = Heard(error=OSError(28, os.strerror(28)))
    loop.train(model, random_rows(8), [], config, run, Resilient(display))
    assert [line["event"] for line in metrics_of(run)] == ["step", "step", "save", "step", "save"]
    assert len(display.calls) == 1


def test_a_run_that_cannot_be_recorded_stops_and_nobody_hears_of_its_step(start):
    model, config, run = start
    (run.path / "metrics.jsonl").mkdir()
    display = Heard()
    with pytest.raises(StorageError, match=r"metrics\.jsonl"):
        loop.train(model, random_rows(8), [], config, run, Resilient(display))
    assert [method for _, method, _ in display.calls] == ["begin"]
