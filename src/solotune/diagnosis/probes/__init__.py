"""Experiments on a loaded model: functions from (live, run_facts, seconds) to signals and measurements.

    found = run_all(live, run_facts, 60.0)
    found.signals, found.measurements, found.cost, found.skipped

P1  first loss        with other formats and labels         P8  evaluations    two runs, equal?
P2  padded            against alone                         P9  accumulation   against the whole batch
P3  packed            against alone                         P10 prompts        own against others'
P4  adapter           on against off                        P11 memory         the longest batch
P5  gradients         of every adapter, second step         P12 reload         saved and merged adapter
P6  steps             share of elements that change         P13 answers        deployed against training format
P7  learning rates    overfit one batch at three rates  P14 logged loss    of which labels?
P15 ranks             exchanged against all tokens

A probe restores the model bit for bit (`probed_model.restore_model_state`), seeds its random numbers, does what fits
into its seconds, and raises `Skipped` with the reason if it cannot run. `time_limit` stops all of them at the budget.
It confirms a fault by counterfactual: it applies one fix, and the signal is back to normal. The rules on labels run
first on the live batches, since they cost nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from solotune.diagnosis.evidence import Probed, Signal
from solotune.diagnosis.facts.labels import LabelFacts
from solotune.diagnosis.plateau import plateau
from solotune.diagnosis.probes.adapter_gradients import gradients_and_steps, on_and_off
from solotune.diagnosis.probes.batch_isolation import packed_against_alone, padded_against_alone
from solotune.diagnosis.probes.eval_determinism import evaluated_twice
from solotune.diagnosis.probes.generation import both_renderings
from solotune.diagnosis.probes.grad_accumulation import accumulated_against_whole
from solotune.diagnosis.probes.initial_loss import first_loss
from solotune.diagnosis.probes.logged_loss import labels_by_the_log
from solotune.diagnosis.probes.longest_batch import longest_first
from solotune.diagnosis.probes.lr_range_test import range_test
from solotune.diagnosis.probes.probed_model import on_device, restore_model_state
from solotune.diagnosis.probes.prompt_use import own_prompt_against_others
from solotune.diagnosis.probes.rank_gradients import exchanged_against_whole
from solotune.diagnosis.probes.saved_adapter import reloaded
from solotune.diagnosis.probes.skipped import Skipped
from solotune.diagnosis.probes.time_limit import TimeLimit
from solotune.diagnosis.rules import rules
from solotune.diagnosis.run_facts import LiveModel, RunFacts

__all__ = ["PROBES", "Probe", "Skipped", "run_all"]

ENOUGH = 1.75
"""A probe gets at least this times the time of its fewest passes, also if that is more than its share."""
PATIENCE = 2.5
"""A probe that takes longer than this times its seconds is stopped, so that others can run."""

Ask = Callable[[LiveModel, RunFacts, float], tuple[list[Signal], dict[str, Any]]]


@dataclass(frozen=True)
class Probe:
    """One experiment; `share` is its part of the budget that is left when it starts.

    `forwards` and `steps` (with backward) are the fewest passes over two rows that it needs.
    """

    names: tuple[str, ...]  # P5 and P6 share their steps
    ask: Ask
    share: float
    forwards: float
    steps: float
    of_ranks: bool = False  # only for a run on several GPUs; others do not list it as skipped


PROBES = (
    Probe(("P4",), on_and_off, 0.1, 2, 0),
    Probe(("P5", "P6"), gradients_and_steps, 0.25, 0, 2),
    Probe(("P1",), first_loss, 0.2, 4, 0),
    Probe(("P14",), labels_by_the_log, 0.3, 8, 0),
    Probe(("P2",), padded_against_alone, 0.15, 3, 0),
    Probe(("P3",), packed_against_alone, 0.15, 3, 0),
    Probe(("P12",), reloaded, 0.15, 2, 0),
    Probe(("P7",), range_test, 0.65, 0, 15),
    Probe(("P10",), own_prompt_against_others, 0.5, 8, 0),
    Probe(("P9",), accumulated_against_whole, 0.5, 0, 3),
    Probe(("P15",), exchanged_against_whole, 0.5, 0, 4, of_ranks=True),
    Probe(("P8",), evaluated_twice, 0.4, 4, 0),
    Probe(("P13",), both_renderings, 0.6, 8, 0),
    Probe(("P11",), longest_first, 0.5, 0, 2),
)
"""Ordered by information for their cost."""


def run_all(
    live: LiveModel,
    run_facts: RunFacts,
    budget: float = 60.0,
    deep: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Probed:
    """Run the rules on the live batches, then as many probes as fit into the budget.

    Args:
        budget: seconds, without loading. No pass starts that would end later; a probe that needs more is skipped.
        deep: each probe may use all of the time that is left, not only its share.
        progress: called with the number of probes that are done, and of all.
    """
    found = Probed([])
    with TimeLimit.on(live.model, budget) as limit:
        if not run_facts.batches:
            run_facts = replace(run_facts, batches=live.batches)
            found.signals.extend(_rules_that_need(run_facts, "batches"))
        found.signals.extend(_rules_that_need(replace(run_facts, live=lambda: live), "live"))
        started = time.perf_counter()
        facts = LabelFacts.of(run_facts)
        found.measurements["labels"] = facts.measurements()
        found.cost["labels"] = time.perf_counter() - started
        _try_out(live, limit)
        chosen = [probe for probe in PROBES if live.backward_of_ranks is not None or not probe.of_ranks]
        for number, probe in enumerate(chosen):
            progress(number, len(chosen), "probes")
            _run(probe, live, run_facts, limit, deep, found)
    found.signals.extend(plateau(run_facts, found))
    return found


def _try_out(live: LiveModel, limit: TimeLimit) -> None:
    """Time small passes, for an estimate of the first probe's."""
    if live.batches:
        with restore_model_state(live):
            live.model.eval()
            limit.try_out(on_device(live, live.batches[0])["input_ids"][0])


