"""The command `solotune watch`, as the other verbs in `commands`: parse, call the verb, print the result."""

from __future__ import annotations

import sys

import click

from solotune.cli.options import json_option
from solotune.cli.output import print_result, shown


@click.command()
@click.argument("run")
@json_option
@click.pass_context
def watch(ctx: click.Context, run: str, as_json: bool) -> None:
    """Show the progress of a RUN from another terminal.

    RUN is a folder, a name in runs/, or latest; it need not exist yet. Only its files are read, so this view may start
    late, stop and start again, and the run does not notice. When the run ends, a summary is printed. The exit code is 0
    for a finished run, 3 if the diagnosis found a fault or the process of the run is gone, 6 for NaN or infinite values
    and 7 if the GPU failed.

    On a terminal, a run whose process is gone is waited for until --resume continues it; Ctrl-C ends this view, never
    the run.

    \b
    Example:
      solotune watch runs/solotune-20260101-120000
    """
    with shown("looking for the run") as display:
        from solotune.api.watch import watch
        from solotune.cli.results import print_watched

        found = watch(run, wait_for_resume=sys.stdout.isatty() and not as_json, display=display)
    print_result(found, print_watched, as_json)
    ctx.exit(found.exit_code)
