"""Displays of a running run: live line, plain lines. (The results at its end are printed by `cli.results`.)

A run reports to a `RunObserver` and does not know terminals. `make_display` picks one. On a terminal: permanent lines,
one every `logging_steps`, and below them one live line (bar, loss, tokens/s, memory, time left). In a pipe or a file:
only the permanent lines, never wrapped, so that a log can be searched with grep. `SilentDisplay` is for Python callers.

    step  25/120  loss 1.8312  lr 1.9e-04  grad norm 0.81  epoch 0.62
    ━━━━━━━━━╸━━━━━━━━━━━  31/120  loss 1.790  1,204 tok/s  2.1 GiB  2:31 left
    held-out 1.9012 ± 0.0213 (step 30), best 1.8870 (step 20)   memory 2.1 of 2.3 GiB planned
    F17 pad-masks-terminator: ...

The lines below the live one are the last held-out loss, with one standard error as its noise, and the last finding of
the monitor. `solotune watch` shows a run from another terminal with the same classes (`run_follower`).

Lines come every `logging_steps` steps, and at least ten times a run and every 30 seconds. `meter` makes their figures.

Text from data files and models is shown as text: rich's markup is never parsed, and characters that control a terminal
(escape sequences, C1 codes, direction marks) are replaced by a visible sign.
"""

from __future__ import annotations

import codecs
import io
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from solotune.display.meter import Meter
from solotune.display.observer import RunObserver, SilentObserver
from solotune.units import escape_terminal, plus_minus

if TYPE_CHECKING:
    from solotune.config.run_config import Choice
    from solotune.run.events import DiagnosedEvent, EvalEvent, SaveEvent, StepEvent

PIPE_COLUMNS = 120  # without a terminal
LINES_A_RUN = 10  # at least, whatever `logging_steps` is
SECONDS_A_LINE = 30.0  # at most
MIN_BAR = 2  # columns of the bar beside its figures
REFRESHES = 1  # of the live line a second: drawing takes 3 ms of a core that a run on the CPU needs


def make_console(stream: IO[str], is_log: bool = False) -> Console:
    """Console on `stream`: colour only on a terminal (and without NO_COLOR), no markup, no emoji codes. On one that is
    not UTF-8, signs that it lacks are written in ASCII.

    Args:
        is_log: never a terminal, not even with FORCE_COLOR, which a notebook sets.
    """
    width = None if stream.isatty() else PIPE_COLUMNS
    if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
        stream.reconfigure(errors=_plain_signs.__name__)
    return Console(
        file=stream, width=width, markup=False, highlight=False, emoji=False, soft_wrap=False,
        force_terminal=False if is_log else None,
        force_jupyter=False,  # in a notebook, rich would send what is for this stream to the cell instead
    )  # fmt: skip


_PLAIN = {"±": "+-", "→": "->", "…": ".", "─": "-", "│": "|", "✓": "+", "✗": "x", "·": "-", "×": "x"}


def _plain_signs(error: UnicodeError) -> tuple[str, int]:
    """For a stream that is not UTF-8: the signs that it lacks, in ASCII."""
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_PLAIN.get(char, "?") for char in error.object[error.start : error.end]), error.end


codecs.register_error(_plain_signs.__name__, _plain_signs)

Display = RunObserver  # shows the progress of a verb


class SilentDisplay(SilentObserver):
    """Display that shows nothing, for Python callers."""


