"""How a result of the Python API shows itself: one line in a terminal, small tables in a notebook.

    class Report(ResultRepr):
        def figures(self): return {"rows": 300, "loss": 1.2345678}
        def tables(self): return [Table("Findings", ("code", "what"), rows)]

    Report(rows=300, loss=1.235)        repr
    rows  | 300                         `_repr_html_`: the figures, then the tables
    loss  | 1.235

Every text is escaped, since rows and answers hold anything. The tables have no colours of their own, so they are
readable in light and in dark notebooks, and their `$` is not taken for a formula.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from solotune.units import escape_terminal

LONGEST_VALUE = 60  # characters of a text in the one line
_CELL = 'style="text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:break-word" dir="auto"'


class Html(str):
    """Text that is HTML already, with everything in it escaped."""


@dataclass(frozen=True)
class Table:
    """A titled table; a cell is a text, a number, None (empty) or `Html`."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]


class ResultRepr:
    """Base of the results: `repr` and `_repr_html_`, made of `figures` and `tables`.

    A dataclass needs `repr=False`, or it makes its own `repr`.
    """

    __slots__ = ()

    def figures(self) -> Mapping[str, object]:
        """Name -> value: what the one line says. A value of None is left out."""
        raise NotImplementedError

    def tables(self) -> Iterable[Table]:
        """What a notebook shows below the figures."""
        return ()

    def __repr__(self) -> str:
        shown = (f"{name}={_in_line(value)}" for name, value in self.figures().items() if value is not None)
        return f"{type(self).__name__}({', '.join(shown)})"

    def _repr_html_(self) -> str:
        figures = [(name.replace("_", " "), value) for name, value in self.figures().items() if value is not None]
        return as_html([Table("", (), figures), *self.tables()])


def as_html(tables: Iterable[Table]) -> str:
    """The tables below each other; those without a row are left out."""
    parts = [_table(table) for table in tables if table.rows]
    return f'<div class="tex2jax_ignore mathjax_ignore">{"".join(parts)}</div>'


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook (Jupyter, Colab, VS Code)."""
    ipython = sys.modules.get("IPython")  # not imported for this: without it, there is no notebook
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def escaped(text: str) -> Html:
    """Text as HTML; line breaks stay, and other control characters become a visible sign."""
    return Html(html.escape(escape_terminal(text)))


def _table(table: Table) -> str:
    head = "".join(f"<th {_CELL}>{escaped(name)}</th>" for name in table.header)
    rows = "".join(f"<tr>{''.join(f'<td {_CELL}>{_cell(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    title = (
        f'<caption style="text-align:left;font-weight:bold;padding-top:0.5em">{escaped(table.title)}</caption>'
        if table.title
        else ""
    )
    return f"<table>{title}{f'<thead><tr>{head}</tr></thead>' if head else ''}<tbody>{rows}</tbody></table>"


def _cell(value: object) -> str:
    if isinstance(value, Html):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    return escaped("" if value is None else f"{value:,}" if isinstance(value, int) else _number(value))


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _in_line(value: object) -> str:
    text = str(value) if isinstance(value, Path) else value
    if not isinstance(text, str):
        return _number(value)
    return repr(text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}...")
