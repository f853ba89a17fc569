"""Find why a loss curve is flat: the curve shows that it is, probes and settings show the reason.

    1  are the labels, the rows and the tokenizer right?      F22 F12 F04 F38, and other faults of S4
    2  does the adapter get gradients?                        F58 F60 F57
    3  did the learning rate reach its peak and stay there?   F65 F66
    4  do optimizer steps change the weights?                 F54
    5  would another learning rate lower the loss?            F64 F61 F67
    6  would more adapters lower the loss?                    F62 F56
    7  is the step clipped or decayed away?                   F68 F69
    8  is the noise larger than the slope?                    noise: train longer, or evaluate on more rows
    9  none of these                                          the floor of the task: healthy

The first question with an answer is the cause. All answers are in the measurements, so that the questions that were
ruled out can be shown too, with the gain that the range test measured.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from solotune.diagnosis.evidence import Probed, Signal
from solotune.diagnosis.run_facts import RunFacts, Settings, Trace

LEAST_POINTS = 10  # logged losses, else no curve
FLAT = 0.03  # of the level: the largest fall over the second half of a flat run
CLEAR = 2.0  # standard errors of the slope
SPEAKS = 0.5  # weight: from here on a signal is an answer
NO_RATE = 0.02  # of the peak: a learning rate that changes nothing
LATE, EARLY = 0.5, 0.6  # of the run: a warmup that ends later, a schedule that ends earlier
ADAM_EPSILON = 1e-8
DECAYED = 5.0  # sum of rate x weight_decay over a run, from which adapters are pulled back to zero

QUESTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("labels, rows and tokenizer", ("F22", "F23", "F21", "F18", "F29", "F12", "F04", "F38")),
    ("gradients of the adapter", ("F58", "F60", "F57")),
    ("the schedule of the rate", ("F65", "F66")),
    ("steps that arrive", ("F54",)),
    ("another rate", ("F64", "F67", "F61")),
    ("more adapters", ("F62", "F56")),
    ("clipping and decay", ("F68", "F69")),
)


@dataclass(frozen=True)
class Shape:
    """The second half of a loss curve."""

    level: float  # mean of the last quarter
    first: float  # mean of the first tenth
    change: float  # over the second half, by a straight-line fit; below 0 if it still falls
    stderr: float  # of the change
    from_step: int
    to_step: int

    @property
    def is_flat(self) -> bool:
        """The change is small, or cannot be told from noise."""
        return -self.change < max(FLAT * self.level, 0.0) and self.change < CLEAR * self.stderr + FLAT * self.level

    @property
    def is_noisy(self) -> bool:
        """The noise is large enough to hide a useful change."""
        return CLEAR * self.stderr > 2 * FLAT * max(self.level, 1e-9)


def shape_of(trace: Trace | None) -> Shape | None:
    """The shape of a loss curve; None if too few steps were logged."""
    if trace is None:
        return None
    known = np.isfinite(trace.loss_S)
    step, loss = np.asarray(trace.step_S, float)[known], np.asarray(trace.loss_S, float)[known]
    if len(loss) < LEAST_POINTS:
        return None
    half = len(loss) // 2
    x, y = step[half:], loss[half:]
    centred = x - x.mean()
    spread = float((centred**2).sum())
    if spread == 0:
        return None
    slope = float((centred * y).sum() / spread)
    residual = y - y.mean() - slope * centred
    span = float(x[-1] - x[0])
    stderr = math.sqrt(float((residual**2).sum()) / max(len(y) - 2, 1) / spread) * span
    tenth, quarter = max(1, len(loss) // 10), max(1, len(loss) // 4)
    return Shape(float(loss[-quarter:].mean()), float(loss[:tenth].mean()), slope * span, stderr, int(x[0]), int(x[-1]))


def plateau(run_facts: RunFacts, found: Probed) -> list[Signal]:
    """Add `plateau` to `found.measurements`; return the curve's signal for the cause, if there is one."""
    shape = shape_of(run_facts.trace)
    if shape is None:
        return []
    account: dict[str, Any] = {**asdict(shape), "is_flat": shape.is_flat}
    found.measurements["plateau"] = account
    if not shape.is_flat:
        return []
    signal_of = {**_of_probes(found), **_of_the_record(run_facts)}
    account["answers"] = [_answer(question, codes, signal_of) for question, codes in QUESTIONS]
    cause = next((code for _, codes in QUESTIONS for code in codes if code in signal_of), None)
    account["cause"] = cause or ("noise" if shape.is_noisy else "floor")
    where = f"the loss stays at {shape.level:.2f} from step {shape.from_step:,} to {shape.to_step:,} "
    where += f"({shape.change:+.3f} ± {shape.stderr:.3f})"
    if cause is None:
        account["says"] = where + (
            ": train longer or evaluate on more rows to tell a slope from noise"
            if shape.is_noisy
            else ": no check found a cause; this may be the lowest loss that this task allows"
        )
        return []
    account["says"] = f"{where}: {signal_of[cause].says}"
    account["expected"] = signal_of[cause].expect
    said = [signal_of[cause]] if signal_of[cause] not in found.signals else []  # found here, or too weak alone
    return [*said, Signal(cause, "curve", where, 0.3, {"level": shape.level, "change": shape.change})]


