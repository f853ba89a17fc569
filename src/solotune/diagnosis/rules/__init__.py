"""The rules: one function a fault, whose docstring is what `solotune explain F65` prints.

    @rule("F65", needs=("settings",))
    def warmup_past_the_end(subject: Subject) -> Signal | list[Signal] | None: ...

    @rule("F08", needs=("rows",))
    def double_bos(facts: RowFacts) -> Finding | list[Finding] | None: ...

A rule sees its fault and says so, or returns nothing: it never speaks for another fault, and never raises. `needs` are
the parts of a `RunFacts` without which it cannot be asked, `probes` those that look where it cannot. A fault may have
several rules; the first one's docstring explains it. Its headings are *Sees*, *Why*, *Not* (look-alikes, and what tells
them apart), *Fix*, *Wrong when*, *Source*.

A rule that needs `rows` is asked before any GPU is used: by `solotune data` and `train` through `data_checks`, and by a
diagnosis through `findings_of`. It gets `RowFacts` and returns findings, which a diagnosis weighs as signals. It judges
labels and tokens, never a config flag alone: pad = eos is a fault exactly if the end of turn is not among the labels.
It trusts no code that made the rows, so that rules whose fault solotune cannot make (F17, F20, F23, F47) stand guard
over it, and see it in rows that were made elsewhere.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

from solotune.diagnosis.catalogue import FAULTS, UNLISTED
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.row_facts import RowFacts
from solotune.diagnosis.facts.rows import facts_of
from solotune.diagnosis.findings import SEVERITIES, Finding
from solotune.diagnosis.run_facts import RunFacts

Answer = Signal | list[Signal] | None
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Rule:
    """One rule as it was registered."""

    code: str  # F65
    ask: Callable[[Any], Any]  # of a Subject; of RowFacts where it needs rows
    needs: tuple[str, ...]  # parts of a Subject
    probes: tuple[str, ...]  # P1 ... P13
    otherwise: bool  # asked only where the rules of its fault before it say nothing
    unless: Callable[[RunFacts], bool] | None  # not asked where this holds

    @property
    def suspect(self) -> str:
        """S13."""
        return FAULTS[self.code].suspect

    @property
    def doc(self) -> str:
        """What `solotune explain` prints."""
        return self.ask.__doc__ or ""

    @property
    def loads(self) -> bool:
        """Whether it looks at the model and the batches themselves."""
        return "live" in self.needs

    @property
    def reads_rows(self) -> bool:
        """Whether it judges `RowFacts`."""
        return "rows" in self.needs

    def lacks(self, run_facts: RunFacts) -> str | None:
        """Why it cannot be asked of this subject; None where it can."""
        for part in self.needs:
            if part == "rows":  # a subject without rows has no findings, and other rules know other parts of it
                continue
            value = getattr(run_facts, part)
            if value is None or (not isinstance(value, (int, float)) and hasattr(value, "__len__") and not len(value)):
                return run_facts.missing.get(part, _ABSENT.get(part, f"no {part}"))
        return None

    def signals(self, run_facts: RunFacts) -> list[Signal]:
        """What it says of a subject."""
        if self.unless is not None and self.unless(run_facts):
            return []
        if self.reads_rows:
            return signals_of_rows(run_facts, self.code)
        answer: Answer = self.ask(run_facts)
        return answer if isinstance(answer, list) else [] if answer is None else [answer]


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


def rule(
    code: str,
    needs: Iterable[str] = (),
    probes: Iterable[str] = (),
    *,
    otherwise: bool = False,
    unless: Callable[[RunFacts], bool] | None = None,
) -> Callable[[Function], Function]:
    """Registers a function as a rule on the fault `code`; see `Rule` for the arguments."""

    def registered(function: Function) -> Function:
        _RULES.append(Rule(code, function, tuple(needs), tuple(probes), otherwise, unless))
        return function

    return registered


@cache
def rules() -> dict[str, tuple[Rule, ...]]:
    """All rules by the code of their fault, in the catalogue's order."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    codes = sorted({known.code for known in _RULES})
    return {code: tuple(known for known in _RULES if known.code == code) for code in codes}


def ask_all(run_facts: RunFacts, loads: bool = False) -> tuple[list[Signal], dict[str, str]]:
    """What all rules say, and (code -> why) those that could not be asked, which the diagnosis leaves open.

    Args:
        loads: also ask the rules that need `live`, which loads the model; `run_facts.live` should keep what it loaded.
    """
    signals: list[Signal] = []
    unasked: dict[str, str] = {}
    for code, known in rules().items():
        lacking = {
            one: "the model was not loaded" if one.loads and not loads else one.lacks(run_facts) for one in known
        }
        if all(lacking.values()):
            unasked[code] = lacking[known[0]] or ""
        said: list[Signal] = []
        for one in known:
            if lacking[one] is not None or (one.otherwise and said):
                continue
            try:
                said += one.signals(run_facts)
            except Exception as error:  # over what a foreign file may hold; the other rules' answers stand
                unasked[code] = f"its rule failed: {type(error).__name__}: {error}"[:200]
        signals += said
    return signals, unasked


# --- the rules on rows


def judge(facts: RowFacts) -> list[Finding]:
    """What the rules on rows say; worst first, empty where nothing is wrong."""
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


_last: list[tuple[RunFacts, Sequence[Finding]]] = []  # of the subject that was asked about last


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
