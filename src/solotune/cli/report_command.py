"""The command `solotune report`, as the other verbs in `commands`: parse, call the verb, print the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from solotune.cli.options import json_option
from solotune.cli.output import print_result, shown
from solotune.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from solotune.api.report import Report


@click.command()
@click.argument("run")
@click.argument("other", required=False)
@click.option("--out", metavar="FILE", help="File to write. [default: report.html in the run; of two runs, here]")
@json_option
def report(run: str, other: str | None, out: str | None, as_json: bool) -> None:
    """Write a page that shows a RUN, or compares it with an OTHER.

    One file that opens in any browser and needs no network: verdict and cause, base against tuned, answers, curves,
    memory and time, data with the learned tokens, config and environment. `solotune train` writes it at the end of a
    run; write it again after a crash, or after evaluate, diagnose or export.

    \b
    Example:
      solotune report runs/solotune-20260101-120000
    """
    with shown("reading the run"):
        from solotune.api.report import report

        written = report(run, other, out=out)
    print_result(written, print_report, as_json)


def print_report(written: Report, console: Console) -> None:
    """The file and its size."""
    console.print(f"{written.path}  ({format_bytes(written.bytes)})", highlight=False, markup=False, soft_wrap=True)
