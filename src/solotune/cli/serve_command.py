"""The command `solotune serve`, as the other verbs in `commands`: parse, call the verb, print, wait."""

from __future__ import annotations

import sys

import click

from solotune.cli.options import json_option
from solotune.cli.output import console, print_json, shown
from solotune.units import escape_terminal


@click.command()
@click.argument("run")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free port.")
@click.option("--engine", metavar="NAME", help="transformers or llama.cpp. [default: what is installed]")
@json_option
def serve(run: str, host: str, port: int, engine: str | None, as_json: bool) -> None:
    """Serve the model of a RUN with OpenAI's API.

    The server is that of transformers on the merged model (pip install 'solotune[serve]'), or llama.cpp's on a GGUF
    file; what is not exported yet is exported first. Requests get the run's own chat template and stop tokens. It
    prints the base URL and a request to try, and ends with Ctrl-C. There is no key: it listens on this machine only,
    unless --host says otherwise.

    \b
    Example:
      solotune serve runs/solotune-20260101-120000 --port 8000
    """
    with shown(stream=sys.stderr if as_json else None) as display:
        from solotune.api.serve import serve

        serving = serve(run, host=host, port=port, engine=engine, display=display)
    with serving:
        if as_json:
            print_json(serving.to_json())
        else:
            lines = [f"Serving {serving.server.model}", f"  base URL  {serving.url}", f"  try       {serving.curl}"]
            notes = [f"  note      {note}" for note in serving.notes]
            console().out(escape_terminal("\n".join([*lines, *notes, "Ctrl-C ends it."])), highlight=False)
        try:
            serving.server.wait()
        except KeyboardInterrupt:
            click.echo("Stopped.", err=True)
