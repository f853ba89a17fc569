"""Programs of the unseen split: a base, a task, a change, and the way in which it is trained and handed over.

    kind      trained by                       the diagnosis is given
    loop      a loop written by hand           what the process has: rows, batches, curve, live model, adapter
    alone     transformers' Trainer            the output folder, beside which data and config lie
    folder    transformers' Trainer            the output folder, `dataset=` and `config=`
    own       solotune                         the run directory
    before    nothing yet                      the config

The first code is the truth; the others are names for the same thing, where nothing could tell them apart.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

KINDS_OF_PROGRAM = ("loop", "alone", "folder", "own", "before")


@dataclass(frozen=True)
class Unseen:
    codes: tuple[str, ...]
    what: str
    why: str
    kind: str
    base: str
    task: str
    change: Callable[[Any, random.Random], None]
    split: str = "unseen"

    @property
    def name(self) -> str:
        return f"{'|'.join(self.codes) or 'healthy'}/{self.what}/{self.base}/{self.task}/{self.kind}"

    @cached_property
    def seed(self) -> int:
        return int(hashlib.sha256(self.name.encode()).hexdigest()[:6], 16)


@dataclass(frozen=True)
class Parts:
    """What a set of programs brings along; make.py, run.py and verify.py are the same for all sets."""

    name: str
    """Of its package in bench.diagnose."""
    programs: Callable[[], list[Unseen]]
    load: Callable[[str], Any]
    folder_of: Callable[[str], Path]
    end_ids: Callable[[Any], list[int]]
    linears: Callable[[Any], list[str]]
    split: Callable[[str, Any, int, int, int], tuple[list[Any], list[Any]]]
    templates: dict[str, str]
    """LLaMA-Factory's names of the bases' formats."""


PROGRAMS: list[Unseen] = []


def program(*codes: str, on: tuple[str, ...] | str) -> Callable[[Callable[[Any, random.Random], None]], Any]:
    """`on`: "base/task/kind", one or more."""

    def registered(change: Callable[[Any, random.Random], None]) -> Any:
        for place in (on,) if isinstance(on, str) else on:
            base, task, kind = place.split("/")
            assert kind in KINDS_OF_PROGRAM, kind
            why = " ".join((change.__doc__ or "").split())
            PROGRAMS.append(Unseen(codes, change.__name__, why, kind, SHORT[base], task, change))
        return change

    return registered


SHORT = {"phi": "phi3-tags", "granite": "granite-roles", "cohere": "cohere-turns", "seek": "stablelm-seek",
         "olmo": "olmo2-books"}  # fmt: skip
