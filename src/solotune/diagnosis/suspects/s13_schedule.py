"""S13, the optimiser and the learning-rate schedule: F64 to F70."""

from __future__ import annotations

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.subject import Subject
from solotune.diagnosis.suspects import rule


@rule("F65", needs=("settings",))
def warmup_past_the_end(subject: Subject) -> Signal | None:
    """F65: the warm-up is longer than the run.

    Sees: more steps of warm-up than half of the planned steps.
    Why: the rate never reaches what was asked, so the loss flattens early.
    Not: F64 reaches its peak, and the peak is too low.
    Fix: `warmup_ratio: 0.03`.
    Wrong when: a long warm-up is meant.
    Source: transformers#671; transformers 5 reads `warmup_steps` below 1 as a ratio.
    """
    warmup, total = subject.settings.get("warmup_steps"), subject.trace and subject.trace.total_steps
    if not warmup or not total or warmup <= total / 2:
        return None
    says = f"the rate rises for {warmup:,} steps of a run of {total:,}"
    return Signal("F65", "invariant", says, 0.95, {"warmup_steps": warmup, "steps": total}, fix="warmup_ratio: 0.03")