class PlainDisplay(SilentObserver):
    """Print one plain line for each event and every `logging_steps` steps; no line is removed again."""

    def __init__(self, logging_steps: int, console: Console) -> None:
        self.console = console
        self.meter = Meter()
        self.held_out: list[EvalEvent] = []
        """The last evaluation, and the one with the lowest loss."""
        self.last_finding = ""
        self.logging_steps = logging_steps
        self._total_steps = 0
        self._last_line = time.monotonic()

    def phase(self, name: str) -> None:
        self._line(f"{name} ...")

    def note(self, text: str) -> None:
        self._line(text)

    def choices(self, choices: Sequence[Choice]) -> None:
        print_choices(choices, self.console)

    def progress(self, done: int, total: int, what: str) -> None:
        if time.monotonic() - self._last_line >= SECONDS_A_LINE:
            self._last_line = time.monotonic()
            self._line(f"{done:,}/{total:,} {what}" if total else what)

    def planned(self, peak_bytes: int) -> None:
        self.meter.planned_bytes = peak_bytes

    def begin(self, total_steps: int, done: int = 0) -> None:
        self._total_steps, self._last_line = total_steps, time.monotonic()
        self._line(f"training for {total_steps - done:,} steps" + (f", from step {done + 1:,} on" if done else ""))

    def step(self, event: StepEvent) -> None:
        self.meter.add(event)
        if self._is_line_due(event):
            self._last_line = time.monotonic()
            figures = [
                f"loss {self.meter.take_loss():.4f}",
                f"lr {event.learning_rate:.1e}",
                f"grad norm {event.grad_norm:.2f}",
                f"epoch {event.epoch:.2f}",
            ]
            self._line(
                _fitting([self._at(event.step) + figures[0], *figures[1:], *self._more_figures()], self._columns)
            )

    def _is_line_due(self, event: StepEvent) -> bool:
        is_tenth = LINES_A_RUN * event.step % event.total_steps < LINES_A_RUN  # the first step after a tenth of the run
        is_late = time.monotonic() - self._last_line >= SECONDS_A_LINE
        return event.step % self.logging_steps == 0 or is_tenth or is_late

    def evaluated(self, event: EvalEvent, num_rows: int) -> None:
        self.held_out = [event, min([event, *self.held_out[1:]], key=_loss_of)]
        exact = f"  exact match {event.exact_match:.1%} of {num_rows:,} rows"
        self._line(f"{self._at(event.step)}held-out loss {plus_minus(event.loss, event.stderr)}{exact}", "cyan")

    def saved(self, event: SaveEvent, path: Path) -> None:
        self._line(f"{self._at(event.step)}saved {path}", "dim")

    def diagnosed(self, event: DiagnosedEvent, text: str) -> None:
        self.last_finding = text
        self._line(text)

    def held_out_in_words(self) -> str:
        """The last held-out loss with its noise, and the best one before; empty before the first evaluation."""
        if not self.held_out:
            return ""
        last, best = self.held_out
        text = f"held-out {plus_minus(last.loss, last.stderr)} (step {last.step:,})"
        return text + (f", best {best.loss:.4f} (step {best.step:,})" if best is not last else "")

    def step_in_words(self, columns: int | None = None) -> str:
        """The last step, for a line that is updated. Made when it is drawn, not at each step."""
        step = self.meter.last
        figures = [f"{step.step:,}/{step.total_steps:,}"] if step else []
        return _fitting([*figures, f"loss {self.meter.loss:.4f}", *self.meter.figures()], columns)

    def _at(self, step: int) -> str:
        total = f"{self._total_steps:,}"
        return f"step {step:>{len(total)},}/{total}  "

    @property
    def _columns(self) -> int | None:
        """Of the terminal; None in a pipe, where lines are never shortened."""
        return self.console.width if self.console.is_terminal else None

    def _more_figures(self) -> list[str]:
        return self.meter.figures()

    def _line(self, text: str, style: str = "") -> None:
        text = escape_terminal(text)
        if self.console.is_terminal:
            self.console.print(Text(text, style), crop=False)  # it wraps
            return
        try:  # as it is: there is nothing for rich to do, and it takes four times as long
            self.console.file.write(text.expandtabs() + "\n")
            self.console.file.flush()
        except BrokenPipeError:
            self.console.on_broken_pipe()


class _Bar(NamedTuple):
    """What the live line shows."""

    done: int
    total: int | None  # None: unknown
    figures: Callable[[int], str]  # for a terminal of so many columns; called when it is drawn


