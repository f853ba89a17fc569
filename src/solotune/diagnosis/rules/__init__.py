"""Rules: one function per fault, whose docstring `solotune explain F65` prints.

    @rule("F65", needs=("settings",))
    def warmup_past_the_end(run_facts: RunFacts) -> Signal | list[Signal] | None: ...

    @rule("F08", needs=("rows",))
    def double_bos(facts: RowFacts) -> Finding | list[Finding] | None: ...

What a rule does
----------------
A rule reports its fault or returns nothing. It never reports another fault, and never raises. `needs` are the parts of
`RunFacts` that it cannot do without, `probes` the experiments that check what it cannot. A fault may have several
rules; the docstring of the first one explains the fault, under the headings *Sees*, *Why*, *Not* (look-alikes, and how
to tell them apart), *Fix*, *Wrong when* and *Source*. `explanation.HEADINGS` has the printed headings.

Rules on rows
-------------
A rule that needs `rows` runs before any GPU is used: `solotune data` and `train` run it through `data_checks`, a
diagnosis through `findings_of`. It gets `RowFacts` and returns findings, which a diagnosis weighs as signals. It judges
labels and tokens, never a config flag alone: pad = eos is a fault only if the end of turn is not among the labels. It
does not trust the code that made the rows, so that rules on faults that solotune cannot make (F17, F20, F23, F47) check
solotune too, and find the faults in rows of other tools.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, TypeVar

from solotune.diagnosis.catalogue import FAULTS, UNLISTED
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.row_facts import RowFacts
from solotune.diagnosis.facts.rows import facts_of
from solotune.diagnosis.findings import SEVERITIES, Finding
from solotune.diagnosis.run_facts import RunFacts, Trace

Answer = Signal | list[Signal] | None
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Rule:
    """One registered rule."""

    code: str  # F65
    ask: Callable[[Any], Any]  # takes RunFacts, or RowFacts if it needs rows
    needs: tuple[str, ...]  # parts of RunFacts
    probes: tuple[str, ...]  # P1 ... P15
    otherwise: bool  # runs only if earlier rules of its fault report nothing
    unless: Callable[[RunFacts], bool] | None  # does not run if this is true

    @property
    def suspect(self) -> str:
        """The suspect's number: S13."""
        return FAULTS[self.code].suspect

    @property
    def doc(self) -> str:
        """The docstring that `solotune explain` prints."""
        return self.ask.__doc__ or ""

    @property
    def loads(self) -> bool:
        """Whether it needs the loaded model and batches."""
        return "live" in self.needs

    @property
    def reads_rows(self) -> bool:
        """Whether it judges `RowFacts`."""
        return "rows" in self.needs

    def lacks(self, run_facts: RunFacts) -> str | None:
        """Why the rule cannot run on these facts; None if it can."""
        for part in self.needs:
            if part == "rows":  # without rows there are no findings, and other rules use other parts
                continue
            value = getattr(run_facts, part)
            if value is None or (not isinstance(value, (int, float)) and hasattr(value, "__len__") and not len(value)):
                return run_facts.missing.get(part, _ABSENT.get(part, f"no {part}"))
        return None

    def signals(self, run_facts: RunFacts) -> list[Signal]:
        """Run the rule on the facts of a run."""
        if self.unless is not None and self.unless(run_facts):
            return []
        if self.reads_rows:
            return signals_of_rows(run_facts, self.code)
        answer: Answer = self.ask(run_facts)
        return answer if isinstance(answer, list) else [] if answer is None else [answer]


_ABSENT = {
    "trace": "no step is recorded",
    "saved": "nothing was saved",
    "batches": "no batch could be built",
    "tokenizer": "there is no tokenizer",
    "train": "the training rows are unknown",
    "live": "there is no model to run",
    "environment": "the machine is unknown",
    "model_config": "the config.json of the base model is missing",
}
"""Why a part of `RunFacts` is missing, unless `RunFacts.missing` says why."""

_RULES: list[Rule] = []


def rule(
    code: str,
    needs: Iterable[str] = (),
    probes: Iterable[str] = (),
    *,
    otherwise: bool = False,
    unless: Callable[[RunFacts], bool] | None = None,
) -> Callable[[Function], Function]:
    """Register a function as a rule on the fault `code`; see `Rule` for the arguments."""

    def registered(function: Function) -> Function:
        _RULES.append(Rule(code, function, tuple(needs), tuple(probes), otherwise, unless))
        return function

    return registered


