"""From signals to one answer: a fault, healthy, or undecided with the experiment that would decide.

    signals --> weighed by fault --> causes before what follows from them --> named, doubted or cleared

Five rules decide, in this order:

1. An equation that is violated outranks every statistic, whatever their weights.
2. A curve alone names nothing: it leaves a doubt, and with it the probe to run next.
3. A fault that follows from another that is there as surely is told as its consequence, not as a culprit: without the
   end-of-turn token among the ids it cannot be among the labels either.
4. Faults that the same evidence cannot tell apart are named together.
5. Healthy is an answer, but only where both was seen: what is learned, and how it learns.

The numbers behind it are in `thresholds`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from solotune.diagnosis import catalogue
from solotune.diagnosis.evidence import EXPERIMENTS, Culprit, Diagnosis, Signal
from solotune.diagnosis.rules import rules
from solotune.diagnosis.thresholds import ACCUSED, CURVE_ALONE, DOUBTED, RANK, SPEAKS_AGAINST

NUM_EVIDENCE = 3  # lines of evidence a culprit is shown with
NUM_CULPRITS = 5

_SCALE_OR_RATE = "train 50 steps with lora_alpha equal to lora_r and the rate as it is: if it helps, the scale was "
_APART: dict[frozenset[str], str] = {
    frozenset({"F61", "F64"}): _SCALE_OR_RATE + "too small, else the rate",
    frozenset({"F61", "F67"}): _SCALE_OR_RATE + "too large, else the rate",
    frozenset({"F10", "F24"}): "render the rows with a max_length beyond the longest: if answers end, they were cut",
    frozenset({"F18", "F21"}): "render one row by the template alone: if its mask is empty, markers are missing",
    frozenset({"F57", "F58"}): "count the adapter's parameters with requires_grad: if there are none, it is frozen",
}
"""What tells equivalent faults apart."""


@dataclass(frozen=True)
class Weighed:
    """All that is said of one fault."""

    code: str
    speaking: tuple[Signal, ...]  # for it, the strongest first
    against: tuple[Signal, ...]
    confidence: float

    @property
    def rank(self) -> int:
        return max((RANK[signal.kind] for signal in self.speaking), default=0)

    @property
    def is_accused(self) -> bool:
        return self.rank > 0 and self.confidence >= ACCUSED

    @property
    def order(self) -> tuple[float, float, str]:
        return (-self.rank, -self.confidence, self.code)


def weigh(signals: Iterable[Signal]) -> dict[str, Weighed]:
    """Code -> what speaks for and against it, joined as `thresholds` says."""
    by_code: dict[str, list[Signal]] = {}
    for signal in signals:
        by_code.setdefault(signal.code, []).append(signal)
    return {code: _weigh(code, found) for code, found in by_code.items()}


def accused(signals: Iterable[Signal]) -> list[Weighed]:
    """The faults that are named on these signals, best first, without what follows from another of them."""
    named = sorted((w for w in weigh(signals).values() if w.is_accused), key=lambda w: w.order)
    follows = _consequences(named)
    return [w for w in named if w.code not in follows]


def _weigh(code: str, signals: Sequence[Signal]) -> Weighed:
    speaking = sorted((s for s in signals if not s.against), key=lambda s: (-RANK[s.kind], -s.weight))
    against = sorted((s for s in signals if s.against), key=lambda s: -s.weight)
    by_kind: dict[str, float] = {}
    for signal in speaking:
        by_kind[signal.kind] = max(by_kind.get(signal.kind, 0.0), signal.weight)
    unlikely = 1.0
    for weight in by_kind.values():
        unlikely *= 1 - weight
    confidence = 1 - unlikely
    if set(by_kind) <= {"curve"}:
        confidence = min(confidence, CURVE_ALONE)
    for signal in against:
        confidence *= 1 - signal.weight
    return Weighed(code, tuple(speaking), tuple(against), confidence)


def decide(
    run_facts: str,
    signals: Sequence[Signal],
    unasked: Mapping[str, str] | None = None,
    skipped: Mapping[str, str] | None = None,
    cost: Mapping[str, float] | None = None,
    measurements: Mapping[str, Any] | None = None,
    unseen: Sequence[str] = (),
) -> Diagnosis:
    """The answer.

    Args:
        subject: its name.
        unasked: code -> why no rule could be asked about it.
        skipped: probe (P1 ... P13) -> why it was not run.
        unseen: of what a healthy training is known by, what was not looked at, each as what to do about it; where there
            is any, the answer is never healthy.
    """
    unasked, skipped = dict(unasked or {}), dict(skipped or {})
    weighed = weigh(signals)
    named = sorted((w for w in weighed.values() if w.is_accused), key=lambda w: w.order)
    follows = _consequences(named)
    culprits = [_culprit(w, weighed) for w in named if w.code not in follows]
    doubted = sorted(
        (w for w in weighed.values() if not w.is_accused and w.confidence >= DOUBTED), key=lambda w: w.order
    )
    ruled_out = [_ruled_out(code, f"follows from {cause}") for code, cause in follows.items()]
    ruled_out += [
        _ruled_out(w.code, w.against[0].says)
        for w in weighed.values()
        if not w.is_accused and w.against and w.against[0].weight >= SPEAKS_AGAINST and w.confidence < DOUBTED
    ]
    if culprits:
        verdict, experiment = "fault", _apart(culprits[0])
    elif doubted:
        verdict, experiment = "undecided", _experiment(doubted, skipped)
        culprits = [_culprit(w, weighed) for w in doubted]
    elif unseen:
        verdict, experiment = "undecided", unseen[0]
    else:
        verdict, experiment = "healthy", None
    return Diagnosis(
        run_facts=run_facts,
        verdict=verdict,
        culprits=culprits[:NUM_CULPRITS],
        ruled_out=sorted(ruled_out, key=lambda r: r["fault"]),
        next_experiment=experiment,
        unasked=unasked,
        skipped=skipped,
        cost=dict(cost or {}),
        measurements=dict(measurements or {}),
    )


def _consequences(named: Sequence[Weighed]) -> dict[str, str]:
    """Code -> the accused fault that it follows from, where that is there at least as surely."""
    follows: dict[str, str] = {}
    for cause in named:
        for effect in named:
            if effect.code in catalogue.EXPLAINS.get(cause.code, ()) and cause.rank >= effect.rank:
                follows.setdefault(effect.code, cause.code)
    return follows


def _culprit(weighed: Weighed, all_weighed: Mapping[str, Weighed]) -> Culprit:
    fault = catalogue.FAULTS[weighed.code]
    confirmed = next((s.says for s in weighed.speaking if s.kind == "counterfactual"), None)
    evidence = [s.says for s in weighed.speaking if s.kind != "counterfactual"]
    return Culprit(
        suspect=fault.suspect,
        fault=fault.code,
        slug=fault.slug,
        confidence=round(weighed.confidence, 3),
        evidence=evidence[:NUM_EVIDENCE],
        confirmed_by=confirmed,
        fix=next((s.fix for s in weighed.speaking if s.fix), fault.fix),
        expect=next((s.expect for s in weighed.speaking if s.expect), fault.expect),
        same_evidence=tuple(sorted(_inseparable(weighed, all_weighed))),
    )


def _inseparable(weighed: Weighed, all_weighed: Mapping[str, Weighed]) -> set[str]:
    """Equivalent faults that nothing speaks against, unless an equation names this one alone."""
    found = set()
    for code in catalogue.equivalents(weighed.code):
        other = all_weighed.get(code)
        if other is not None and (other.against or other.rank < weighed.rank):
            continue
        if other is None and weighed.rank == RANK["invariant"]:
            continue
        found.add(code)
    return found


def _ruled_out(code: str, because: str) -> dict[str, str]:
    return {"fault": code, "slug": catalogue.FAULTS[code].slug, "because": because}


def _apart(first: Culprit) -> str | None:
    """What separates the first culprit from its equivalent."""
    return next((_APART[frozenset({first.fault, code})] for code in first.same_evidence), None)


def _experiment(doubted: Sequence[Weighed], skipped: Mapping[str, str]) -> str:
    """The one that settles most of the doubt: of the probes that were not run, the one that the rules of most of these
    faults, by confidence, wait for; else what separates the first from its equivalent, else the first one's fix."""
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
    fix = next((s.fix for s in doubted[0].speaking if s.fix), catalogue.FAULTS[first].fix)
    return f"change this one thing, and compare the first 50 steps: {fix}"
