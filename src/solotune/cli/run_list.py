"""Print the result of `solotune runs`: a table, or two lines a run where the table is wider than the screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from solotune.units import escape_terminal, format_bytes

if TYPE_CHECKING:
    from solotune.run.run_dir import RunSummary

MIN_COLUMNS_FOR_ALL_FIGURES = 104


def print_runs(runs: Sequence[RunSummary], root: str | Path, console: Console) -> None:
    """One line per run, oldest first."""
    if not runs:
        console.print(
            Text(escape_terminal(f"No runs in {root} yet. Start one with: solotune train CONFIG")), soft_wrap=True
        )
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("run", no_wrap=True)
    table.add_column("status", no_wrap=True)
    wide = console.width >= MIN_COLUMNS_FOR_ALL_FIGURES
    for name in (
        "step",
        "held-out loss\nbase → tuned",
        "exact\nmatch",
        *(("train\nloss", "tok/s", "peak") if wide else ()),
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        figures = [
            *_figures(run),
            "" if run.train_loss is None else f"{run.train_loss:.3f}",
            "" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
            format_bytes(run.peak_bytes) if run.peak_bytes else "",
        ]
        table.add_row(
            Text(escape_terminal(run.name)), Text(run.status, _status_style(run)), *figures[: None if wide else 3]
        )
    if console.measure(table, options=console.options.update(width=10_000)).maximum > console.width:
        _print_runs_narrow(runs, console)
    else:
        console.print(table)


def _print_runs_narrow(runs: Sequence[RunSummary], console: Console) -> None:
    """Two lines for each run."""
    for run in runs:
        console.print(Text.assemble((escape_terminal(run.name), "bold"), "  ", (run.status, _status_style(run))))
        names = ("step", "held-out loss", "exact match")
        parts = [f"{name} {figure}" for name, figure in zip(names, _figures(run), strict=True) if figure]
        console.print(Padding(Text(", ".join(parts)), (0, 0, 0, 2)))


def _figures(run: RunSummary) -> list[str]:
    """Steps, held-out loss of base and tuned, exact match; empty where unknown."""
    return [
        f"{run.steps:,}/{run.total_steps:,}" if run.total_steps else f"{run.steps:,}",
        "" if None in (run.base_loss, run.tuned_loss) else f"{run.base_loss:.3f} → {run.tuned_loss:.3f}",
        "" if run.exact_match is None else f"{run.exact_match:.0%}",
    ]


def _status_style(run: RunSummary) -> str:
    return {"finished": "", "running": "green"}.get(run.status, "yellow")
