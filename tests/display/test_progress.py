"""What people see: the lines of a run, live and plain, and the printed results; text out of data never steers."""

from __future__ import annotations

import io
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from inline_snapshot import snapshot
from rich.console import Console

from solotune.api.data import DataPreview, ShownRow
from solotune.cli import results, run_list
from solotune.config.run_config import Choice
from solotune.dataset import DataReport
from solotune.dataset.packing import account
from solotune.display import progress
from solotune.display.meter import Meter
from solotune.display.observer import Resilient
from solotune.display.progress import LiveDisplay, PlainDisplay, SilentDisplay, make_console, make_display
from solotune.evaluation.compare import Evaluation, Sample
from solotune.evaluation.scores import Score
from solotune.hardware.doctor import Check, DoctorReport
from solotune.run.events import DiagnosedEvent, EvalEvent, SaveEvent, StepEvent
from solotune.run.run_dir import RunSummary

HOSTILE = "[bold]x[/nope] \x1b[31mred\x1b]8;;http://a\x07link \x9b2J \u202egnp\r\x7f\ud800"


def metrics(step: int, total: int = 100, **changes) -> StepEvent:
    values = {
        "epoch": step / 50,
        "loss": 2.0,
        "token_accuracy": 0.5,
        "learning_rate": 2e-4,
        "grad_norm": 0.5,
        "num_tokens": 1000,
        "num_supervised": 100,
        "total_weight": 100.0,
        "step_seconds": 2.0,
        "tokens_per_second": 500.0,
        "peak_bytes": 3 << 30,
    }
    return StepEvent(step=step, total_steps=total, **{**values, **changes})


def score(loss: float = 1.25, stderr: float = 0.01, exact: float = 0.5) -> Score:
    return Score(loss, stderr, 4000, exact, 0.028, 60, (loss,) * 60, (1.0,) * 60, (exact > 0,) * 60)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown_on(columns: int, show, colour: bool = False) -> list[str]:
    """The lines that `show(console)` prints on a terminal of this width."""
    stream = Terminal()
    system = "truecolor" if colour else None
    show(
        Console(
            file=stream, width=columns, force_terminal=True, color_system=system, markup=False, highlight=False,
            _environ={"TERM": "xterm"},
        )
    )  # fmt: skip
    return stream.getvalue().splitlines()


def piped(show) -> str:
    stream = io.StringIO()
    show(make_console(stream))
    return stream.getvalue()


# --- inert text


def test_hostile_text_everywhere():
    ev = Evaluation(score(), score(), [Sample(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE)])
    machine = SimpleNamespace()
    finding = {"code": "F1", "slug": HOSTILE, "severity": "error", "message": HOSTILE, "fix": HOSTILE}
    report = DataReport(HOSTILE, num_read=1, dropped=Counter({HOSTILE: 1}), findings=[finding])
    preview = DataPreview(report, [ShownRow(HOSTILE, [(HOSTILE, True, [1]), (HOSTILE, False, [2])], [HOSTILE] * 2)])
    run = RunSummary(HOSTILE, Path("a"), "finished", 1, 1, 1.0, 1.0, 1.0, 1.0, 1.0, 1)

    def show(console):
        results.print_evaluation(ev, console)
        results.print_doctor(DoctorReport(machine, [Check("a", "fail", HOSTILE, HOSTILE)]), console)  # type: ignore[arg-type]
        results.print_data(preview, console)
        results.print_data(preview, console, with_ids=True)
        run_list.print_runs([run], HOSTILE, console)
        run_list.print_runs([], HOSTILE, console)
        progress.print_choices([Choice("a", HOSTILE, HOSTILE)], console)
        display = PlainDisplay(1, console)
        display.note(HOSTILE)
        display.phase(HOSTILE)
        display.saved(SaveEvent(1, "x"), Path(HOSTILE))
        display.diagnosed(DiagnosedEvent("F54", "measured", HOSTILE), HOSTILE)

    for text in ("\n".join(shown_on(80, show)), piped(show)):
        text.encode()
        assert not set(text) & set("\x1b\x9b\x07\x7f\r\u202e")
        assert "[/nope]" in text


