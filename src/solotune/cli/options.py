"""Arguments and options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    help_text = "Print one JSON object on stdout and everything else on stderr."
    return click.option("--json", "as_json", is_flag=True, help=help_text)(command)


def config_arguments(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(command)
    return click.argument("config", metavar="CONFIG")(command)
