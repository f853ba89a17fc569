"""Registers the programs of this set; what changes a recipe or a job is the second and third set's."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from bench.diagnose.unseen.registry import KINDS_OF_PROGRAM, Unseen
from bench.diagnose.unseen4.styles import STYLES

PROGRAMS: list[Unseen] = []
SHORT = {"ernie": "ernie-middle", "seed": "seed-turns", "apertus": "apertus-ends", "neo": "neo-bot",
         "glm": "glm-plain"}  # fmt: skip


def program(codes: str = "", *, on: str, style: Any = None) -> Callable[[Callable[[Any, random.Random], None]], Any]:
    """`codes`: "F21|F18", the truth first, or nothing; `on`: "base/task/kind", one or more, with spaces between;
    `style`: the loop of those by hand, where the change needs a certain one."""

    def registered(change: Callable[[Any, random.Random], None]) -> Any:
        for place in on.split():
            base, task, kind = place.split("/")
            assert kind in KINDS_OF_PROGRAM, kind
            why = " ".join((change.__doc__ or "").split())
            truth = tuple(filter(None, codes.split("|")))
            whole = _by_hand(change, style) if kind == "loop" else change
            PROGRAMS.append(Unseen(truth, change.__name__, why, kind, SHORT[base], task, whole, "unseen4"))
        return change

    return registered


def _by_hand(change: Callable[[Any, random.Random], None], style: Any) -> Callable[[Any, random.Random], None]:
    """In the style that is asked for, or in one by the program's seed."""

    def changed(made: Any, rng: random.Random) -> None:
        made.script = style or STYLES[made.seed % len(STYLES)]
        change(made, rng)

    return changed
