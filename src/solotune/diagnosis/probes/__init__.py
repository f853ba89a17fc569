"""Experiments on a model that can be run: each a function from (live, subject, seconds) to signals and measurements.

    found = run_all(live, subject, 60.0)
    found.signals, found.measurements, found.cost, found.skipped

P1  first loss        beside other renderings and labels    P8  evaluations    two, equal?
P2  padded            against alone                         P9  accumulation   against the whole batch
P3  packed            against alone                         P10 prompts        own against others'
P4  adapter           on against off                        P11 memory         the longest batch first
P5  gradients         of every adapter, second step         P12 reload         what was saved, and merged
P6  steps             how much of one arrives               P13 answers        deployed against training rendering
P7  rates             one batch by heart at three rates

A probe leaves the model as it was, bit for bit (`patient.restored`), draws its random numbers from a seed, keeps to its
seconds as well as it can, and raises `Skipped` with the reason where it cannot be run. It confirms by counterfactual:
the one fix is applied, and the signal is back to normal. The rules on labels are asked of the live batches first, since
they cost nothing.
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
from solotune.diagnosis.probes.longest_batch import longest_first
from solotune.diagnosis.probes.lr_range_test import range_test
from solotune.diagnosis.probes.prompt_use import own_prompt_against_others
from solotune.diagnosis.probes.saved_adapter import reloaded
from solotune.diagnosis.probes.skipped import Skipped
from solotune.diagnosis.rules import rules
from solotune.diagnosis.run_facts import LiveModel, RunFacts

__all__ = ["PROBES", "Probe", "Skipped", "run_all"]

Ask = Callable[[LiveModel, RunFacts, float], tuple[list[Signal], dict[str, Any]]]


@dataclass(frozen=True)
class Probe:
    """One experiment; `share` is what it may take of the budget that is left when its turn comes."""

    names: tuple[str, ...]  # P5 and P6 share their steps
    ask: Ask
    share: float
    is_deep: bool = False  # only if asked for, or if something points to it


PROBES = (
    Probe(("P4",), on_and_off, 0.1),
    Probe(("P5", "P6"), gradients_and_steps, 0.25),
    Probe(("P1",), first_loss, 0.2),
    Probe(("P2",), padded_against_alone, 0.15),
    Probe(("P3",), packed_against_alone, 0.15),
    Probe(("P12",), reloaded, 0.15),
    Probe(("P7",), range_test, 0.65),
    Probe(("P10",), own_prompt_against_others, 0.5),
    Probe(("P9",), accumulated_against_whole, 0.5),
    Probe(("P8",), evaluated_twice, 0.4, is_deep=True),
    Probe(("P13",), both_renderings, 0.6, is_deep=True),
    Probe(("P11",), longest_first, 0.5, is_deep=True),
)
"""In the order of what they tell for their cost."""


def run_all(live: LiveModel, run_facts: RunFacts, budget: float = 60.0, deep: bool = False) -> Probed:
    """The rules on the live batches, then as many probes as fit.

    Args:
        budget: seconds, loading not counted. A probe under way is not broken off, so the last may run over by a step.
        deep: all of them; else those that are costly only where a number points to them or the time is there anyway.
    """
    deadline = time.perf_counter() + budget
    found = Probed([])
    if not run_facts.batches:
        run_facts = replace(run_facts, batches=live.batches)
        found.signals.extend(_rules_that_need(run_facts, "batches"))
    found.signals.extend(_rules_that_need(replace(run_facts, live=lambda: live), "live"))
    begun = time.perf_counter()
    facts = LabelFacts.of(run_facts)
    found.measurements["labels"] = facts.measurements()
    found.cost["labels"] = time.perf_counter() - begun
    for probe in PROBES:
        left = deadline - time.perf_counter()
        name = "+".join(probe.names)
        if left <= 0:
            found.skipped.update(dict.fromkeys(probe.names, f"the budget of {budget:.0f} s is spent"))
            continue
        begun = time.perf_counter()
        try:
            signals, measured = probe.ask(live, run_facts, left if deep else probe.share * left)
        except Skipped as skipped:
            found.skipped.update(dict.fromkeys(probe.names, str(skipped)))
        except torch.OutOfMemoryError:
            found.skipped.update(dict.fromkeys(probe.names, "the GPU has no memory for it"))
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:  # the patient's own code, mostly
            found.skipped.update(dict.fromkeys(probe.names, f"it failed: {type(error).__name__}: {error}"[:200]))
        else:
            found.signals.extend(signals)
            found.measurements[name] = measured
        finally:
            found.cost[name] = time.perf_counter() - begun
    found.signals.extend(plateau(run_facts, found))
    return found


def _rules_that_need(run_facts: RunFacts, part: str) -> list[Signal]:
    """Of the rules, those that ask for batches or the model, which nobody had before."""
    asked = [known for group in rules().values() for known in group if part in known.needs]
    return [s for known in asked if known.lacks(run_facts) is None for s in known.signals(run_facts)]