# --- figures


def test_a_line_comes_at_least_ten_times_a_run_and_every_30_seconds(monkeypatch):
    def steps(total: int, logging_steps: int, seconds_a_step: float = 0.0) -> list[int]:
        now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: now)
        stream = io.StringIO()
        display = PlainDisplay(logging_steps, make_console(stream))
        display.begin(total)
        for step in range(1, total + 1):
            now += seconds_a_step
            display.step(metrics(step, total))
        return [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines() if "loss" in line]

    assert steps(24, 25) == [3, 5, 8, 10, 12, 15, 17, 20, 22, 24]
    assert steps(100, 25) == [10, 20, 25, 30, 40, 50, 60, 70, 75, 80, 90, 100]
    assert steps(4, 100) == [1, 2, 3, 4]
    assert steps(60, 1000, seconds_a_step=11.0)[:5] == [3, 6, 9, 12, 15]


def test_a_long_stage_says_every_30_seconds_how_far_it_is(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    stream = io.StringIO()
    display = PlainDisplay(25, make_console(stream))
    for done in range(1, 9):
        now += 10.0
        display.progress(done, 8, "held-out rows")
    assert stream.getvalue().splitlines() == ["3/8 held-out rows", "6/8 held-out rows"]


# --- displays


def a_run(display: PlainDisplay, steps: int = 5) -> None:
    display.phase("loading model")
    display.choices([Choice("bf16", False, "there is no GPU")])
    display.progress(3, 9, "tensors")
    display.begin(5)
    for step in range(1, steps + 1):
        display.step(metrics(step, total=5, step_seconds=90.0 if step == 1 else 2.0))
    display.evaluated(EvalEvent(5, exact_match=0.5, loss=1.25, stderr=0.01, tokens=4000), 60)
    display.saved(SaveEvent(5, "step-000005"), Path("runs/a/checkpoints/step-000005"))


PLAIN = snapshot("""\
loading model ...
settings chosen for you:
bf16: false  because there is no GPU
training for 5 steps
step 1/5  loss 2.0000  lr 2.0e-04  grad norm 0.50  epoch 0.02  3.0 GiB
step 2/5  loss 2.0000  lr 2.0e-04  grad norm 0.50  epoch 0.04  500 tok/s  3.0 GiB  0:06 left
step 3/5  loss 2.0000  lr 2.0e-04  grad norm 0.50  epoch 0.06  500 tok/s  3.0 GiB  0:04 left
step 4/5  loss 2.0000  lr 2.0e-04  grad norm 0.50  epoch 0.08  500 tok/s  3.0 GiB  0:02 left
step 5/5  loss 2.0000  lr 2.0e-04  grad norm 0.50  epoch 0.10  500 tok/s  3.0 GiB  0:00 left
step 5/5  held-out loss 1.2500 ± 0.0100  exact match 50.0% of 60 rows
step 5/5  saved runs/a/checkpoints/step-000005
""")


def test_plain_display_prints_whole_lines_and_nothing_else():
    stream = io.StringIO()
    display = make_display(2, stream)
    assert type(display) is PlainDisplay
    a_run(display)
    display.finish()
    assert stream.getvalue() == PLAIN


def test_a_long_line_stays_one_line_in_a_log():
    assert piped(lambda console: PlainDisplay(1, console).note("word " * 100)).count("\n") == 1


def test_a_tab_in_a_log_takes_the_places_of_one():
    assert (
        piped(lambda console: PlainDisplay(1, console).note("a\tb\nlong word\tc")) == "a       b\nlong word       c\n"
    )


def test_a_closed_pipe_ends_the_display_alone_and_nothing_is_left_to_flush(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:  # whose buffer is flushed at its end
        monkeypatch.setattr("sys.stdout", stream)
        display = Resilient(PlainDisplay(1, make_console(stream)))
        display.note("a line")
        assert display.failure == "Broken pipe"


def test_silent_display_has_every_method():
    stream = io.StringIO()
    display = SilentDisplay()
    a_run(display)  # type: ignore[arg-type]
    display.note("x")
    display.finish()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_live_line_fits_the_terminal_and_goes_away(columns, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    assert type(make_display(2, stream)) is LiveDisplay
    console = Console(file=stream, width=columns, force_terminal=True, color_system=None, markup=False)
    display = LiveDisplay(2, console)
    display.begin(12_000)
    for step in (1_203, 1_204):
        display.step(metrics(step, total=12_000, num_tokens=50_000, peak_bytes=42 << 30))
    display._live.refresh()
    live = stream.getvalue().splitlines()[-1].split("\r")[-1].removeprefix("\x1b[2K")
    assert len(live) == columns
    assert live[0] in "━╸"
    memory = "" if columns == 60 else "  42.0 GiB"  # what has no place is left out, not cut
    assert live.lstrip("━╸╺ ") == f"1,204/12,000  loss 2.0000  25,000 tok/s{memory}  5:59:52 left"
    display.finish()
    display.finish()
    assert stream.getvalue().endswith("\x1b[?25h\r\x1b[1A\x1b[2K")  # cursor back, line erased
    assert "step  1,204/12,000  loss 2.0000  lr 2.0e-04" in stream.getvalue()


def test_the_words_of_the_live_line_are_made_when_it_is_drawn(monkeypatch):
    made = []
    monkeypatch.setattr(Meter, "figures", lambda meter: made.append(meter.last.step) or [])
    display = LiveDisplay(100, Console(file=Terminal(), width=80, force_terminal=True))
    display._live.auto_refresh = False
    display.begin(100)
    for step in range(1, 10):
        display.step(metrics(step))
    assert made == []
    display._live.refresh()
    assert made == [9]
    display.finish()


def test_live_display_leaves_a_line_with_its_seconds_for_each_phase(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))

    def loading(console: Console) -> None:
        nonlocal now
        display = LiveDisplay(2, console)
        display.phase("loading model")
        now += 1.5
        a_run(display)
        display.finish()

    assert "loading model  1.5 s" in "\n".join(shown_on(80, loading))


def test_live_display_shows_how_far_a_phase_is():
    def loading(console: Console) -> None:
        display = LiveDisplay(2, console)
        display.phase("loading model")
        display.progress(3, 9, "tensors")
        display._live.refresh()  # rich draws four times a second, by its own clock
        display.finish()

    assert "3/9 tensors" in "\n".join(shown_on(80, loading))


@pytest.mark.parametrize("term", ["dumb", ""])
def test_no_live_line_on_a_terminal_that_cannot_move_its_cursor(term, monkeypatch):
    monkeypatch.setenv("TERM", term)
    assert type(make_display(1, Terminal())) is PlainDisplay


# --- results

EVALUATION = snapshot("""\

 held-out rows               base             tuned         change
 ─────────────────────────────────────────────────────────────────
 loss per token   2.5000 ± 0.0200   0.2500 ± 0.0100        -2.2500
 exact match           0.0% ± 2.8       95.0% ± 2.8   +95.0 points

60 held-out rows, 4,000 loss tokens; ± is one standard error
tuned is better than base on held-out rows: its loss per token is lower by
2.2500 ± 0.0000 (paired test, p = 0.0001)

sample 1 · chats.jsonl:17 ──────────────────────────────────────────────────────
prompt     order 4 pears
reference  {"pears": 4}
base                                    │ tuned, equal to the reference
────────────────────────────────────────┼───────────────────────────────────────
Sure! I would be glad to help you with  │ {"pears": 4}
that order of pears.                    │
""")


def evaluation() -> Evaluation:
    answer = "Sure! I would be glad to help you with that order of pears."
    sample = Sample("chats.jsonl:17", "order 4 pears", '{"pears": 4}', answer, '{"pears": 4}')
    return Evaluation(score(2.5, 0.02, 0.0), score(0.25, 0.01, 0.95), [sample])


def test_evaluation_at_80_columns():
    lines = shown_on(80, lambda console: results.print_evaluation(evaluation(), console))
    assert "".join(line.rstrip() + "\n" for line in lines) == EVALUATION


def test_on_a_narrow_terminal_answers_stand_below_one_another():
    lines = shown_on(60, lambda console: results.print_evaluation(evaluation(), console))
    assert max(map(len, lines)) <= 60
    assert "tuned, equal to the reference" in [line.rstrip() for line in lines]


def preview(**changes: Any) -> DataPreview:
    finding = {"code": "F17", "slug": "truncated", "severity": "warning", "message": "2 rows were cut"}
    report = DataReport(
        "messages",
        num_read=1200,
        dropped=Counter({"no assistant turn": 3, "exact duplicate": 2, "nothing": 0}),
        num_train=1135,
        num_validation=60,
        num_tokens=1000,
        num_supervised=250,
        num_groups=900,
        num_exact_duplicates=2,
        num_near_duplicates=1,
        num_truncated=7,
        num_answers_cut=6,
        findings=[{**finding, "fix": "max_length=4096"}],
    )
    row = ShownRow("a.jsonl:1", [("user: hi\n", False, [1, 2, 3]), ("hello", True, [40, 5])], TOKENS)
    return DataPreview(replace(report, **changes), [row])


TOKENS = ["user:", " hi", "\n", "hel", "lo"]
HEAD = snapshot("a.jsonl:1 · 5 tokens, 2 trained on, shown in ⟦ ⟧")
ROW = "user: hi↵\n⟦hello⟧\n"
FOUND = snapshot("""\

format    messages
rows      1,200 read, 1,195 kept
dropped   2 exact duplicate, 3 no assistant turn
copies    2 exact copies of rows removed; if they are meant, set dataset_exact_deduplication: false, or give the row a higher weight
too long  7 truncated to max_length; 6 of them lose tokens to train on
tokens    1,000, of which 250 (25.0%) are trained on
split     1,135 training rows, 60 held out; 900 groups, 1 near-duplicate

!  remark F17 truncated: 2 rows were cut
   → max_length=4096

no fault found in the rows, 1 remark
""")


def test_data_without_colour_brackets_what_is_learned():
    text = piped(lambda console: results.print_data(preview(), console))
    head, rest = text.replace("─", "").replace("⟧ \n", "⟧\n").split("\n", 1)
    assert head == HEAD
    assert rest.removeprefix(ROW) == FOUND


def test_a_fault_in_the_rows_is_what_train_would_stop_at():
    fault = {"code": "F21", "slug": "nothing-learned", "severity": "error", "message": "no labels", "fix": "a fix"}
    text = piped(lambda console: results.print_data(preview(findings=[fault]), console))
    assert "✗  train stops before step 1:  change what is said above, or set allow_faults: [F21]" in text
    allowed = replace(preview(findings=[fault]), allowed=("F21",))
    assert "no fault found in the rows but those in allow_faults\n" in piped(
        lambda console: results.print_data(allowed, console)
    )


def test_keys_that_nothing_reads_are_named():
    unused = [{"key": HOSTILE, "in": "rows", "count": 24, "of": 1200}]
    text = piped(lambda console: results.print_data(preview(unused=unused), console))
    (line,) = [line for line in text.splitlines() if line.startswith("not used")]
    assert line.endswith("in 24 of 1,200 rows")
    assert "\x1b" not in line


def test_tokens_with_their_ids_stand_in_cells():
    text = piped(lambda console: results.print_data(preview(), console, with_ids=True))
    line = " 1 user:             2 ␣hi               3 ↵                40 ⟦hel⟧             5 ⟦lo⟧             \n"
    head, rest = text.replace("─", "").replace("⟧ \n", "⟧\n", 1).split("\n", 1)
    assert head == HEAD
    assert rest.removeprefix(line) == FOUND


def test_a_long_token_takes_several_cells_and_no_line_is_too_long():
    row = ShownRow("a", [("x", True, list(range(40)))], ["x" * number for number in range(40)])
    shown = DataPreview(preview().report, [row])
    lines = shown_on(80, lambda console: results.print_data(shown, console, with_ids=True))
    assert max(map(len, lines)) <= 80
    assert [len(word) - 2 for line in lines for word in line.split() if word.startswith("⟦x")] == list(range(1, 40))


def test_weights_are_told_in_a_line_and_shown_behind_what_has_one():
    pieces = [("user: hi", False, [1]), ("one", True, [2]), ("half", True, [3])]
    row = ShownRow("a", pieces, ["user: hi", "one", "half"], [0.0, 1.0, 0.5])
    report = preview(num_weighted_rows=1, num_weighted_answers=7, total_weight=1234567.25).report
    text = piped(lambda console: results.print_data(DataPreview(report, [row]), console))
    assert "user: hi⟦one⟧⟦half⟧×0.5\n" in text
    assert [line for line in text.splitlines() if line.startswith("weights")] == snapshot(
        ["weights   7 answers in 1 row have a weight other than 1; the sum over the loss tokens is 1,234,567.25"]
    )


def test_packing_is_told_in_a_line():
    shown = preview(packing=account([600, 500, 1000], 1024))
    text = piped(lambda console: results.print_data(shown, console))
    assert [line for line in text.splitlines() if line.startswith("packing")] == snapshot(
        ["packing   3 rows in 3 sequences of 1,024 tokens, 68.4% full (972 positions empty); no row is truncated"]
    )


def test_data_in_colour_makes_what_is_learned_green():
    text = "\n".join(shown_on(80, lambda console: results.print_data(preview(), console), colour=True))
    assert "\x1b[1;32mhello\x1b[0m" in text
    assert "\x1b[2muser: hi↵" in text
    assert "⟦" not in text


def test_with_no_color_no_text_speaks_of_colours():
    stream = Terminal()
    console = Console(file=stream, width=80, force_terminal=True, color_system="truecolor", no_color=True)
    results.print_data(preview(), console)
    assert "⟦hello⟧" in stream.getvalue() and "shown in ⟦ ⟧" in stream.getvalue()
    assert "green" not in stream.getvalue() and "\x1b[32m" not in stream.getvalue()


def test_doctor_says_what_mends_it():
    checks = [Check("python", "ok", "3.12"), Check("gpu", "fail", "torch has no CUDA", "install one that has")]
    text = piped(lambda console: results.print_doctor(DoctorReport(None, checks), console))  # type: ignore[arg-type]
    assert text == snapshot("""\
✓  python  3.12
✗  gpu     torch has no CUDA
           → install one that has

1 check failed
""")


@pytest.mark.parametrize("columns", [80, 120])
def test_runs_fit(columns):
    done = RunSummary(
        "demo-20260101-120000", Path("a"), "finished", 120, 120, 0.4, 2.3412, 0.1234, 0.95, 1204.0, 2 << 30
    )
    begun = RunSummary("b", Path("b"), "running", 0, None, None, None, None, None, None, None)
    lines = shown_on(columns, lambda console: run_list.print_runs([done, begun], "runs", console))
    assert max(map(len, lines)) <= columns
    rows = [" ".join(line.split()) for line in lines]
    assert any(row.startswith("demo-20260101-120000 finished 120/120 2.341 → 0.123 95%") for row in rows)
    assert any("1,204 2.0 GiB" in row for row in rows) == (columns == 120)
    assert "b running 0" in rows