class LiveDisplay(PlainDisplay):
    """The same lines, and below them one line that is updated."""

    def __init__(self, logging_steps: int, console: Console) -> None:
        super().__init__(logging_steps, console)
        self._bar: _Bar | None = None
        self._phase = ("", 0.0)
        self._live = Live(self, console=console, transient=True, refresh_per_second=REFRESHES)

    def phase(self, name: str) -> None:
        self._end_phase()
        self._phase = name, started = name, time.monotonic()
        self._show(_Bar(0, None, lambda columns: f"{escape_terminal(name)}  {time.monotonic() - started:.0f} s"))

    def progress(self, done: int, total: int, what: str) -> None:
        figures = f"{done:,}/{total:,} {escape_terminal(what)}" if total else escape_terminal(what)
        self._bar = _Bar(done, total or None, lambda columns: figures)
        if not self._live.is_started:
            self._show(self._bar)

    def begin(self, total_steps: int, done: int = 0) -> None:
        self._end_phase()
        super().begin(total_steps, done)
        self._show(_Bar(done, total_steps, lambda columns: "first step (slower than the others)"))

    def step(self, event: StepEvent) -> None:
        super().step(event)
        self._bar = _Bar(event.step, event.total_steps, self.step_in_words)

    def finish(self) -> None:
        self._end_phase()
        self._hide()

    def _more_figures(self) -> list[str]:
        return []  # the live line has them

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """What is drawn: the bar, which gets the width that its figures leave, and lines below, each cut at the right
        edge. Rich's own, a table of texts, takes 2.5 times as long."""
        bar, columns = self._bar, options.max_width
        if bar is None:
            return
        text = bar.figures(columns)
        figures = set_cell_size(text, min(cell_len(text), columns - MIN_BAR))
        width = columns - cell_len(figures) - 1
        drawing = ProgressBar(bar.total, bar.done, width, animation_time=time.monotonic())
        drawing.complete_style = drawing.finished_style = "green"
        parts = drawing.__rich_console__(console, options)  # without colour only what is done
        drawn = [part for part in parts if isinstance(part, Segment)]
        yield from drawn
        yield Segment(" " * (width - sum(part.cell_length for part in drawn)) + f" {figures}")
        yield Segment.line()
        for line in self._below(columns):
            text = escape_terminal(line.partition("\n")[0]).expandtabs()
            is_cut = cell_len(text) > columns
            yield Segment(set_cell_size(text, columns - 1) + "…" if is_cut else text, console.get_style("dim"))
            yield Segment.line()

    def _below(self, columns: int) -> list[str]:
        """Held-out loss and memory in one line where both have a place, then the last finding."""
        figures = [text for text in (self.held_out_in_words(), self.meter.memory_in_words()) if text]
        both = "   ".join(figures)
        lines = [both] if cell_len(both) <= columns else figures
        return [text for text in (*lines, self.last_finding) if text]

    def _show(self, bar: _Bar) -> None:
        self._hide()
        self._bar = bar
        self._live.start(refresh=True)

    def _hide(self) -> None:
        self._live.stop()
        self._bar = None

    def _end_phase(self) -> None:
        name, started = self._phase
        if name:
            self._line(f"{name}  {time.monotonic() - started:.1f} s", "dim")
        self._phase = ("", 0.0)


def make_display(logging_steps: int, stream: IO[str]) -> PlainDisplay:
    """`LiveDisplay` on a terminal that can move its cursor, otherwise `PlainDisplay`."""
    is_live = stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")
    return (LiveDisplay if is_live else PlainDisplay)(logging_steps, make_console(stream))


def print_choices(choices: Sequence[Choice], console: Console) -> None:
    """Print each setting that solotune chose, with its reason."""
    if not choices:
        return
    rows = [
        (f"{c.key}: {str(c.value).lower() if isinstance(c.value, bool) else c.value}", f"because {c.because}")
        for c in choices
    ]
    console.print(Text("settings chosen for you:"))
    print_columns(rows, ("bold", "dim"), console)


def print_columns(rows: Sequence[Sequence[str]], styles: Sequence[str], console: Console) -> None:
    """Print rows of text, with the last column wrapped; in a pipe each row is one line, for grep.

    Where the first columns leave less than half of the terminal, the last one is printed below them.
    """
    if not console.is_terminal:
        widths = [max(len(row[i]) for row in rows) for i in range(len(styles) - 1)]
        for row in rows:
            cells = [escape_terminal(cell).ljust(width) for cell, width in zip(row, widths, strict=False)]
            console.print(Text("  ".join([*cells, escape_terminal(row[-1])]).rstrip()), soft_wrap=True)
        return
    before = sum(max(cell_len(row[i]) for row in rows) + 2 for i in range(len(styles) - 1))
    if before > console.width // 2:
        for row in rows:
            head = Text("  ").join(
                Text(escape_terminal(cell), style) for cell, style in zip(row[:-1], styles, strict=False) if cell
            )
            console.print(head) if head else None
            console.print(Padding(Text(escape_terminal(row[-1]), styles[-1]), (0, 0, 0, 4)))
        return
    table = Table.grid(padding=(0, 2))
    for i, style in enumerate(styles):
        table.add_column(style=style, no_wrap=i < len(styles) - 1, overflow="fold")
    for row in rows:
        table.add_row(*(Text(escape_terminal(cell)) for cell in row))
    console.print(table)


# --- figures as text


def _loss_of(event: EvalEvent) -> float:
    """For a minimum: NaN is never the lowest."""
    return math.inf if math.isnan(event.loss) else event.loss


def _fitting(figures: Sequence[str], columns: int | None) -> str:
    """The figures in one line, without those in the middle for which a narrow terminal has no place."""
    kept = list(figures)
    while columns is not None and len(kept) > 2 and len("  ".join(kept)) > columns - MIN_BAR:
        del kept[-2]
    return "  ".join(kept)
