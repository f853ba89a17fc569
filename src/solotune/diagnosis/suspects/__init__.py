"""The rules: one file a suspect, one function a fault, whose docstring is what `solotune explain F65` prints.

    @rule("F65", needs=("settings",))
    def warmup_past_the_end(subject: Subject) -> Signal | list[Signal] | None: ...

A rule sees its fault and says so, or returns nothing: it never speaks for another fault, and never raises. `needs` are
the parts of a `Subject` without which it cannot be asked, `probes` those that look where it cannot. A fault may have
several rules; the first one's docstring explains it. Its headings are *Sees*, *Why*, *Not* (look-alikes, and what tells
them apart), *Fix*, *Wrong when*, *Source*.

The rules on rows (`dataset.findings`) are not written a second time: `taken_over` makes their findings signals.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from solotune.diagnosis.evidence import Kind, Signal
from solotune.diagnosis.rows import findings_of
from solotune.diagnosis.subject import Subject

Answer = Signal | list[Signal] | None
Ask = Callable[[Subject], Answer]
Function = TypeVar("Function", bound=Ask)


@dataclass(frozen=True)
class Rule:
    """One rule as it was registered."""

    code: str  # F65
    ask: Ask
    needs: tuple[str, ...]  # parts of a Subject
    probes: tuple[str, ...]  # P1 ... P12

    @property
    def suspect(self) -> str:
        """S13, from the name of its file."""
        return f"S{int(self.ask.__module__.rsplit('.', 1)[-1][1:3])}"

    @property
    def doc(self) -> str:
        """What `solotune explain` prints."""
        return self.ask.__doc__ or ""

    @property
    def loads(self) -> bool:
        """Whether it looks at the model and the batches themselves."""
        return "live" in self.needs

    def lacks(self, subject: Subject) -> str | None:
        """Why it cannot be asked of this subject; None where it can."""
        for part in self.needs:
            value = getattr(subject, part)
            if value is None or (not isinstance(value, (int, float)) and hasattr(value, "__len__") and not len(value)):
                return subject.missing.get(part, _ABSENT.get(part, f"no {part}"))
        return None


_ABSENT = {
    "trace": "no step is recorded",
    "saved": "nothing was saved",
    "batches": "no batch could be made",
    "tokenizer": "there is no tokenizer",
    "train": "no rows are known",
    "live": "there is no model to run",
    "environment": "nothing is known of the machine",
    "model_config": "the base's config.json is not here",
}
"""Why a part is not there, where nobody said it."""

_RULES: list[Rule] = []


def rule(code: str, needs: Iterable[str] = (), probes: Iterable[str] = ()) -> Callable[[Function], Function]:
    """Registers a function as a rule on the fault `code`."""

    def registered(function: Function) -> Function:
        _RULES.append(Rule(code, function, tuple(needs), tuple(probes)))
        return function

    return registered


@cache
def rules() -> dict[str, tuple[Rule, ...]]:
    """All rules by the code of their fault, in the catalogue's order."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    codes = sorted({known.code for known in _RULES})
    return {code: tuple(known for known in _RULES if known.code == code) for code in codes}


def ask_all(subject: Subject, loads: bool = False) -> tuple[list[Signal], dict[str, str]]:
    """What all rules say, and (code -> why) those that could not be asked, which the diagnosis leaves open.

    Args:
        loads: also ask the rules that need `live`, which loads the model; `subject.live` should keep what it loaded.
    """
    signals: list[Signal] = []
    unasked: dict[str, str] = {}
    for code, known in rules().items():
        lacking = {one: "the model was not loaded" if one.loads and not loads else one.lacks(subject) for one in known}
        if all(lacking.values()):
            unasked[code] = lacking[known[0]] or ""
        for one in known:
            if lacking[one] is None:
                try:
                    signals += signals_of(one.ask(subject))
                except Exception as error:  # over what a foreign file may hold; the other rules' answers stand
                    unasked[code] = f"its rule failed: {type(error).__name__}: {error}"[:200]
    return signals, unasked


def signals_of(answer: Answer) -> list[Signal]:
    """A rule's answer as a list."""
    return answer if isinstance(answer, list) else [] if answer is None else [answer]


_WORTH: dict[str, tuple[Kind, float]] = {"error": ("invariant", 0.9), "warning": ("measured", 0.6)}
"""What a finding of rows is worth by its severity; `info` is something to know, and speaks for no fault."""


def taken_over(subject: Subject, code: str) -> list[Signal]:
    """The findings of rows, tokenizer and template with this code, as signals."""
    signals = []
    for found in findings_of(subject):
        if found.code == code and found.severity in _WORTH:
            kind, weight = _WORTH[found.severity]
            signals.append(Signal(code, kind, found.message, weight, found.evidence, fix=found.fix))
    return signals
