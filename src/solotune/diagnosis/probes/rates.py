"""P7: one batch learned by heart, at a tenth of the training's rate, at its rate and at ten times it; and with more
adapters than the training has.

    much lower at x10                       the effective step is too small (F64, or F61: alpha / r)
    much lower at / 10, or not finite       it is too large (F67, or F61)
    high at every rate, low with rank 32
    on every linear layer                   too little capacity (F62, or F56: targets that match few modules)
    low at the training's rate              none of these

All start from the same weights and see the same rows in the same order, so the differences are the rate's alone. One
batch is learned faster than data, so a rate that is fine may still gain at x10; what is judged is how much of the
possible the training's own rate reaches. Costs some tens of forward and backward passes on two rows; the number of
steps is what fits the budget, and under `LEAST_STEPS` nothing is said.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.probes.adapters import learning_rate_of
from solotune.diagnosis.probes.patient import (
    has_labels,
    on_device,
    optimizer_of,
    restored,
    sequences_of,
    trainable_of,
    training_loss,
    wider,
)
from solotune.diagnosis.probes.skipping import Skipped
from solotune.diagnosis.subject import Live, Subject

LEAST_STEPS, MOST_STEPS = 6, 40
FACTORS = (0.1, 1.0, 10.0)
SLOW = 0.25  # of what x10 gains in the same steps: below it the rate is too low
BLOWN = 1.3  # times the first loss
STUCK = 0.35  # of what wide adapters gain
WORTH = 0.1  # nats: gains below it say nothing


def range_test(live: Live, subject: Subject, budget: float) -> tuple[list[Signal], dict[str, Any]]:
    """P7."""
    batch = next((sequences_of(b, 2) for b in live.batches if has_labels(sequences_of(b, 2))), None)
    if batch is None:
        raise Skipped("no batch has a label")
    rate, clip = learning_rate_of(subject), subject.settings.get("max_grad_norm")
    begun = time.perf_counter()
    first = _learn(live, batch, rate, 1, clip)
    seconds = max(time.perf_counter() - begun, 1e-4)
    steps = min(MOST_STEPS, int(budget / seconds / (len(FACTORS) + 1.2)))
    if steps < LEAST_STEPS or len(first) < 1:
        raise Skipped(f"a step takes {seconds:.1f} s: {steps} steps a rate fit, {LEAST_STEPS} are needed")
    curves = {factor: _learn(live, batch, factor * rate, steps, clip) for factor in FACTORS}
    found: dict[str, Any] = {
        "rate": rate,
        "steps": steps,
        "curves": {f"{factor:g}": [round(float(x), 4) for x in curve] for factor, curve in curves.items()},
    }
    ends = {factor: _end(curve) for factor, curve in curves.items()}
    start = curves[1.0][0]
    found["gain"] = {f"{factor:g}": _rounded(start - end) for factor, end in ends.items()}
    wide = None
    if min(ends.values()) > start - max(WORTH, 0.6 * start):  # no rate learns the batch
        wide = _learn_wide(live, batch, steps)
        found["wide"] = [round(float(x), 4) for x in wide]
    return _judge(start, ends, wide, rate, steps, curves), found


def _judge(
    start: float,
    ends: dict[float, float],
    wide: Sequence[float] | None,
    rate: float,
    steps: int,
    curves: dict[float, list[float]],
) -> list[Signal]:
    gains = {factor: start - end for factor, end in ends.items()}
    here, numbers = gains[1.0], {"rate": rate, **{f"gain_x{factor:g}": _rounded(g) for factor, g in gains.items()}}
    signals = []
    blown = not math.isfinite(ends[1.0]) or max(curves[1.0], key=_or_inf) > BLOWN * max(start, 0.5)
    if blown and gains[0.1] > WORTH and (not math.isfinite(here) or gains[0.1] > here + WORTH):
        says = f"{steps} steps on one batch at {rate:.2g} end at {_shown(ends[1.0])} after {start:.2f}, at "
        says += f"{rate / 10:.2g} at {ends[0.1]:.2f}"
        expect = f"one batch falls by {gains[0.1]:.2f} in {steps} steps instead of rising"
        for code, weight in (("F67", 0.85), ("F61", 0.4)):
            fix = f"learning_rate: {rate / 10:.2g}" if code == "F67" else ""
            signals.append(Signal(code, "counterfactual", says, weight, numbers, fix=fix, expect=expect))
    elif gains[10.0] > WORTH and math.isfinite(here) and here < SLOW * gains[10.0]:
        says = f"{steps} steps on one batch gain {here:.2f} at {rate:.2g} and {gains[10.0]:.2f} at {10 * rate:.2g}"
        expect = f"{gains[10.0] / max(here, 0.01):.0f} times the gain in the first {steps} steps"
        for code, weight in (("F64", 0.75), ("F61", 0.35)):
            fix = f"learning_rate: {10 * rate:.2g}" if code == "F64" else ""
            signals.append(Signal(code, "counterfactual", says, weight, numbers, fix=fix, expect=expect))
    elif math.isfinite(here) and here >= SLOW * gains[10.0] and here > WORTH and not blown:
        says = f"{steps} steps on one batch gain {here:.2f} at {rate:.2g}, {_rounded(gains[10.0])} at ten times it and "
        says += f"{_rounded(gains[0.1])} at a tenth"
        signals += [Signal(code, "measured", says, 0.7, numbers, against=True) for code in ("F64", "F67")]
    if wide is not None:
        most, best = start - _end(wide), max((g for g in gains.values() if math.isfinite(g)), default=0.0)
        if most > 0.3 and best < STUCK * most:
            says = f"one batch falls by {best:.2f} at the best of three rates, and by {most:.2f} with rank 32 on every"
            says += " linear layer"
            for code, weight in (("F62", 0.7), ("F56", 0.6)):
                fix = "lora_target_modules: all-linear, lora_r: 16"
                signals.append(Signal(code, "counterfactual", says, weight, {**numbers, "gain_wide": most}, fix=fix))
    return signals


def _learn(
    live: Live, batch: dict[str, Any], rate: float, steps: int, clip: float | None, seed: int = 0
) -> list[float]:
    """Losses before each of the steps and after the last, as the training's loss counts."""
    with restored(live, seed):
        return _descend(live, batch, trainable_of(live.model), rate, steps, clip, live)


