"""Looks at a subject with everything there is, in the order of what it costs, and gives the verdict.

    rules on settings, rows, trace and files     seconds, without a model
    probes on the live model                     as many as fit the budget, the cheapest first

The probes run even where the rules have named something: two faults are common, and a culprit is to be confirmed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from solotune.diagnosis import probes
from solotune.diagnosis.evidence import Diagnosis, Probed
from solotune.diagnosis.subject import Subject
from solotune.diagnosis.suspects import ask_all
from solotune.diagnosis.verdict import EXPERIMENTS, decide
from solotune.errors import SolotuneError

BUDGET_SECONDS = 60.0
"""For the default probes: what the demo model needs on two cores."""
DEEP_SECONDS = 600.0
"""With `deep`: more batches, longer range tests."""


def examine(
    subject: Subject, deep: bool = False, budget: float | None = None, phase: Callable[[str], None] = lambda name: None
) -> Diagnosis:
    """The diagnosis of a subject.

    Args:
        deep: probes run longer, on more batches.
        budget: seconds for the probes; 0 asks the rules alone.
        phase: told what begins.
    """
    started = time.perf_counter()
    phase("asking the rules")
    signals, unasked = ask_all(subject)
    cost = {"rules": time.perf_counter() - started}
    probed = _probe(subject, deep, (DEEP_SECONDS if deep else BUDGET_SECONDS) if budget is None else budget, phase)
    return decide(
        subject.name,
        [*signals, *probed.signals],
        unasked=unasked,
        skipped=probed.skipped,
        cost={**cost, **probed.cost},
        measurements=probed.measurements,
        unseen=_unseen(subject, probed),
    )


def _probe(subject: Subject, deep: bool, budget: float, phase: Callable[[str], None]) -> Probed:
    if subject.live is None:
        return Probed([], skipped=dict.fromkeys(EXPERIMENTS, subject.missing.get("live", "the model is not here")))
    if budget <= 0:
        return Probed([], skipped=dict.fromkeys(EXPERIMENTS, "no time was given for probes"))
    phase("loading the model for probes")
    started = time.perf_counter()
    try:
        live = subject.live()
    except SolotuneError as error:  # a base that is not here, or too large: the rules' answer stands
        return Probed([], skipped=dict.fromkeys(EXPERIMENTS, str(error.problem)))
    loading = time.perf_counter() - started
    phase("probing")
    found = probes.run_all(live, subject, budget, deep)
    return Probed(found.signals, found.measurements, {"loading": loading, **found.cost}, found.skipped)


def _unseen(subject: Subject, probed: Probed) -> list[str]:
    """What has to be looked at before a run may be called healthy: what is learned, and how it learns."""
    unseen = []
    is_probed = bool(probed.cost)
    if not subject.train and not is_probed:
        unseen.append("give the data that it was trained on (--dataset), so that its labels can be looked at")
    has_trace = subject.trace is not None and len(subject.trace.step_S) > 0
    if not has_trace and not is_probed:
        why = next(iter(probed.skipped.values()), "")
        unseen.append(f"probe the model where it can be loaded{f' ({why})' if why else ''}, or train some steps")
    return unseen
