"""The user's own metric: a function in a Python file.

    def length_ratio(answer, reference):                      score.py, for metrics: [{python: score.py:length_ratio}]
        return min(1.0, len(answer) / max(1, len(reference)))

Its parameters are found by name: any of `answer`, `reference` and `prompt`. The file is run, so it must be one that the
user names himself, on the command line or in Python: a config file, or a run, may come from elsewhere (`api.evaluate`
sees to it).
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from solotune.config.metric_specs import MetricSpec
from solotune.errors import InputError

PARAMETERS: tuple[str, ...] = ("answer", "reference", "prompt")


def load_function(spec: MetricSpec) -> Callable[[str, str, str], Any]:
    """The function of a `python` metric, called as (answer, reference, prompt).

    Raises:
        InputError: no such file or function, the file fails, or the function has other parameters.
    """
    path = Path(os.path.abspath(os.path.expanduser(spec.file)))
    where = f"metrics, {spec}"
    if not path.is_file():
        raise InputError(f"{where}: no such file", seen=str(path), allowed="FILE.py:FUNCTION")
    function = getattr(_module(path, where), spec.function, None)
    if not callable(function):
        raise InputError(f"{where}: the file has no function {spec.function}", seen=str(path))
    takes = _parameters(function, where)

    def call(answer: str, reference: str, prompt: str) -> Any:
        given = dict(zip(PARAMETERS, (answer, reference, prompt), strict=True))
        return function(**{name: given[name] for name in takes})

    return call


def _module(path: Path, where: str) -> Any:
    """Run the file as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"solotune_metric_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        at = f", line {line}" if line else ""
        raise InputError(
            f"{where}: the file fails when it is read: {type(error).__name__}: {error}", seen=f"{path}{at}"
        ) from error
    return module


def _parameters(function: Callable[..., Any], where: str) -> list[str]:
    """Which of `PARAMETERS` the function takes."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions that are written in C have none
        found = []
    named = [one for one in found if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    takes = [one.name for one in named if one.name in PARAMETERS]
    if any(one.kind is one.VAR_KEYWORD for one in found):
        takes = list(PARAMETERS)
    unknown = [one.name for one in named if one.name not in PARAMETERS and one.default is one.empty]
    by_place = [one.name for one in found if one.kind is one.POSITIONAL_ONLY]
    if unknown or by_place or "answer" not in takes:
        raise InputError(
            f"{where}: the function has other parameters",
            seen=", ".join([*by_place, *(one.name for one in named)]) or "none",
            allowed="answer, and if you need them reference and prompt, by these names",
        )
    return takes