@cache
def rules() -> dict[str, tuple[Rule, ...]]:
    """All rules by the code of their fault, in the order of the catalogue."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    codes = sorted({known.code for known in _RULES})
    return {code: tuple(known for known in _RULES if known.code == code) for code in codes}


def ask_all(run_facts: RunFacts, loads: bool = False) -> tuple[list[Signal], dict[str, str]]:
    """Run all rules: their signals, and code -> why for those that could not run, which the diagnosis leaves open.

    Args:
        loads: also run the rules that need `live`, which loads the model; `run_facts.live` should cache the model.
    """
    signals: list[Signal] = []
    unasked: dict[str, str] = {}
    for code, known in rules().items():
        found, why = _ask(code, known, run_facts, loads)
        signals += found
        if why is not None:
            unasked[code] = why
    return signals, unasked


def _ask(code: str, known: Sequence[Rule], run_facts: RunFacts, loads: bool) -> tuple[list[Signal], str | None]:
    """Run the rules of one fault: their signals, and why it stays open (None if it does not)."""
    lacking = {one: "the model was not loaded" if one.loads and not loads else one.lacks(run_facts) for one in known}
    why = lacking[known[0]] or "" if all(lacking.values()) else None
    found: list[Signal] = []
    for one in known:
        if lacking[one] is not None or (one.otherwise and found):
            continue
        try:
            found += one.signals(run_facts)
        except Exception as error:  # foreign files may contain anything; the other rules still count
            why = f"its rule failed: {type(error).__name__}: {error}"[:200]
    return found, why


@dataclass(frozen=True, eq=False)
class _Watched(RunFacts):
    """Facts that notice who looks at the curve."""

    def __getattribute__(self, name: str) -> Any:
        if name == "trace":
            object.__setattr__(self, "was_seen", True)
        return super().__getattribute__(name)


class GrowingRun:
    """A run whose curve grows: only the faults whose rules looked at the curve are asked about again.

    Whether they look is seen, not declared: rules that ended without a look at `trace` say the same of any other one.
    What several rules share (`LabelFacts`, `findings_of`) must not depend on the curve, since only the first of them
    would be seen to look.
    """

    def __init__(self, run_facts: RunFacts) -> None:
        self.run_facts = run_facts
        self._settled: dict[str, list[Signal]] = {}

    def signals(self, trace: Trace | None = None) -> list[Signal]:
        """What all rules say that need no model, with this curve."""
        parts = {part.name: getattr(self.run_facts, part.name) for part in fields(RunFacts)}
        run_facts = _Watched(**{**parts, "trace": trace})
        signals: list[Signal] = []
        for code, known in rules().items():
            found = self._settled.get(code)
            if found is None:
                object.__setattr__(run_facts, "was_seen", False)
                found, _ = _ask(code, known, run_facts, loads=False)
                if not vars(run_facts)["was_seen"]:
                    self._settled[code] = found
            signals += found
        return signals


# --- rules on rows


def judge(facts: RowFacts) -> list[Finding]:
    """Run the rules on rows: findings, worst first; empty if nothing is wrong."""
    found: list[Finding] = []
    for one in (known for group in rules().values() for known in group if known.reads_rows):
        answer: Finding | list[Finding] | None = one.ask(facts)
        found += answer if isinstance(answer, list) else [] if answer is None else [answer]
    if facts.is_sample:
        sample = {"rows_judged": len(facts.train.rows), "training_rows": len(facts.whole[0].rows)}
        found = [replace(finding, evidence={**finding.evidence, **sample}) for finding in found]
    unlisted = set().union(*(UNLISTED.get(finding.code, ()) for finding in found))
    found = [finding for finding in found if finding.code not in unlisted]
    return sorted(found, key=lambda finding: (SEVERITIES.index(finding.severity), finding.code))


_last: list[tuple[RunFacts, Sequence[Finding]]] = []  # of the last RunFacts


def findings_of(run_facts: RunFacts) -> Sequence[Finding]:
    """Problems of the rows, tokenizer and template: those of `data_checks` where it ran, else of the run's own rows."""
    if run_facts.findings is not None:
        return run_facts.findings
    if not _last or _last[0][0] is not run_facts:
        facts = facts_of(run_facts)
        _last[:] = [(run_facts, () if facts is None else judge(facts))]
    return _last[0][1]


def signals_of_rows(run_facts: RunFacts, code: str) -> list[Signal]:
    """The findings with this code, as signals."""
    found = (finding.signal for finding in findings_of(run_facts) if finding.code == code)
    return [signal for signal in found if signal is not None]
