"""A run in one output of a notebook cell, updated in place; and which display a Python caller gets.

    [██████████────────]  31/120  loss 1.7901  1,204 tok/s  2.1 GiB  2:31 left
    step | loss | held-out loss    | exact match
      30 | 1.83 | 1.9012 ± 0.0213  | 12.0 %
    the lines that a log would have, in a box that scrolls

IPython's display handle does this in every front end, without widgets: the first call makes the output, and the next
ones replace its content. rich's own support is not used: it makes an output of each line, and its live display needs
ipywidgets and flickers, since it clears the output before it writes.

The bar is the browser's own, so it moves while a stage has no number of its own. The cell is updated at most every
`REFRESH_SECONDS`, because each update is a message with all of its content that the notebook keeps in memory.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from solotune.display.progress import (
    Display,
    PlainDisplay,
    SilentDisplay,
    make_console,
    make_display,
)
from solotune.hub.download_progress import shown_by
from solotune.result_repr import Table, as_html, escaped, in_notebook
from solotune.units import plus_minus

if TYPE_CHECKING:
    from solotune.config.run_config import Choice
    from solotune.run.events import EvalEvent, StepEvent

REFRESH_SECONDS = 0.5
MOST_LINES = 200  # of the log, in the cell; log.txt has all
_SCROLLS = "max-height:14em;overflow:auto;display:flex;flex-direction:column-reverse"  # stays at the last line


@dataclass(frozen=True)
class _Bar:
    done: int
    total: int  # 0: unknown
    figures: Callable[[], str]  # called when it is drawn


class NotebookDisplay(PlainDisplay):
    """Show a run in one output of the current cell.

    Args:
        stays: False for a verb whose result is what counts: at its end the output is emptied.
    """

    def __init__(self, logging_steps: int, stays: bool = True) -> None:
        self._log = io.StringIO()
        super().__init__(logging_steps, make_console(self._log, is_log=True))
        self._stays = stays
        self._handle: Any = None
        self._bar: _Bar | None = None
        self._evaluations: list[tuple[object, ...]] = []
        self._updated = 0.0

    def phase(self, name: str) -> None:
        self._bar = _Bar(0, 0, lambda: name)
        super().phase(name)

    def choices(self, choices: Sequence[Choice]) -> None:
        super().choices(choices)
        self._update()

    def progress(self, done: int, total: int, what: str) -> None:
        self._bar = _Bar(done, total, lambda: f"{done:,}/{total:,} {what}" if total else what)
        self._update_if_due()

    def begin(self, total_steps: int, done: int = 0) -> None:
        self._bar = _Bar(done, total_steps, lambda: "first step (slower than the others)")
        super().begin(total_steps, done)

    def step(self, event: StepEvent) -> None:
        self._bar = _Bar(event.step, event.total_steps, self.step_in_words)
        super().step(event)
        self._update_if_due()

    def evaluated(self, event: EvalEvent, num_rows: int) -> None:
        loss = f"{self.meter.last.loss:.4f}" if self.meter.last else ""
        held_out = plus_minus(event.loss, event.stderr)
        self._evaluations.append((event.step, loss, held_out, f"{event.exact_match:.1%}"))
        super().evaluated(event, num_rows)

    def finish(self) -> None:
        self._bar = None
        if self._handle is not None:
            self._update()

    def _more_figures(self) -> list[str]:
        return []  # the bar has them

    def _line(self, text: str, style: str = "") -> None:
        super()._line(text, style)
        self._update()

    def _update_if_due(self) -> None:
        if time.monotonic() - self._updated >= REFRESH_SECONDS:
            self._update()

    def _update(self) -> None:
        from IPython.display import display

        self._updated = time.monotonic()
        content = self._content()
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)

    def _content(self) -> dict[str, str]:
        if not self._stays and self._bar is None:
            return {"text/plain": "", "text/html": ""}
        lines = self._log.getvalue().splitlines()[-MOST_LINES:]
        header = ("step", "loss", "held-out loss", "exact match")
        evaluations = as_html([Table("", header, self._evaluations)]) if self._evaluations else ""
        log = f'<div style="{_SCROLLS}"><pre style="white-space:pre-wrap">{escaped(chr(10).join(lines))}</pre></div>'
        plain = [*lines, *([self._bar.figures()] if self._bar else [])]
        return {"text/plain": "\n".join(plain), "text/html": self._bar_html() + evaluations + log}

    def _bar_html(self) -> str:
        if self._bar is None:
            return ""
        value = f' value="{self._bar.done}" max="{self._bar.total}"' if self._bar.total else ""
        lines = (self.held_out_in_words(), self.meter.memory_in_words(), self.last_finding)
        below = "".join(f"<div>{escaped(line)}</div>" for line in lines if line)
        return f'<div><progress{value} style="width:20em"></progress> {escaped(self._bar.figures())}</div>{below}'


@contextlib.contextmanager
def showing(display: Display | None, logging_steps: int = 1, stays: bool = False) -> Iterator[Display]:
    """The display of a verb that is called from Python: the caller's, which the caller ends, or the usual one.

    That is one output of the cell in a notebook, the live view of the command line in IPython's shell, and nothing in a
    script. It is ended here.
    """
    if display is not None:
        yield display
        return
    usual = _usual(logging_steps, stays)
    try:
        with shown_by(usual.progress):
            yield usual
    finally:
        usual.finish()


def _usual(logging_steps: int, stays: bool) -> Display:
    if in_notebook():
        return NotebookDisplay(logging_steps, stays)
    is_shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)() is not None
    return make_display(logging_steps, sys.stdout) if is_shell else SilentDisplay()
