"""Check a run with all rules and probes, the cheapest first, and decide the verdict.

    rules on settings, rows, trace and files, and on batches if the model is loaded       seconds
    probes on the live model, the most decisive first, as many as fit the budget          a minute

If the model is missing or too large, the rules decide alone, and the diagnosis lists what stays open. The probes run
even if the rules have named a fault: two faults at once are common, and a probe can confirm a culprit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from solotune.diagnosis import probes
from solotune.diagnosis.evidence import EXPERIMENTS, Diagnosis, Probed, Signal, of_refusal
from solotune.diagnosis.facts.base_tokenizer import with_base_tokenizer
from solotune.diagnosis.rules import ask_all
from solotune.diagnosis.run_facts import LiveModel, RunFacts
from solotune.diagnosis.verdict import decide
from solotune.errors import SolotuneError

BUDGET_SECONDS = 60.0
"""For the default probes: enough for the demo model on two cores."""
DEEP_SECONDS = 600.0
"""With `deep`: more batches, longer range tests."""
_NO_BUDGET = "--budget 0 turns model probes off"


def examine(
    run_facts: RunFacts,
    deep: bool = False,
    budget: float | None = None,
    phase: Callable[[str], None] = lambda name: None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    also: Sequence[Signal] = (),
) -> Diagnosis:
    """The diagnosis of a run.

    Args:
        deep: probes run longer, on more batches.
        budget: seconds for the probes; 0 runs only the rules and loads no model.
        phase: called with the name of each stage that begins.
        progress: called for each probe that starts.
        also: further signals, from the monitor of a run.
    """
    run_facts = with_base_tokenizer(run_facts)
    live, why, loading, refusals = _load(run_facts, budget, phase)
    if live is None:
        run_facts = replace(run_facts, live=None, missing={**run_facts.missing, "live": why})
    else:
        run_facts = replace(run_facts, live=lambda: live, batches=run_facts.batches or live.batches)
    phase("checking with rules")
    started = time.perf_counter()
    signals, unasked = ask_all(run_facts, loads=live is not None)
    cost = {"rules": time.perf_counter() - started}
    if live is None:
        skipped = [name for name in EXPERIMENTS if name != "P15" or run_facts.ranks is not None]
        probed = Probed([], skipped=dict.fromkeys(skipped, why))
    else:
        phase("running model probes")
        probed = probes.run_all(live, run_facts, _seconds(deep, budget), deep, progress)
        cost |= {"loading": loading, **probed.cost}
    refusals = [*run_facts.refusals, *refusals]
    refused = {signal.code for signal in refusals}  # these are certain: no number counts against them
    seen = [s for s in (*signals, *also, *probed.signals) if not (s.against and s.code in refused)]
    decided = decide(
        run_facts.name,
        [*refusals, *seen],
        unasked=unasked,
        skipped=probed.skipped,
        cost=cost,
        measurements=probed.measurements,
        unreadable=_unreadable(run_facts),
        not_checked=_not_checked(run_facts, probed),
    )
    return replace(decided, found=dict(run_facts.found))


def _seconds(deep: bool, budget: float | None) -> float:
    return (DEEP_SECONDS if deep else BUDGET_SECONDS) if budget is None else budget


def _load(
    run_facts: RunFacts, budget: float | None, phase: Callable[[str], None]
) -> tuple[LiveModel | None, str, float, list[Signal]]:
    """(live model, "", seconds, []); if it cannot be loaded (None, reason, 0, signals of the error)."""
    if run_facts.live is None:
        return None, run_facts.missing.get("live", "there is no model to run"), 0.0, []
    if budget == 0:
        return None, _NO_BUDGET, 0.0, []
    phase("loading the model for probes")
    started = time.perf_counter()
    try:
        live = run_facts.live()
    except SolotuneError as error:
        return None, error.problem, 0.0, of_refusal(error)
    except (MemoryError, torch.OutOfMemoryError):
        return None, "the model is too large for this machine", 0.0, []
    return live, "", time.perf_counter() - started, []


def _unreadable(run_facts: RunFacts) -> list[str]:
    """What should be there and could not be read, each with what to do about it; also if nothing could be checked."""
    found = []
    has_rows = bool(len(run_facts.train) or len(run_facts.batches))
    if not has_rows and "train" not in run_facts.not_given and (why := run_facts.missing.get("train")):
        found.append(f"fix what stops the rows from being read: {why}")
    if run_facts.saved is None and (why := run_facts.missing.get("adapter")):
        found.append(f"restore the damaged files ({why}); solotune verify lists them")
    if not (has_rows or _has_curve(run_facts) or run_facts.settings.values or run_facts.saved or run_facts.live):
        found.append("nothing could be checked: give a config, a run, or a folder with a log, settings or an adapter")
    return found


def _not_checked(run_facts: RunFacts, probed: Probed) -> list[str]:
    """What was not given, of the two that matter most: the labels, and how the run learns."""
    found = []
    has_rows = bool(len(run_facts.train) or len(run_facts.batches))
    if not has_rows and ("train" in run_facts.not_given or not run_facts.missing.get("train")):
        found.append(f"rows and labels: {run_facts.not_given.get('train', 'give the training data with --dataset')}")
    if not _has_curve(run_facts) and all(probe in probed.skipped for probe in ("P5", "P6", "P7")):
        why = probed.skipped["P5"]
        change = "run solotune diagnose without --budget 0" if why == _NO_BUDGET else f"the model probes need: {why}"
        found.append(f"how the run learns: {change}, or train a few steps and diagnose the run")
    return found


def _has_curve(run_facts: RunFacts) -> bool:
    return run_facts.trace is not None and len(run_facts.trace.step_S) > 0