def _answer(question: str, codes: tuple[str, ...], signal_of: dict[str, Signal]) -> dict[str, Any]:
    found = [code for code in codes if code in signal_of]
    return {"question": question, "found": found, "says": signal_of[found[0]].says if found else ""}


def _of_probes(found: Probed) -> dict[str, Signal]:
    """The strongest signal for each code."""
    chosen: dict[str, Signal] = {}
    for signal in sorted(found.signals, key=lambda s: s.weight):
        if not signal.against and signal.weight >= SPEAKS and signal.kind != "curve":
            chosen[signal.code] = signal
    return chosen


def _of_the_record(run_facts: RunFacts) -> dict[str, Signal]:
    """Signals from learning rates, gradient norms and settings: F65, F66, F68, F69."""
    assert run_facts.trace is not None
    found = [*_schedule(run_facts.trace, run_facts.settings), *_clip(run_facts.trace, run_facts.settings)]
    return {signal.code: signal for signal in found}


def _schedule(trace: Trace, settings: Settings) -> list[Signal]:
    rates, steps = np.asarray(trace.learning_rate_S, float), np.asarray(trace.step_S, float)
    known = np.isfinite(rates)
    if known.sum() < LEAST_POINTS or not rates[known].max():
        return []
    rates, steps = rates[known], steps[known]
    target, peak = settings.get("learning_rate") or rates.max(), rates.max()
    total = max(float(trace.total_steps or 0), steps[-1])
    found = []
    first_peak = steps[int(np.argmax(rates >= 0.99 * peak))]
    if first_peak > LATE * total and rates[-1] >= 0.9 * peak:
        says = (
            f"the learning rate still rises at step {first_peak:.0f} of {total:.0f}: {peak:.2g} of {float(target):.2g}"
        )
        found.append(Signal("F65", "measured", says, 0.9, fix="warmup_ratio: 0.03", expect=""))
    dead = np.flatnonzero(rates < NO_RATE * peak)
    after = dead[steps[dead] > first_peak]
    if len(after) and steps[after[0]] < EARLY * total and (rates[after[0] :] < NO_RATE * peak).all():
        says = (
            f"from step {steps[after[0]]:.0f} of {total:.0f} on, the learning rate is below {NO_RATE:.0%} of its peak"
        )
        found.append(Signal("F66", "measured", says, 0.9))
    return found


def _clip(trace: Trace, settings: Settings) -> list[Signal]:
    """A constant factor cancels in Adam, so tight clipping matters only near its epsilon, or with SGD."""
    found = []
    clip = settings.get("max_grad_norm")
    norms = np.asarray(trace.grad_norm_S, float)
    norms = norms[np.isfinite(norms)]
    if clip and len(norms):
        is_sgd = "sgd" in str(settings.get("optim") or "").lower()
        if float(clip) < 0.1 * float(np.median(norms)) and (is_sgd or float(clip) <= 100 * ADAM_EPSILON):
            says = f"gradients of norm {np.median(norms):.2g} are clipped to {float(clip):.2g}"
            found.append(Signal("F68", "measured", says, 0.8, fix="max_grad_norm: 1.0"))
    decay = settings.get("weight_decay") or 0.0
    rates = np.asarray(trace.learning_rate_S, float)
    rates = rates[np.isfinite(rates)]
    if decay and len(rates) and trace.step_S[-1]:
        pulled = float(decay) * float(rates.mean()) * float(trace.step_S[-1])
        if pulled > DECAYED:
            says = (
                f"learning rate times weight_decay sums to {pulled:.1f} over the run: it pulls the adapter back to zero"
            )
            found.append(Signal("F69", "measured", says, 0.8, fix="weight_decay: 0.0"))
    return found