def _run(probe: Probe, live: LiveModel, run_facts: RunFacts, limit: TimeLimit, deep: bool, found: Probed) -> None:
    """Run one probe if its fewest passes fit into the time that is left."""
    left, name = limit.left, "+".join(probe.names)
    if (why := _no_time(probe, limit)) is not None:
        found.skipped.update(dict.fromkeys(probe.names, why))
        return
    fewest = limit.seconds_of(probe.forwards, probe.steps)
    share = left if deep else min(left, max(probe.share * left, ENOUGH * (fewest or 0.0)))
    limit.begin(left if fewest is None else PATIENCE * share)
    started = time.perf_counter()
    try:
        signals, measured = probe.ask(live, run_facts, share)
    except Skipped as skipped:
        found.skipped.update(dict.fromkeys(probe.names, str(skipped)))
    except torch.OutOfMemoryError:
        found.skipped.update(dict.fromkeys(probe.names, "the GPU has not enough memory for it"))
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:  # mostly from the model's own code
        found.skipped.update(dict.fromkeys(probe.names, f"it failed: {type(error).__name__}: {error}"[:200]))
    else:
        found.signals.extend(signals)
        found.measurements[name] = measured
    finally:
        limit.close()
        found.cost[name] = time.perf_counter() - started


def _no_time(probe: Probe, limit: TimeLimit) -> str | None:
    """Why a probe cannot run in the time that is left; None if it can."""
    if limit.left <= 0:
        return f"the budget of {limit.budget:.0f} s is used up"
    needs = limit.seconds_of(probe.forwards, probe.steps)
    if needs is None or needs <= limit.left:
        return None
    return f"it needs about {needs:.0f} s on this machine, and {limit.left:.0f} s of {limit.budget:.0f} s are left"


def _rules_that_need(run_facts: RunFacts, part: str) -> list[Signal]:
    """Signals of the rules that need this part (batches or the model), which was missing before."""
    needing = [known for group in rules().values() for known in group if part in known.needs]
    return [s for known in needing if known.lacks(run_facts) is None for s in known.signals(run_facts)]
