"""Looks at a subject with everything there is, in the order of what it costs, and gives the verdict.

    rules on settings, rows, trace and files, and on batches where the model is there     seconds
    probes on the live model, the most telling first, as many as fit the budget           a minute

A model that is not here, or too large, leaves the rules' answer, with what that leaves open. The probes run even where
the rules have named something: two faults are common, and a culprit is to be confirmed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from solotune.diagnosis import probes
from solotune.diagnosis.evidence import EXPERIMENTS, Diagnosis, Probed, Signal, of_refusal
from solotune.diagnosis.rules import ask_all
from solotune.diagnosis.run_facts import LiveModel, RunFacts
from solotune.diagnosis.verdict import decide
from solotune.errors import SolotuneError

BUDGET_SECONDS = 60.0
"""For the default probes: what the demo model needs on two cores."""
DEEP_SECONDS = 600.0
"""With `deep`: more batches, longer range tests."""


def examine(
    run_facts: RunFacts,
    deep: bool = False,
    budget: float | None = None,
    phase: Callable[[str], None] = lambda name: None,
    also: Sequence[Signal] = (),
) -> Diagnosis:
    """The diagnosis of a subject.

    Args:
        deep: probes run longer, on more batches.
        budget: seconds for the probes; 0 asks the rules alone, and loads nothing.
        phase: told what begins.
        also: what was seen elsewhere.
    """
    live, why, loading, refusals = _load(run_facts, budget, phase)
    if live is None:
        run_facts = replace(run_facts, live=None, missing={**run_facts.missing, "live": why})
    else:
        run_facts = replace(run_facts, live=lambda: live, batches=run_facts.batches or live.batches)
    phase("asking the rules")
    started = time.perf_counter()
    signals, unasked = ask_all(run_facts, loads=live is not None)
    cost = {"rules": time.perf_counter() - started}
    if live is None:
        probed = Probed([], skipped=dict.fromkeys(EXPERIMENTS, why))
    else:
        phase("probing")
        probed = probes.run_all(live, run_facts, _seconds(deep, budget), deep)
        cost |= {"loading": loading, **probed.cost}
    refusals = [*run_facts.refusals, *refusals]
    refused = {signal.code for signal in refusals}  # facts, which no number speaks against
    seen = [s for s in (*signals, *also, *probed.signals) if not (s.against and s.code in refused)]
    return decide(
        run_facts.name,
        [*refusals, *seen],
        unasked=unasked,
        skipped=probed.skipped,
        cost=cost,
        measurements=probed.measurements,
        unseen=_unseen(run_facts, probed),
    )


def _seconds(deep: bool, budget: float | None) -> float:
    return (DEEP_SECONDS if deep else BUDGET_SECONDS) if budget is None else budget


def _load(
    run_facts: RunFacts, budget: float | None, phase: Callable[[str], None]
) -> tuple[LiveModel | None, str, float, list[Signal]]:
    """The live model and the seconds it took; or None, why not, and the fault that this is: the answer of the rules
    stands then."""
    if run_facts.live is None:
        return None, run_facts.missing.get("live", "there is no model to run"), 0.0, []
    if budget == 0:
        return None, "no time was given for probes", 0.0, []
    phase("loading the model for probes")
    started = time.perf_counter()
    try:
        live = run_facts.live()
    except SolotuneError as error:
        return None, error.problem, 0.0, of_refusal(error)
    except (MemoryError, torch.OutOfMemoryError):
        return None, "the model is too large for this machine", 0.0, []
    return live, "", time.perf_counter() - started, []


def _unseen(run_facts: RunFacts, probed: Probed) -> list[str]:
    """What has to be looked at before a run may be called healthy: what is learned, and how it learns."""
    unseen = []
    if not len(run_facts.train) and not len(run_facts.batches):
        why = run_facts.missing.get("train")
        unseen.append(
            f"mend what keeps its rows from being looked at: {why}"
            if why
            else "give the data that it was trained on (--dataset), so that its labels can be looked at"
        )
    if run_facts.saved is None and (why := run_facts.missing.get("adapter")):
        unseen.append(f"bring back what is damaged ({why}); solotune verify names all of it")
    has_curve = run_facts.trace is not None and len(run_facts.trace.step_S) > 0
    if not has_curve and all(probe in probed.skipped for probe in ("P5", "P6", "P7")):
        why = probed.skipped["P5"]
        unseen.append(f"probe the model where it can be run ({why}), or train some steps and diagnose the run")
    return unseen
