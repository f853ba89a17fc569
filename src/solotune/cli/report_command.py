"""The command `solotune report`, as the other verbs in `commands`: parse, call the verb, print the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from solotune.cli.options import json_option
from solotune.cli.output import print_json, print_result, shown
from solotune.units import escape_terminal

if TYPE_CHECKING:
    from rich.console import Console

    from solotune.api.report import Report


@click.command()
@click.argument("run")
@click.argument("other", required=False)
@click.option("--out", metavar="FILE", help="File to write. [default: report.html in the run; of two runs, here]")
@click.option("--live", is_flag=True, help="Serve the page on this machine while the run goes on; writes no file.")
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="With --live; 0: any.")
@json_option
def report(run: str, other: str | None, out: str | None, live: bool, port: int, as_json: bool) -> None:
    """Write a page that shows a RUN, or compares it with an OTHER.

    One file that opens in any browser and needs no network: verdict and cause, base against tuned, answers, curves,
    memory and time, data with the learned tokens, config and environment. `solotune train` writes it at the end of a
    run; write it again after a crash, or after evaluate, diagnose or export.

    \b
    Example:
      solotune report runs/solotune-20260101-120000
    """
    if live:
        if other is not None or out is not None:
            raise click.UsageError("--live shows one RUN, and writes no file.")
        return _serve(run, port, as_json)
    with shown("reading the run"):
        from solotune.api.report import report

        written = report(run, other, out=out)
    print_result(written, print_report, as_json)


def _serve(run: str, port: int, as_json: bool) -> None:
    """Serve the page until Ctrl-C."""
    from solotune.report_page.build import build_page
    from solotune.report_page.curves import curves
    from solotune.report_page.live import LiveServer
    from solotune.run.run_dir import RunDirectory

    path = RunDirectory.open(run).path
    with LiveServer(path, build_page, curves, port) as server:
        if as_json:
            print_json({"run": str(path), "url": server.url})
        else:
            click.echo(escape_terminal(f"{path} at {server.url}\nCtrl-C ends this server, not the run."))
        try:
            server.wait()
        except KeyboardInterrupt:
            click.echo("Stopped.", err=True)


def print_report(written: Report, console: Console) -> None:
    """The file and its size."""
    console.print(f"{written.path}  ({written.size})", highlight=False, markup=False, soft_wrap=True)