def _learn_wide(live: Live, batch: dict[str, Any], steps: int) -> list[float]:
    """The same by adapters of rank 32 on every linear layer, at a rate that suits these."""
    with restored(live), wider(live.model) as parameters:
        return _descend(live, batch, parameters, 2e-3, steps, 1.0, None)


def _descend(
    live: Live,
    batch: dict[str, Any],
    parameters: Sequence[nn.Parameter],
    rate: float,
    steps: int,
    clip: float | None,
    made_by: Live | None,
) -> list[float]:
    live.model.eval()  # the same rows without dropout: the differences are the rate's
    if _checkpoints(live.model):
        live.model.train()  # transformers checkpoints in training mode alone
    if not parameters:
        return [math.nan]
    optimizer = optimizer_of(live, parameters, rate) if made_by else torch.optim.AdamW(parameters, lr=rate)
    inputs, losses = on_device(live, batch), []
    for _ in range(steps):
        loss = training_loss(live, inputs)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]) or not loss.requires_grad:
            return losses
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        losses.append(float(training_loss(live, inputs)))
    return losses


def _end(curve: Sequence[float]) -> float:
    """The last losses; infinite where they are not finite."""
    last = np.array(curve[-2:], float)
    return float(last.mean()) if np.isfinite(last).all() else math.inf


def _or_inf(x: float) -> float:
    return x if math.isfinite(x) else math.inf


def _rounded(x: float) -> float | None:
    return round(x, 4) if math.isfinite(x) else None


def _shown(x: float) -> str:
    return f"{x:.2f}" if math.isfinite(x) else "NaN"


def _checkpoints(model: nn.Module) -> bool:
    """Some of its modules recompute themselves, which transformers lets them do in training mode alone."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
