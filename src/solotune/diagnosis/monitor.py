"""Watches a run of ours while it trains: a line when something is wrong, at the first steps and at evaluations.

    monitor = Watch(model, subject, observer, RunRecord.read(run.path))
    training.train(..., observer=Observers(display, Resilient(monitor)))

It is an observer like others, so the loop knows nothing of diagnosis. It looks

- at the first loss: above log V the model guesses worse than blindly;
- in the first two steps whose rate is above 0 at a sample of every adapter's elements, before and after. In every
  healthy run `lora_B` moves in the first of them and `lora_A` from the second on (its first gradient is exactly zero,
  since B is). An adapter that does not move has no gradient (F57); where much of A stays, updates are rounded away
  (F54), which B, that starts at zero, does not show;
- before the run and at evaluations with the rules on settings, rows and curve, which `solotune diagnose` asks too.

Each fault is told once, nothing here stops a run, and all of it costs milliseconds: a few thousand elements are read.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from solotune.diagnosis.catalogue import FAULTS
from solotune.diagnosis.evidence import Diagnosis, Signal
from solotune.diagnosis.rules import ask_all
from solotune.diagnosis.run_diagnosis import examine
from solotune.diagnosis.run_facts import RunFacts, Trace
from solotune.diagnosis.sources import run_files
from solotune.diagnosis.verdict import accused
from solotune.display.observer import SilentObserver
from solotune.run.events import DiagnosedEvent, EvalEvent, StepEvent

if TYPE_CHECKING:
    from solotune.display.observer import RunObserver
    from solotune.model.loading import TrainableModel
    from solotune.run.record import RunRecord

NUM_SAMPLED = 64
"""Elements of each matrix that are compared: 28,672 of 224 adapted layers, one small copy."""
SMALLEST_SHARE_MOVED = 0.3
"""float32 moves all that has a gradient; bfloat16 at a small rate about half of it, at the end of its decay 0.01."""


class Monitor(SilentObserver):
    """Says what is wrong with the run that it watches, to another observer: the run's log and what people see."""

    def __init__(self, model: TrainableModel, run_facts: RunFacts, observer: RunObserver, before: RunRecord) -> None:
        """Args:
        subject: what is known before the first step; the rules are asked about it at once, and what the data's
            findings have told already is not told again.
        before: of a resumed run, what was recorded until then: it was seen and told.
        """
        self._model, self._subject, self._observer = model, run_facts, observer
        self._told = {finding.code for finding in run_facts.findings or ()}
        self._places: dict[
            str, tuple[torch.Tensor, torch.Tensor]
        ] = {}  # layer -> places of A and of B in `flat_params`
        self._before: torch.Tensor | None = None
        self._num_updates = 0
        self._steps, self._evaluations = list(before.steps), list(before.evals)
        self._told |= before.diagnosed_codes
        self._signals: list[Signal] = []
        self._total_steps, self._is_new = 0, True
        self._ask_rules(run_facts)

    def begin(self, total_steps: int, done: int = 0) -> None:
        self._total_steps, self._is_new = total_steps, done == 0
        for name, layer in self._model.lora_layers.items():
            self._places[name] = (_sampled(layer.lora_A), _sampled(layer.lora_B))
        self._before = self._sample()

    def step(self, event: StepEvent) -> None:
        self._steps.append(event)
        if len(self._steps) == 1 and self._is_new:
            self._look_at_first_loss(event.loss)
        if self._before is not None and event.learning_rate > 0:
            self._num_updates += 1
            self._look_at_update()

    def evaluated(self, event: EvalEvent, num_rows: int) -> None:
        self._evaluations.append(event)
        self._ask_rules(replace(self._subject, trace=self._trace()))

    def diagnosis(self) -> Diagnosis:
        """What rules and watch make of the whole run."""
        missing = {
            **self._subject.missing,
            "live": "model probes do not run during training; solotune diagnose runs them",
        }
        run_facts = replace(self._subject, trace=self._trace(), live=None, missing=missing)
        return examine(run_facts, also=self._signals)

    def _ask_rules(self, run_facts: RunFacts) -> None:
        """Tells what they name; they are asked again for the diagnosis, so their signals need not be kept."""
        for named in accused(ask_all(run_facts)[0]):
            self._tell(named.speaking[0])

    def _trace(self) -> Trace:
        """What the run has recorded so far."""
        last = self._steps[-1].step if self._steps else 0
        return replace(
            run_files.curves(self._steps, self._evaluations),
            total_steps=self._total_steps,
            is_finished=last == self._total_steps > 0,
        )

    def _look_at_first_loss(self, loss: float) -> None:
        size = self._model.module.config.get_text_config().vocab_size
        if loss > 1.2 * math.log(size):  # new tasks begin above log V at times; a fifth above it none was seen
            says = f"the first loss is {loss:.2f}; guessing at random among {size:,} tokens gives {math.log(size):.2f}"
            self._see(Signal("F04", "measured", says, 0.4))

    def _look_at_update(self) -> None:
        """Compares the sampled elements with those before the step."""
        assert self._before is not None
        now = self._sample()
        moved = (now != self._before).cpu()
        self._before = now if self._num_updates < 2 else None
        which = 1 if self._num_updates == 1 and self._is_new else 0  # B in the first update, then A
        shares, place = {}, 0
        for name, places in self._places.items():
            sizes = [len(part) for part in places]
            parts = moved[place : place + sum(sizes)].split(sizes)
            shares[name] = float(parts[which].float().mean())
            place += sum(sizes)
        still = [name for name, share in shares.items() if share == 0]
        part, mean = "AB"[which], sum(shares.values()) / max(len(shares), 1)
        if part == "A" and mean < SMALLEST_SHARE_MOVED:
            says = f"update {self._num_updates} changed only {mean:.0%} of lora_A's elements"
            self._see(Signal("F54", "measured", says, 0.6))
        elif still:
            says = f"lora_{part} of {len(still)} of {len(shares)} layers did not change in update {self._num_updates}: "
            says += ", ".join(still[:3])
            self._see(Signal("F57", "invariant", says, 0.9 if len(still) == len(shares) else 0.5))
            self._before = None  # what follows from it is not told

    def _sample(self) -> torch.Tensor:
        places = torch.cat([part for pair in self._places.values() for part in pair])
        return self._model.flat_params.detach()[places].clone()

    def _see(self, signal: Signal) -> None:
        self._signals.append(signal)
        self._tell(signal)

    def _tell(self, signal: Signal) -> None:
        if signal.code not in self._told:
            self._told.add(signal.code)
            self._observer.diagnosed(DiagnosedEvent(signal.code, signal.kind, signal.says), in_words(signal))


def in_words(signal: Signal) -> str:
    """One line for the progress view."""
    fault = FAULTS[signal.code]
    doubt = "" if signal.weight >= 0.5 else "perhaps "
    return (
        f"{doubt}{signal.code} {fault.slug}: {signal.says} → {signal.fix or fault.fix} (solotune explain {fault.code})"
    )


def _sampled(part: torch.nn.Parameter) -> torch.Tensor:
    """int64: evenly spaced places of the matrix within the vector that all adapters share."""
    start, size = int(part.data.storage_offset()), part.numel()
    return torch.linspace(start, start + size - 1, min(NUM_SAMPLED, size), dtype=torch.float64).long().to(part.device)
