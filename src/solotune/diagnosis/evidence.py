"""What rules and probes say, and what a diagnosis is made of.

A rule returns a `Signal` when it sees its fault. Signals differ in what they are worth, and that order decides:

- `invariant`: an equation that holds in every healthy training is violated (a label is not its token, no adapter has a
  gradient at step 1, the learning rate ended before the run). It names its fault.
- `counterfactual`: the one fix was applied to a probe, and the signal went back to normal. It confirms a fault.
- `measured`: a number lies outside of what clean runs show.
- `curve`: the shape of a curve. It chooses probes, and never names a culprit alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from solotune.errors import SolotuneError

Kind = Literal["invariant", "counterfactual", "measured", "curve"]


EXPERIMENTS: dict[str, str] = {
    "P1": "compare the first loss with that of the same rows in the model's own format, and with plain text",
    "P2": "compare a row's logits alone and padded",
    "P3": "compare a row's logits alone and packed",
    "P4": "compare the model with its adapter on and off",
    "P5": "look at every adapter's gradient in the second step",
    "P6": "count the elements that one optimizer step changes",
    "P7": "learn one batch by heart at a tenth, once and ten times the learning rate",
    "P8": "evaluate twice and compare",
    "P9": "compare the gradient of one batch with that of its rows one by one",
    "P10": "compare an answer's loss after its own prompt and after another row's",
    "P11": "try the longest batch first, forward, backward and step",
    "P12": "load what was saved again and compare its logits",
    "P13": "let it answer after the training's rendering of a prompt and after the deployment's",
}
"""What each probe does, as an instruction."""


@dataclass(frozen=True)
class Signal:
    """One rule or probe speaking for (or, with `against`, against) one fault."""

    code: str  # F17
    kind: Kind
    says: str  # one line with the number in it
    weight: float  # 0 to 1: how surely, given only this
    numbers: dict[str, Any] = field(default_factory=dict)
    against: bool = False
    fix: str = ""  # the exact line of the config to change
    expect: str = ""  # after it, where this evidence says more than the catalogue does (the range test's gain)


def of_refusal(error: SolotuneError) -> list[Signal]:
    """What a door of ours says by refusing, where that is a fault of the catalogue."""
    if error.fault is None:
        return []
    says = error.problem + (f" ({error.seen})" if error.seen is not None else "")
    return [Signal(error.fault, "invariant", says, 0.95, fix=error.change or "")]


@dataclass(frozen=True)
class Probed:
    """What the probes that fitted into a budget say; keys are their names, P1 ... P13."""

    signals: list[Signal]
    measurements: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)  # seconds
    skipped: dict[str, str] = field(default_factory=dict)  # why it was not run


@dataclass(frozen=True)
class Culprit:
    """A fault as the cause, best first; `same_evidence`: codes that this evidence cannot tell from it."""

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
class Diagnosis:
    """The answer, in the shape of `diagnosis.json`."""

    run_facts: str
    verdict: Literal["fault", "healthy", "undecided"]
    culprits: list[Culprit]
    ruled_out: list[dict[str, str]]  # fault, and the number that speaks against it
    next_experiment: str | None
    skipped: dict[str, str] = field(default_factory=dict)  # probe -> why it was not run
    unasked: dict[str, str] = field(default_factory=dict)  # fault -> why none of its rules could be asked
    cost: dict[str, float] = field(default_factory=dict)  # probe -> seconds
    measurements: dict[str, Any] = field(default_factory=dict)  # what a page needs to draw

    @property
    def is_fault(self) -> bool:
        return self.verdict == "fault"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
