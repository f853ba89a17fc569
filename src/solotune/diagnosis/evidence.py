"""Signals of rules and probes, and the parts of a diagnosis.

A rule returns a `Signal` when it sees its fault. There are five kinds of signals:

- `invariant`: an equation that holds in every healthy training is violated (a label is not its token, no adapter has a
  gradient at step 1, the learning rate ended before the run). It names its fault.
- `counterfactual`: a probe applied one fix, and the signal went back to normal. It confirms a fault.
- `measured`: a number is outside the range of clean runs, and beyond its control: what healthy runs of the same kind
  show too. It names its fault.
- `curve`: the shape of a curve, a symptom. It chooses probes and never names a culprit alone.
- `remark`: true of the run, but no harm was measured. It never names a culprit and never prevents "healthy".
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from solotune.errors import SolotuneError
from solotune.result_repr import ResultRepr, Table

Kind = Literal["invariant", "counterfactual", "measured", "curve", "remark"]


EXPERIMENTS: dict[str, str] = {
    "P1": "compare the first loss with the loss of the same rows in the model's own format and as plain text",
    "P2": "compare a row's logits alone and in a padded batch",
    "P3": "compare a row's logits alone and in a packed sequence",
    "P4": "compare the model with its adapter on and off",
    "P5": "check the gradient of every adapter in the second step",
    "P6": "count the elements that one optimizer step changes",
    "P7": "overfit one batch at 0.1, 1 and 10 times the learning rate",
    "P8": "evaluate twice and compare",
    "P9": "compare the accumulated gradient of several micro-batches with the gradient of all their tokens",
    "P10": "compare the loss of answers after their own prompt and after the prompts of other rows",
    "P11": "run forward, backward and step on the longest batch",
    "P12": "load the saved adapter again and compare its logits",
    "P13": "generate answers with the prompt format of the training and with that of the deployment",
    "P14": "compare the logged losses with those of the rows under other labels",
    "P15": "compare the gradient that ranks exchange with the gradient of all their tokens",
}
"""What each probe does."""


@dataclass(frozen=True)
class Signal:
    """Evidence of one rule or probe for one fault (with `against`: against it)."""

    code: str  # F17
    kind: Kind
    says: str  # one line with the number in it
    weight: float  # 0 to 1: probability of the fault given only this signal
    numbers: dict[str, Any] = field(default_factory=dict)
    against: bool = False
    fix: str = ""  # the exact line of the config to change
    expect: str = ""  # after the fix; only if more precise than the catalogue (the range test's gain)
    affected: float | None = None  # 0 to 1: share of the rows, answers or steps that it concerns, if counted


def of_refusal(error: SolotuneError) -> list[Signal]:
    """The signal of an error that solotune raised, if it names a fault of the catalogue."""
    if error.fault is None:
        return []
    says = error.problem + (f" ({error.seen})" if error.seen is not None else "")
    return [Signal(error.fault, "invariant", says, 0.95, fix=error.change or "")]


@dataclass(frozen=True)
class Probed:
    """Results of the probes that fitted into the budget; keys are probe names, P1 ... P15."""

    signals: list[Signal]
    measurements: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)  # seconds
    skipped: dict[str, str] = field(default_factory=dict)  # why it did not run


@dataclass(frozen=True)
class Culprit:
    """A fault that is named (or possible); `same_evidence`: codes that this evidence cannot tell from it."""

    suspect: str
    fault: str
    slug: str
    confidence: float
    evidence: list[str]
    confirmed_by: str | None
    fix: str
    expect: str = ""  # after the change
    same_evidence: tuple[str, ...] = ()


@dataclass(frozen=True)
class Remark:
    """True of the run without measured harm: how much is affected, and what to change if it is not meant."""

    suspect: str
    fault: str
    slug: str
    says: str
    fix: str
    affected: float | None = None


@dataclass(frozen=True, repr=False)
class Diagnosis(ResultRepr):
    """The result, in the shape of `diagnosis.json`."""

    run_facts: str
    verdict: Literal["fault", "healthy", "undecided"]
    culprits: list[Culprit]
    ruled_out: list[dict[str, str]]  # fault, slug, and the number against it (because)
    next_experiment: str | None
    remarks: list[Remark] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)  # what no check could judge, each with what to do about it
    skipped: dict[str, str] = field(default_factory=dict)  # probe -> why it did not run
    unasked: dict[str, str] = field(default_factory=dict)  # fault -> why none of its rules could run
    cost: dict[str, float] = field(default_factory=dict)  # probe -> seconds
    measurements: dict[str, Any] = field(default_factory=dict)  # numbers for the HTML page
    found: dict[str, str] = field(default_factory=dict)  # of another trainer's folder: part -> where it was found

    @property
    def is_fault(self) -> bool:
        return self.verdict == "fault"

    def figures(self) -> dict[str, object]:
        return {
            "run": self.run_facts,
            "verdict": self.verdict,
            "culprits": ", ".join(f"{one.fault} {one.slug}" for one in self.culprits) or None,
            "remarks": ", ".join(f"{one.fault} {one.slug}" for one in self.remarks) or None,
            "next_experiment": self.next_experiment,
        }

    def tables(self) -> list[Table]:
        culprits = [
            (f"{one.fault} {one.slug}", f"{one.confidence:.0%}", "\n".join(one.evidence), one.fix)
            for one in self.culprits
        ]
        remarks = [(f"{one.fault} {one.slug}", one.says, one.fix) for one in self.remarks]
        return [
            Table("Faults", ("", "sure", "evidence", "change"), culprits),
            Table("Remarks", ("", "what", "change if not meant"), remarks),
            Table("Not checked", (), [(line,) for line in self.not_checked]),
        ]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
