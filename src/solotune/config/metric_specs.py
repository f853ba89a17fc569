"""The key `metrics`: what each entry asks for, checked when the config is read.

    metrics:
      - json                                 answers that are JSON, and their fields
      - choice                               one of the references that the held-out rows have
      - choice: [refund, replace, cancel]    ... or of these
      - regex: 'Answer: (-?\\d+)'             the text in the brackets is that of the reference
      - python: score.py:length_ratio        your function, of your file; not run if only a config file names it

What they measure: `evaluation.metrics`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

FORMS = "exact_match, json, choice, {choice: [A, B]}, {regex: PATTERN}, {python: FILE.py:FUNCTION}"
_PYTHON = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)")


class MetricSpec(NamedTuple):
    """One entry of `metrics`."""

    kind: str
    pattern: str = ""
    choices: tuple[str, ...] = ()
    file: str = ""
    function: str = ""

    def __str__(self) -> str:
        return f"python: {self.file}:{self.function}" if self.kind == "python" else self.kind


def metric_specs(entries: Sequence[Any]) -> list[MetricSpec]:
    """The entries of `metrics`, checked.

    Raises:
        ValueError: an entry is not one of `FORMS`.
    """
    return [_spec(entry) for entry in entries]


def _spec(entry: Any) -> MetricSpec:
    kind: Any = entry
    argument: Any = None
    if isinstance(entry, dict) and len(entry) == 1:
        kind, argument = next(iter(entry.items()))
    if kind in ("exact_match", "json", "choice") and argument is None:
        return MetricSpec(kind)
    if kind == "choice" and isinstance(argument, list):
        choices = tuple(choice.strip() for choice in argument)
        if len({choice.casefold() for choice in choices}) < max(2, len(choices)) or "" in choices:
            raise ValueError(f"choice: {argument}: at least two different texts")
        return MetricSpec(kind, choices=choices)
    if kind == "regex" and isinstance(argument, str):
        try:
            groups = re.compile(argument).groups
        except re.error as error:
            raise ValueError(f"regex: {argument}: {error}") from None
        if groups > 1:
            raise ValueError(f"regex: {argument}: one group in brackets, or none; write (?:...) for the others")
        return MetricSpec(kind, pattern=argument)
    if kind == "python" and isinstance(argument, str) and (found := _PYTHON.fullmatch(argument)):
        return MetricSpec(kind, file=found["file"], function=found["function"])
    raise ValueError(f"{entry}: not one of {FORMS}")
