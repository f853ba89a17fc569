"""The scores of standard tasks, for people: part of what `solotune evaluate` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from solotune.evaluation.task_scores import TASK_HEADER, TaskScore, remarks
from solotune.units import escape_terminal

MIN_COLUMNS_FOR_TABLE = 96
STYLES = {"better": "green", "worse": "red"}


def print_tasks(scores: Sequence[TaskScore], console: Console) -> None:
    """A table, or in a narrow terminal each score below its name; then what has to be known of them."""
    if console.width < MIN_COLUMNS_FOR_TABLE:
        console.print()
        for one in scores:
            base, tuned, change = one.cells
            console.print(Text(escape_terminal(one.name), "bold"))
            line = f"  {base} → {tuned} ({change}), {one.rows:,} documents: "
            console.print(Text(line).append(one.verdict, STYLES.get(one.verdict, "")))
    else:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
        for place, name in enumerate(TASK_HEADER):
            is_text = name in ("task", "verdict")
            table.add_column(name, justify="left" if is_text else "right", no_wrap=place > 0, overflow="fold")
        for one in scores:
            style = STYLES.get(one.verdict, "")
            *numbers, change = one.cells
            cells = (
                escape_terminal(one.name),
                f"{one.rows:,}",
                *numbers,
                Text(change, style),
                Text(one.verdict, style),
            )
            table.add_row(*cells)
        console.print(table)
    console.print(Text("± is one standard error of the difference, paired by document", "dim"))
    for line in remarks(scores):
        console.print(Text(escape_terminal(line), "dim"), soft_wrap=not console.is_terminal)
