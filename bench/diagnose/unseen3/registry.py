"""Registers the programs of this set; what changes a recipe or a job is the second set's."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from bench.diagnose.unseen.registry import KINDS_OF_PROGRAM, Unseen
from bench.diagnose.unseen3.styles import STYLES

PROGRAMS: list[Unseen] = []
SHORT = {"smol": "smol3-think", "said": "bigcode-said", "fold": "nemotron-fold", "hun": "hunyuan-tools",
         "phi": "phi-plain"}  # fmt: skip


def program(codes: str = "", *, on: str) -> Callable[[Callable[[Any, random.Random], None]], Any]:
    """`codes`: "F21|F18", the truth first, or nothing; `on`: "base/task/kind", one or more, with spaces between."""

    def registered(change: Callable[[Any, random.Random], None]) -> Any:
        for place in on.split():
            base, task, kind = place.split("/")
            assert kind in KINDS_OF_PROGRAM, kind
            why = " ".join((change.__doc__ or "").split())
            truth = tuple(filter(None, codes.split("|")))
            whole = _by_hand(change) if kind == "loop" else change
            PROGRAMS.append(Unseen(truth, change.__name__, why, kind, SHORT[base], task, whole, "unseen3"))
        return change

    return registered


def _by_hand(change: Callable[[Any, random.Random], None]) -> Callable[[Any, random.Random], None]:
    """In one of the three styles, by the program's seed."""

    def changed(made: Any, rng: random.Random) -> None:
        made.script = STYLES[made.seed % 3]
        change(made, rng)

    return changed


def overridden(made: Any, **methods: Any) -> None:
    """The loop with methods of its own; each is given `self` and the method that it replaces."""

    def bound(name: str, method: Any, old: Any) -> Any:
        return lambda self, *given: method(self, old.__get__(self), *given)

    made.script = type(made.script.__name__, (made.script,), {
        name: bound(name, method, getattr(made.script, name)) for name, method in methods.items()
    })  # fmt: skip
