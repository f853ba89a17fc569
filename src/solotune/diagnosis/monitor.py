"""Monitor a run while it trains: report a fault in one line, at the first steps and at evaluations.

    monitor = Monitor(model, run_facts, observer, RunRecord.read(run.path))
    loop.train(..., observer=Observers(display, Resilient(monitor)))

It is an observer like others, so the training loop does not depend on the diagnosis. It checks

- the first loss: above log V the model is worse than random guessing;
- a sample of every adapter's elements before and after the first two steps with a learning rate above 0. In every
  healthy run `lora_B` changes in the first of them and `lora_A` from the second on (its first gradient is exactly zero,
  since B is). An adapter that does not change has no gradient (F57). If a large part of A does not change, rounding
  loses its updates (F54); B does not show this, since it starts at zero;
- settings, rows and curve with the rules, before the run and at evaluations, and decides as `solotune diagnose` does.
  At an evaluation only the rules that read the curve run again (`GrowingRun`).

A fault is reported once, as one; a remark too, unless the check of the data has made it already; a doubt says
"perhaps". The monitor never stops a run, and costs milliseconds: it reads a few thousand elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from solotune.diagnosis.catalogue import FAULTS
from solotune.diagnosis.evidence import Diagnosis, Signal
from solotune.diagnosis.rules import GrowingRun
from solotune.diagnosis.run_diagnosis import examine
from solotune.diagnosis.run_facts import RunFacts, Trace
from solotune.diagnosis.sources import run_files
from solotune.diagnosis.thresholds import ACCUSED
from solotune.diagnosis.verdict import decide, weigh
from solotune.display.observer import SilentObserver
from solotune.run.events import DiagnosedEvent, EvalEvent, StepEvent

if TYPE_CHECKING:
    from solotune.display.observer import RunObserver
    from solotune.model.loading import TrainableModel
    from solotune.run.record import RunRecord

NUM_SAMPLED = 64
"""Elements of each matrix that are compared: 28,672 for 224 adapted layers, one small copy. A smaller matrix gives some
of its elements twice."""
SMALLEST_SHARE_MOVED = 0.3
"""float32 changes all elements with a gradient; bfloat16 at a small learning rate half of them, late in decay 0.01."""


class Monitor(SilentObserver):
    """Report faults of a running training to another observer (the run's log and the display)."""

    def __init__(
        self,
        model: TrainableModel,
        run_facts: RunFacts,
        observer: RunObserver,
        before: RunRecord,
        rules: GrowingRun | None = None,
    ) -> None:
        """Args:
        run_facts: facts before the first step. What `findings` already says is not reported again.
        observer: receives `diagnosed` events.
        before: record of a resumed run until now; faults that it names are not reported again.
        rules: the rules on `run_facts`, if they were asked before.
        """
        self._model, self._run_facts, self._observer = model, run_facts, observer
        self._rules = rules or GrowingRun(run_facts)
        said = [one.signal for one in run_facts.findings or ()]
        self._reported = {(one.code, one.kind == "remark") for one in said if one is not None}
        self._places_L2E = torch.empty(0, dtype=torch.int64)  # layer, A or B, element: positions in `flat_params`
        self._before_L2E: torch.Tensor | None = None  # these elements before the next update
        self._num_updates = 0
        self._curve = run_files.curves(before.steps, before.evals)
        self._steps: list[StepEvent] = []  # that are not in `_curve` yet, nor are these:
        self._evaluations: list[EvalEvent] = []
        self._reported |= {(event.code, event.kind == "remark") for event in before.of(DiagnosedEvent)}
        self._signals: list[Signal] = []
        self._total_steps, self._is_new = 0, True
        self._report_decided(self._rules.signals())

    def begin(self, total_steps: int, done: int = 0) -> None:
        self._total_steps, self._is_new = total_steps, done == 0
        self._places_L2E = _sampled(self._model)
        self._before_L2E = self._sample()

    def step(self, event: StepEvent) -> None:
        self._steps.append(event)
        if len(self._steps) == 1 and not len(self._curve.step_S) and self._is_new:
            self._check_first_loss(event.loss)
        if self._before_L2E is not None and event.learning_rate > 0:
            self._num_updates += 1
            self._check_update()

    def evaluated(self, event: EvalEvent, num_rows: int) -> None:
        self._evaluations.append(event)
        self._report_decided(self._rules.signals(self._trace()))

    def diagnosis(self) -> Diagnosis:
        """The diagnosis of the whole run, by the rules and the signals of this monitor."""
        missing = {
            **self._run_facts.missing,
            "live": "model probes do not run during training; solotune diagnose runs them",
        }
        run_facts = replace(self._run_facts, trace=self._trace(), live=None, missing=missing)
        return examine(run_facts, also=self._signals)

    def _report_decided(self, of_rules: Sequence[Signal]) -> None:
        """Report the faults and remarks of the rules. `diagnosis` runs them again, so their signals are not kept."""
        signals = [*of_rules, *self._signals]  # what follows from these is not reported
        decided, weighed = decide(self._run_facts.name, signals), weigh(signals)
        for culprit in decided.culprits if decided.is_fault else ():
            if not any((code, False) in self._reported for code in culprit.same_evidence):
                self._report(weighed[culprit.fault].supporting[0])
        for remark in decided.remarks:
            says = next(s for s in weighed[remark.fault].supporting if s.kind == "remark")
            self._report(says)

    def _trace(self) -> Trace:
        """The curve of the run so far."""
        self._curve = run_files.continued(self._curve, run_files.curves(self._steps, self._evaluations))
        self._steps.clear()
        self._evaluations.clear()
        last = self._curve.step_S[-1] if len(self._curve.step_S) else 0
        return replace(self._curve, total_steps=self._total_steps, is_finished=bool(last == self._total_steps > 0))

    def _check_first_loss(self, loss: float) -> None:
        size = self._model.module.config.get_text_config().vocab_size
        if loss > 1.2 * math.log(size):  # new tasks sometimes start above log V, but none was seen a fifth above it
            says = f"the first loss is {loss:.2f}; guessing at random among {size:,} tokens gives {math.log(size):.2f}"
            self._record(Signal("F04", "measured", says, 0.4))

    def _check_update(self) -> None:
        """Compare the sampled elements with their values before the step."""
        assert self._before_L2E is not None
        now_L2E = self._sample()
        which = 1 if self._num_updates == 1 and self._is_new else 0  # B in the first update, then A
        shares = (now_L2E != self._before_L2E)[:, which].float().mean(1).tolist()  # of each layer's elements
        self._before_L2E = now_L2E if self._num_updates < 2 else None
        still = [name for name, share in zip(self._model.lora_layers, shares, strict=True) if share == 0]
        part, mean = "AB"[which], sum(shares) / max(len(shares), 1)
        if part == "A" and mean < SMALLEST_SHARE_MOVED:
            says = f"update {self._num_updates} changed only {mean:.0%} of lora_A's elements"
            self._record(Signal("F54", "measured", says, 0.6))
        elif still:
            says = f"lora_{part} of {len(still)} of {len(shares)} layers did not change in update {self._num_updates}: "
            says += ", ".join(still[:3])
            self._record(Signal("F57", "invariant", says, 0.9 if len(still) == len(shares) else 0.5))
            self._before_L2E = None  # consequences are not reported

    def _sample(self) -> torch.Tensor:
        return self._model.flat_params.detach()[self._places_L2E]

    def _record(self, signal: Signal) -> None:
        self._signals.append(signal)
        self._report(signal)

    def _report(self, signal: Signal) -> None:
        is_remark = signal.kind == "remark"
        if not self._reported & {(signal.code, is_remark), (signal.code, False)}:
            self._reported.add((signal.code, is_remark))
            self._observer.diagnosed(DiagnosedEvent(signal.code, signal.kind, signal.says), in_words(signal))


def in_words(signal: Signal) -> str:
    """One line for the progress view."""
    fault = FAULTS[signal.code]
    word = "remark " if signal.kind == "remark" else "" if signal.weight >= ACCUSED else "perhaps "
    return (
        f"{word}{signal.code} {fault.slug}: {signal.says} → {signal.fix or fault.fix} (solotune explain {fault.code})"
    )


def _sampled(model: TrainableModel) -> torch.Tensor:
    """int64 `[layers, 2, NUM_SAMPLED]`: evenly spaced positions of each A and B within the vector of all adapters."""
    parts = [part for layer in model.lora_layers.values() for part in (layer.lora_A, layer.lora_B)]
    starts = torch.tensor([part.storage_offset() for part in parts], dtype=torch.int64)
    lasts = torch.tensor([part.numel() - 1 for part in parts], dtype=torch.int64)
    places = starts[:, None] + lasts[:, None] * torch.arange(NUM_SAMPLED) // (NUM_SAMPLED - 1)
    return places.view(-1, 2, NUM_SAMPLED).to(model.flat_params.device)
