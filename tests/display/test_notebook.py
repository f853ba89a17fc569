"""A run in one output of a cell: one handle, few updates, every text escaped; and who gets which display."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from solotune.config.run_config import Choice
from solotune.display import notebook
from solotune.display.meter import Meter
from solotune.display.notebook import NotebookDisplay, showing
from solotune.display.progress import LiveDisplay, PlainDisplay, SilentDisplay
from solotune.errors import CheckError, InterruptedRunError, resume_command
from solotune.run.events import EvalEvent
from tests.display.test_progress import metrics

HOSTILE = "<script>alert(1)</script> \x1b[2J"


@pytest.fixture
def cell(monkeypatch):
    """What a notebook shows: the outputs, and for each all of its contents in turn."""
    outputs: list[list[dict[str, str]]] = []

    def display(content, raw, display_id):
        assert raw and display_id
        outputs.append([content])
        return SimpleNamespace(update=lambda content, raw: outputs[-1].append(content))

    ipython, its_display = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    its_display.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", its_display)
    return outputs


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(notebook.time, "monotonic", lambda: now[0])
    return now


def test_a_run_is_one_output(cell, clock):
    shown = NotebookDisplay(logging_steps=10)
    shown.phase("loading model")
    assert "<progress style" in cell[0][-1]["text/html"], "no number yet: the browser's bar moves by itself"
    shown.choices([Choice("optim", "adamw_torch", "there is no GPU")])
    shown.begin(100)
    for number in range(1, 101):
        clock[0] += 0.01
        shown.step(metrics(number))
    shown.evaluated(EvalEvent(100, exact_match=0.25, loss=1.5, stderr=0.125, tokens=9), 60)
    (contents,) = cell
    assert '<progress value="100" max="100"' in contents[-1]["text/html"]
    assert len(contents) < 25, "a hundred steps within a second are few updates"
    shown.finish()
    last = contents[-1]["text/html"]
    assert "<progress" not in last and "held-out loss</th>" in last and "1.5000 ± 0.1250" in last and "25.0%" in last
    assert last.count("step ") >= 11 and "adamw_torch" in last
    assert "step 100/100  loss 2.0000" in contents[-1]["text/plain"]


def test_the_bar_has_loss_speed_memory_and_remaining_time(cell, clock):
    shown = NotebookDisplay(logging_steps=100)
    shown.begin(100)
    for number in (1, 2, 3):
        clock[0] += 1
        shown.step(metrics(number))
    bar = cell[0][-1]["text/html"].partition("</div>")[0]
    assert bar.endswith("3/100  loss 2.0000  500 tok/s  3.0 GiB  3:14 left")
    clock[0] += 1
    shown.progress(8, 60, "held-out rows")
    assert (
        '<progress value="8" max="60"' in cell[0][-1]["text/html"] and "8/60 held-out rows" in cell[0][-1]["text/html"]
    )


def test_the_words_of_the_bar_are_made_when_it_is_shown(cell, clock, monkeypatch):
    made = []
    monkeypatch.setattr(Meter, "figures", lambda meter: made.append(meter.last.step) or [])
    shown = NotebookDisplay(logging_steps=1000)
    shown.begin(1000)
    for number in range(1, 10):
        shown.step(metrics(number, total=1000))
    assert made == []
    clock[0] += 1
    shown.step(metrics(10, total=1000))
    assert set(made) == {10}


def test_text_of_data_is_text_and_the_log_in_the_cell_is_bounded(cell, clock):
    shown = NotebookDisplay(logging_steps=1)
    for number in range(500):
        shown.note(f"{number} {HOSTILE}")
    html = cell[0][-1]["text/html"]
    assert "<script>" not in html and "&lt;script&gt;" in html and "\x1b" not in html
    assert "499 " in html and "\n299 " not in html


def test_a_verb_with_a_result_leaves_nothing(cell):
    with showing(None) as shown:
        shown.phase("planning")
        assert "planning" in cell[0][-1]["text/html"]
    assert cell[0][-1] == {"text/plain": "", "text/html": ""} and len(cell) == 1
    with pytest.raises(SystemExit), showing(None) as shown:
        sys.exit(shown.phase("planning"))
    assert cell[1][-1]["text/html"] == ""
    with showing(None):
        pass
    assert len(cell) == 2, "a verb that says nothing has no output"


def test_who_gets_which_display(cell, monkeypatch):
    own = SilentDisplay()
    with showing(own) as shown:
        assert shown is own
    with showing(None, 5, stays=True) as shown:
        assert isinstance(shown, NotebookDisplay)
    sys.modules["IPython"].get_ipython = lambda: SimpleNamespace()  # IPython's own shell
    with showing(None) as shown:
        assert isinstance(shown, (PlainDisplay, LiveDisplay)) and not isinstance(shown, NotebookDisplay)
    monkeypatch.delitem(sys.modules, "IPython")  # a script
    with showing(None) as shown:
        assert type(shown) is SilentDisplay
    assert cell == []


def test_errors_and_how_to_continue_are_said_in_words_of_a_notebook(cell, monkeypatch):
    stop = InterruptedRunError(
        2, "stopped after step 22; checkpoint saved", f"continue with: {resume_command('runs/a')}"
    )
    assert stop._render_traceback_() == [
        "Stopped after step 22; checkpoint saved. Continue with: "
        'solotune.train("runs/a/config.yaml", output_dir="runs/a", resume=True)'
    ]
    assert CheckError("no", change="yes")._render_traceback_() == ["CheckError: no\n  change:  yes"]
    monkeypatch.delitem(sys.modules, "IPython")
    assert resume_command("runs/a").endswith("train runs/a/config.yaml output_dir=runs/a --resume")
