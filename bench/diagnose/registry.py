"""Where faults and healthy oddities are registered: a name, a code, what it needs of a base, and a function."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from bench.diagnose.bases import KINDS, Kind
from bench.diagnose.recipe import Recipe

Change = Callable[[Recipe, random.Random], None]


class Needs(Enum):
    """What a base must have for a change to mean anything."""

    ANY = "any base"
    INSTRUCT = "a chat template"
    NO_TEMPLATE = "no chat template"
    BOS = "a token that begins a text"
    ABSOLUTE = "absolute positions"
    ROTARY = "rotary positions"
    SEPARATE = "separate q, k and v"

    def met_by(self, kind: Kind) -> bool:
        absolute = kind.family in ("GPT2", "OPT")
        return {
            Needs.ANY: True,
            Needs.INSTRUCT: kind.is_instruct,
            Needs.NO_TEMPLATE: not kind.is_instruct,
            Needs.BOS: bool(kind.format.bos),
            Needs.ABSOLUTE: absolute,
            Needs.ROTARY: not absolute,
            Needs.SEPARATE: kind.family not in ("GPT2", "GPTNeoX"),
        }[self]


@dataclass(frozen=True)
class Injection:
    """One change to a clean recipe; `code` is empty where the run stays healthy."""

    code: str
    name: str
    needs: Needs
    change: Change

    def fits(self, base: str) -> bool:
        return self.needs.met_by(KINDS[base])


FAULTS: list[Injection] = []
HEALTHY: list[Injection] = []


def fault(code: str, needs: Needs = Needs.ANY) -> Callable[[Change], Change]:
    def registered(change: Change) -> Change:
        FAULTS.append(Injection(code, change.__name__, needs, change))
        return change

    return registered


def healthy(needs: Needs = Needs.ANY) -> Callable[[Change], Change]:
    def registered(change: Change) -> Change:
        HEALTHY.append(Injection("", change.__name__, needs, change))
        return change

    return registered
