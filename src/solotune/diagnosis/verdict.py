"""Combine signals into one verdict: a fault, healthy, or undecided with the experiment that would decide.

    signals --> weighed by fault --> consequences removed --> named, doubted, remarked or ruled out

Six rules decide, in this order:

1. A violated equation ranks before every statistic, whatever their weights.
2. A curve alone names no fault: it leaves a doubt, and with it the probe to run next.
3. A fault that follows from another, at least as certain fault is listed as its consequence, not as a culprit: an
   end-of-turn token that is not among the ids cannot be among the labels either. A fault of few rows does not explain
   one of many.
4. Faults that the same evidence cannot tell apart are named together.
5. A remark neither names a fault nor prevents "healthy". If other evidence names its fault, it is evidence too.
6. Without a symptom the verdict is healthy, and the diagnosis lists what no check could judge. It is undecided if there
   is a symptom that nothing explains, if something that should be readable is damaged, or if nothing could be checked.

The numbers are in `thresholds`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from solotune.diagnosis import catalogue
from solotune.diagnosis.evidence import EXPERIMENTS, Culprit, Diagnosis, Remark, Signal
from solotune.diagnosis.rules import rules
from solotune.diagnosis.thresholds import ACCUSED, AS_MANY, CURVE_ALONE, DOUBTED, RANK, SPEAKS_AGAINST

NUM_EVIDENCE = 3  # lines of evidence shown for each culprit
NUM_CULPRITS = 5

_SCALE_OR_RATE = (
    "train 50 steps with lora_alpha equal to lora_r and the same learning rate: if it helps, the scale was "
)
_APART: dict[frozenset[str], str] = {
    frozenset({"F61", "F64"}): _SCALE_OR_RATE + "too small, otherwise the learning rate",
    frozenset({"F61", "F67"}): _SCALE_OR_RATE + "too large, otherwise the learning rate",
    frozenset(
        {"F10", "F24"}
    ): "render the rows with a max_length above the longest row: if answers then end, they were truncated",
    frozenset(
        {"F18", "F21"}
    ): "render one row with the template alone: if its loss mask is empty, the generation markers are missing",
    frozenset(
        {"F57", "F58"}
    ): "count the adapter's parameters with requires_grad: if there are none, the adapter is frozen",
}
"""Experiments that tell equivalent faults apart."""


@dataclass(frozen=True)
class Weighed:
    """All signals on one fault."""

    code: str
    supporting: tuple[Signal, ...]  # for it, the strongest first
    against: tuple[Signal, ...]
    confidence: float

    @property
    def rank(self) -> int:
        return max((RANK[signal.kind] for signal in self.supporting), default=0)

    @property
    def is_accused(self) -> bool:
        return self.rank > 0 and self.confidence >= ACCUSED

    @property
    def is_doubted(self) -> bool:
        return not self.is_accused and self.confidence >= DOUBTED

    @property
    def order(self) -> tuple[float, float, float, str]:
        """The largest of equally certain faults is named first."""
        return (-self.rank, -self.confidence, -(self.affected or 0.0), self.code)

    @property
    def affected(self) -> float | None:
        """The largest share that a signal counted; None if none did."""
        return max((s.affected for s in self.supporting if s.affected is not None), default=None)


def weigh(signals: Iterable[Signal]) -> dict[str, Weighed]:
    """Code -> signals for and against it, combined as `thresholds` describes."""
    by_code: dict[str, list[Signal]] = {}
    for signal in signals:
        by_code.setdefault(signal.code, []).append(signal)
    return {code: _weigh(code, found) for code, found in by_code.items()}


def _weigh(code: str, signals: Sequence[Signal]) -> Weighed:
    supporting = sorted((s for s in signals if not s.against), key=lambda s: (-RANK[s.kind], -s.weight))
    against = sorted((s for s in signals if s.against), key=lambda s: -s.weight)
    by_kind: dict[str, float] = {}
    for signal in (s for s in supporting if s.kind != "remark"):
        by_kind[signal.kind] = max(by_kind.get(signal.kind, 0.0), signal.weight)
    unlikely = 1.0
    for weight in by_kind.values():
        unlikely *= 1 - weight
    confidence = 1 - unlikely
    if set(by_kind) <= {"curve"}:
        confidence = min(confidence, CURVE_ALONE)
    for signal in against:
        confidence *= 1 - signal.weight
    return Weighed(code, tuple(supporting), tuple(against), confidence)


def decide(
    run_facts: str,
    signals: Sequence[Signal],
    unasked: Mapping[str, str] | None = None,
    skipped: Mapping[str, str] | None = None,
    cost: Mapping[str, float] | None = None,
    measurements: Mapping[str, Any] | None = None,
    unreadable: Sequence[str] = (),
    not_checked: Sequence[str] = (),
) -> Diagnosis:
    """The verdict.

    Args:
        run_facts: name of the run.
        unasked: code -> why none of its rules could run.
        skipped: probe (P1 ... P15) -> why it did not run.
        unreadable: what should be there and could not be judged (damaged files, rows that cannot be read), each with
            what to do about it. If there is any, the verdict is never healthy.
        not_checked: what could not be checked because it was not given, each with what to do about it.
    """
    unasked, skipped = dict(unasked or {}), dict(skipped or {})
    weighed = weigh(signals)
    named = sorted((w for w in weighed.values() if w.is_accused), key=lambda w: w.order)
    follows = _consequences(named)
    culprits = [_culprit(w, weighed) for w in named if w.code not in follows]
    doubted = sorted((w for w in weighed.values() if w.is_doubted), key=lambda w: w.order)
    ruled_out = [_ruled_out(code, f"follows from {cause}") for code, cause in follows.items()]
    ruled_out += [
        _ruled_out(w.code, w.against[0].says)
        for w in weighed.values()
        if not w.is_accused and not w.is_doubted and w.against and w.against[0].weight >= SPEAKS_AGAINST
    ]
    if culprits:
        verdict, experiment = "fault", _apart(culprits[0])
    elif doubted:
        verdict, experiment = "undecided", _experiment(doubted, skipped)
        culprits = [_culprit(w, weighed) for w in doubted]
    elif unreadable:
        verdict, experiment = "undecided", unreadable[0]
    else:
        verdict, experiment = "healthy", None
    return Diagnosis(
        run_facts=run_facts,
        verdict=verdict,
        culprits=culprits[:NUM_CULPRITS],
        ruled_out=sorted(ruled_out, key=lambda r: r["fault"]),
        next_experiment=experiment,
        remarks=_remarks(weighed.values()),
        not_checked=[*unreadable, *not_checked],
        unasked=unasked,
        skipped=skipped,
        cost=dict(cost or {}),
        measurements=dict(measurements or {}),
    )


def _consequences(named: Sequence[Weighed]) -> dict[str, str]:
    """Code -> the named fault that it follows from: one of at least the same rank that concerns as much."""
    follows: dict[str, str] = {}
    for cause in named:
        for effect in named:
            shares = cause.affected, effect.affected
            is_smaller = None not in shares and (shares[0] or 0.0) < AS_MANY * (shares[1] or 0.0)
            if effect.code in catalogue.EXPLAINS.get(cause.code, ()) and cause.rank >= effect.rank and not is_smaller:
                follows.setdefault(effect.code, cause.code)
    return follows


def _culprit(weighed: Weighed, all_weighed: Mapping[str, Weighed]) -> Culprit:
    fault = catalogue.FAULTS[weighed.code]
    confirmed = next((s.says for s in weighed.supporting if s.kind == "counterfactual"), None)
    evidence = [s.says for s in weighed.supporting if s.kind != "counterfactual"]
    return Culprit(
        suspect=fault.suspect,
        fault=fault.code,
        slug=fault.slug,
        confidence=round(weighed.confidence, 3),
        evidence=evidence[:NUM_EVIDENCE],
        confirmed_by=confirmed,
        fix=next((s.fix for s in weighed.supporting if s.fix), fault.fix),
        expect=next((s.expect for s in weighed.supporting if s.expect), fault.expect),
        same_evidence=tuple(sorted(_inseparable(weighed, all_weighed))),
    )


def _inseparable(weighed: Weighed, all_weighed: Mapping[str, Weighed]) -> set[str]:
    """Equivalent faults without evidence against them, unless an equation names this one alone."""
    found = set()
    for code in catalogue.equivalents(weighed.code):
        other = all_weighed.get(code)
        if other is not None and (other.against or other.rank < weighed.rank):
            continue
        if other is None and weighed.rank == RANK["invariant"]:
            continue
        found.add(code)
    return found


def _remarks(weighed: Iterable[Weighed]) -> list[Remark]:
    """Remarks on faults that are neither named, doubted nor ruled out; those that concern most come first."""
    found = []
    for one in weighed:
        says = next((s for s in one.supporting if s.kind == "remark"), None)
        is_ruled_out = bool(one.against) and one.against[0].weight >= SPEAKS_AGAINST
        if says is None or one.is_accused or one.is_doubted or is_ruled_out:
            continue
        fault = catalogue.FAULTS[one.code]
        found.append(Remark(fault.suspect, fault.code, fault.slug, says.says, says.fix or fault.fix, says.affected))
    return sorted(found, key=lambda remark: (-(remark.affected or 0.0), remark.fault))


def _ruled_out(code: str, because: str) -> dict[str, str]:
    return {"fault": code, "slug": catalogue.FAULTS[code].slug, "because": because}


def _apart(first: Culprit) -> str | None:
    """The experiment that separates the first culprit from its equivalent."""
    return next((_APART[frozenset({first.fault, code})] for code in first.same_evidence), None)


def _experiment(doubted: Sequence[Weighed], skipped: Mapping[str, str]) -> str:
    """The experiment that settles most of the doubt.

    Of the probes that did not run, the one with the largest sum of confidences over the faults whose rules name it;
    else what separates the first fault from its equivalent; else the fix of the first fault.
    """
    mass: dict[str, float] = {}
    for one in doubted:
        for probe in {probe for rule in rules().get(one.code, ()) for probe in rule.probes} & set(skipped):
            mass[probe] = mass.get(probe, 0.0) + one.confidence
    if mass:
        best = min(mass, key=lambda probe: (-mass[probe], int(probe[1:])))
        return f"{EXPERIMENTS[best]} ({best} was not run: {skipped[best]})"
    codes: Collection[str] = {one.code for one in doubted}
    first = doubted[0].code
    for pair, text in _APART.items():
        if first in pair and (len(doubted) == 1 or pair <= set(codes)):
            return text
    fix = next((s.fix for s in doubted[0].supporting if s.fix), catalogue.FAULTS[first].fix)
    return f"change only this, and compare the first 50 steps: {fix}"
