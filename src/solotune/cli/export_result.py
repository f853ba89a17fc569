"""Print the result of `solotune export` for people: what was written, how near it is, what to run next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from solotune.cli.results import SIGNS
from solotune.display.progress import print_columns

if TYPE_CHECKING:
    from solotune.exporters.artifact import Export


def print_export(export: Export, console: Console) -> None:
    """The bases that were measured, the artifacts with their parity, problems, notes and next commands."""
    if rows := export.merge_rows():
        _print_table(("merged into", "mean KL", "top-1", "loss", "exact"), rows, console)
    _print_table(("artifact", "size", "engine", "ids", "mean KL", "top-1"), export.parity_rows(), console)
    problems = [(one.kind, problem) for one in export.artifacts for problem in one.problems]
    for kind, problem in problems:
        sign, style = SIGNS["fail"]
        print_columns([(sign, kind, problem)], (style, "bold", ""), console)
    for one in export.artifacts:
        for note in one.notes:
            print_columns([("·", one.kind, note)], ("dim", "bold", ""), console)
    console.print()
    facts = [(one.kind, str(one.path)) for one in export.artifacts]
    facts += [("run it", command) for one in export.artifacts for command in one.next_commands]
    print_columns(facts, ("bold", ""), console)
    verdict = f"{len(problems)} problem{'s' * (len(problems) != 1)}: this is not what was trained"
    console.print(Text(verdict, "bold red") if problems else Text("exported as it was trained", "bold green"))


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """A table without the columns that are empty."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    kept = [place for place in range(len(header)) if any(row[place] for row in rows)]
    for place in kept:
        table.add_column(header[place], justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(row[place] for place in kept))
    console.print(table)
