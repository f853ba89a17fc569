"""P7: overfit one batch at 0.1, 1 and 10 times the learning rate of the run, and with extra adapters.

Gain means the fall of the loss on that batch.

    largest at a tenth (or less), or not finite the effective step is too large (F67, or F61: alpha / r)
    largest at ten times (or more)              it is too small (F64, or F61)
    small at every rate, large with rank 32
    on every linear layer                       too little capacity (F62, or F56: targets match few modules)
    largest without clipping                    the step is clipped away (F68)
    large on two rows, small on eight           too little capacity, if the adapter is small
    several times sooner at ten times           the scale is too small (F61), if it is unusual and the run is short
    large at the rate of the run                none of these

All tests start from the same weights and use the same rows, so only the rate differs. If the run has trained, they
start from fresh adapters: the right rate only disturbs weights that have converged. If the best rate is at an edge, the
range is extended. A run is longer than the test, and at a rate that is too low the gain grows with the steps, so it is
projected to the length of the run before it counts as small. Costs some tens of forward and backward passes on two
rows; the number of steps is what fits the budget, and below `LEAST_STEPS` the probe is skipped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import scale
from solotune.diagnosis.facts.step_size import LEAST_STEPS as SHORTEST_RUN
from solotune.diagnosis.facts.step_size import odd_one
from solotune.diagnosis.probes.adapter_gradients import learning_rate_of
from solotune.diagnosis.probes.probed_model import (
    adapters_of,
    extra_adapters,
    fresh_adapters,
    has_labels,
    on_device,
    optimizer_of,
    sequences_of,
    trainable_of,
    training_loss,
)
from solotune.diagnosis.probes.skipped import Skipped
from solotune.diagnosis.run_facts import LiveModel, RunFacts

LEAST_STEPS, MOST_STEPS = 6, 40
NUM_MANY = 8  # rows
FACTORS = (0.1, 1.0, 10.0)
WIDEST = 1e3  # factor up and down
NOTHING, LITTLE, MUCH, CLEARLY = 0.02, 0.35, 0.5, 0.75  # of the largest gain
TIMES = 2.0  # ratio of gains from which another rate counts as better
SMALLEST, SMALL = (
    1.0,
    4.0,
)  # rank times the share of adapted layers: q_proj alone with rank 4 has 0.6, q and v with 8 2.3
BETTER = 0.1  # of the largest gain: a difference that is due to the rate
WORTH = 0.1  # nats: smaller gains prove nothing
USUAL_STEPS = 100  # of a run of unknown length; shorter ones are rare
HALF = 0.5  # mean of a decaying rate, relative to its peak
USUAL_SCALE = (0.5, 16.0)  # alpha / r
USUAL_RATE = (5e-5, 5e-3)
NARROW = 0.25  # alpha / r of 16 / 64; below it is unusual
SOONER = 3.2  # times: half of the gain at ten times the step; at a scale of 1/8 0.6 to 1.5, 1/16 2.4, 1/64 5
ENOUGH_STEPS = 25  # of ten times the size, which a run has to be worth


def range_test(live: LiveModel, run_facts: RunFacts, budget: float) -> tuple[list[Signal], dict[str, Any]]:
    """P7."""
    rate, clip = learning_rate_of(run_facts), run_facts.settings.get("max_grad_norm")
    started, seconds, steps = time.perf_counter(), math.inf, 0
    for rows in (2, 1):  # one, if two are too slow
        batch = next((sequences_of(b, rows) for b in live.batches if has_labels(sequences_of(b, rows))), None)
        if batch is None:
            raise Skipped("no batch has a label")
        first = _learn(live, run_facts, batch, rate, 1, clip)  # also a warmup for what is created at the first call
        timed = time.perf_counter()
        _learn(live, run_facts, batch, rate, 1, clip)
        seconds = max(0.75 * (time.perf_counter() - timed), 1e-4)  # of a step and the loss after it
        steps = min(MOST_STEPS, int(budget / seconds / (len(FACTORS) + 1.3)))
        if steps >= LEAST_STEPS or batch["input_ids"].shape[0] == 1:
            break
    if steps < LEAST_STEPS or len(first) < 1:
        raise Skipped(
            f"a step takes {seconds:.1f} s, so only {steps} steps for each learning rate fit; {LEAST_STEPS} are needed"
        )
    latest = started + 1.5 * budget - steps * seconds  # for the last test: an extended range may take 1.5 times as long
    curves = {factor: _learn(live, run_facts, batch, factor * rate, steps, clip) for factor in FACTORS}
    wide = _learn_wide(live, run_facts, batch, steps)
    start = curves[1.0][0]
    while time.perf_counter() < latest and (further := _further(start, curves, wide, rate)) is not None:
        curves[further] = _learn(live, run_facts, batch, further * rate, steps, clip)
    alike = None  # rank 32 at the training's own rate
    if start - _end(curves[1.0]) < MUCH * (start - _end(wide)) and time.perf_counter() < latest:
        alike = start - _end(_learn_wide(live, run_facts, batch, steps, rate))
    unclipped = None  # the training's own rate without its clipping
    if clip and start - _end(curves[1.0]) < LITTLE * (start - _end(wide)) and time.perf_counter() < latest:
        unclipped = start - _end(_learn(live, run_facts, batch, rate, steps, None))
    tried = {factor: start - _end(curve) for factor, curve in sorted(curves.items())}
    found: dict[str, Any] = {
        "rate": rate,
        "steps": steps,
        "curves": {f"{factor:g}": [round(x, 4) for x in curves[factor]] for factor in tried},
        "wide": [round(x, 4) for x in wide],
        "gain": {f"{factor:g}": _rounded(gain) for factor, gain in tried.items()},
        "gain_wide": _rounded(start - _end(wide)),
        "gain_wide_at_rate": None if alike is None else _rounded(alike),
        "gain_unclipped": None if unclipped is None else _rounded(unclipped),
    }
    capacity = _capacity(live.model)
    many = None  # a small adapter may hold two rows, and not eight
    if capacity < SMALLEST and time.perf_counter() + 4 * steps * seconds < latest:
        many = _of_many_rows(live, run_facts, rate, steps, clip)
        found["gain_of_many_rows"] = many
    result = Tried(rate, steps, start, tried, start - _end(wide), alike, unclipped, capacity, many)
    signals = _judge(run_facts, result)
    if not any(signal.code == "F61" for signal in signals):
        signals = [*signals, *_slow(run_facts, result, curves[1.0], curves[10.0])]
    return signals, found


@dataclass(frozen=True)
class Tried:
    """Gains in nats of `steps` steps from the first loss `start`; minus infinity if the loss was not finite."""

    rate: float
    steps: int
    start: float
    gains: dict[float, float]  # factor -> gain
    wide: float
    alike: float | None  # gain of extra adapters at the rate of the run, if tested
    unclipped: float | None  # gain at the rate of the run without clipping, if tested
    capacity: float  # rank times the share of linear layers that have an adapter
    many: tuple[float, float] | None = None  # gains on more rows at the rate of the run: own and extra adapters

    @property
    def best(self) -> float:
        """The factor with the largest gain."""
        return max(self.gains, key=lambda factor: self.gains[factor])

    @property
    def most(self) -> float:
        """The largest gain of all tests."""
        return max(self.gains[self.best], self.wide)

    def says(self, factor: float) -> str:
        text = f"{self.steps} steps on one batch bring its loss from {self.start:.2f} to {self._end(1.0)} at "
        text += f"{self.rate:.2g}, to {self._end(factor)} at {factor * self.rate:.2g}"
        return text

    def _end(self, factor: float) -> str:
        return f"{self.start - self.gains[factor]:.2f}" if math.isfinite(self.gains[factor]) else "NaN"


def _further(start: float, curves: dict[float, list[float]], wide: Sequence[float], rate: float) -> float | None:
    """The next factor, if the best so far is at an edge and its gain is a small part of what is possible."""
    gains = {factor: start - _end(curve) for factor, curve in curves.items()}
    best, lowest, highest = max(gains, key=lambda factor: gains[factor]), min(gains), max(gains)
    possible = max(start - _end(wide), WORTH)
    too_high = lowest * rate > USUAL_RATE[0]
    if too_high and gains[best] < CLEARLY * possible and (best == lowest or lowest * rate > USUAL_RATE[1]):
        return lowest / 10 if lowest > 1 / WIDEST else None  # even a much too high rate learns token frequencies
    if best == highest and gains[best] < MUCH * possible and highest < WIDEST:
        return highest * 10
    return None


def _judge(run_facts: RunFacts, tried: Tried) -> list[Signal]:
    here, most, best = tried.gains[1.0], tried.most, tried.best
    numbers = {"rate": tried.rate, "gain": _rounded(here), "gain_best": _rounded(tried.gains[best]), "best_at": best}
    numbers["gain_wide"] = _rounded(tried.wide)
    if not math.isfinite(most) or most < WORTH:
        return []
    if tried.unclipped is not None and tried.unclipped > max(LITTLE * most, TIMES * here):
        says = (
            f"{tried.steps} steps on one batch lower its loss by {here:.2f}, without clipping by {tried.unclipped:.2f}"
        )
        return [Signal("F68", "counterfactual", says, 0.9, numbers, fix="max_grad_norm: 1.0")]
    better = tried.gains[best] - here > BETTER * most if math.isfinite(here) else True
    if best < 1 and better and tried.gains[best] > LITTLE * most and here < CLEARLY * most:
        expect = f"the loss of one batch falls by {tried.gains[best]:.2f} in {tried.steps} steps"
        return _of_step_size(run_facts, "F67", tried, tried.says(best), expect, numbers)
    if tried.gains[best] < NOTHING * most:
        return []  # no gain at any rate: a fault of gradients, not of capacity
    is_narrow = tried.alike is not None and tried.alike > max(TIMES * here, MUCH * most) and tried.capacity < SMALLEST
    if tried.many is not None and tried.many[1] >= WORTH and tried.many[0] < MUCH * tried.many[1]:
        says = f"{tried.steps} steps on {NUM_MANY} rows lower their loss by {tried.many[0]:.2f}, at the same learning "
        says += f"rate by {tried.many[1]:.2f} with rank 32 on every linear layer"
        fix = "lora_target_modules: all-linear, lora_r: 16"
        return [Signal(code, "counterfactual", says, w, numbers, fix=fix) for code, w in (("F62", 0.75), ("F56", 0.45))]
    if (
        best in (max(tried.gains), min(tried.gains))
        and best != 1.0
        and tried.gains[best] < MUCH * most
        and not is_narrow
    ):
        return []  # the range was not extended far enough to decide
    if (tried.gains[best] < MUCH * most and tried.capacity < SMALL) or is_narrow:
        wide = tried.alike if is_narrow and tried.alike is not None else tried.wide
        says = f"{tried.steps} steps on one batch lower its loss by {here if is_narrow else tried.gains[best]:.2f} at "
        says += "the same" if is_narrow else "the best"
        says += f" learning rate, by {wide:.2f} with rank 32 on every linear layer"
        fix = "lora_target_modules: all-linear, lora_r: 16"
        return [Signal(code, "counterfactual", says, w, numbers, fix=fix) for code, w in (("F62", 0.75), ("F56", 0.45))]
    total = _planned(run_facts)
    longer = max(1.0, HALF * total / tried.steps)
    if best > 1 and here * longer < LITTLE * most and tried.gains[best] > TIMES * max(here, 0.0):
        expect = (
            f"the loss falls {tried.gains[best] / max(here, 0.01):.0f} times as far in the first {tried.steps} steps"
        )
        return _of_step_size(run_facts, "F64", tried, tried.says(best), expect, numbers)
    if here >= MUCH * most:
        says = (
            f"{tried.steps} steps on one batch lower its loss by {here:.2f} at {tried.rate:.2g}, at best by {most:.2f}"
        )
        cleared = ("F64", "F62", "F67") if best > 1 or here >= CLEARLY * most else ("F64", "F62")
        return [Signal(code, "measured", says, 0.8, numbers, against=True) for code in cleared]
    return []


def _of_many_rows(
    live: LiveModel, run_facts: RunFacts, rate: float, steps: int, clip: float | None
) -> tuple[float, float] | None:
    """Gains of the training's own adapters and of extra ones on more rows; None if no batch has so many."""
    parts = (sequences_of(batch, NUM_MANY) for batch in live.batches)
    rows = next((part for part in parts if has_labels(part) and part["input_ids"].shape[0] >= NUM_MANY), None)
    if rows is None:
        return None
    own, wide = _learn(live, run_facts, rows, rate, steps, clip), _learn_wide(live, run_facts, rows, steps, rate)
    return own[0] - _end(own), wide[0] - _end(wide)


def _slow(run_facts: RunFacts, tried: Tried, here: Sequence[float], larger: Sequence[float]) -> list[Signal]:
    """F61 if the scale is unusually small, and steps of ten times the size learn several times sooner, so that all
    steps of the run are worth only a few of those."""
    found, half = scale(run_facts), 0.5 * tried.most
    late, soon = _crossing(here, tried.start - half), _crossing(larger, tried.start - half)
    if not found or found >= NARROW or half < WORTH or soon is None:
        return []
    times = (tried.steps if late is None else late) / soon
    worth = HALF * max(_planned(run_facts), SHORTEST_RUN) / times
    if times < SOONER or worth >= ENOUGH_STEPS:
        return []
    says = f"with the scale {found:.2g} one batch is learned half in {late or tried.steps:.0f} steps, with ten times "
    says += f"the scale in {soon:.0f}: all steps of the run are worth {worth:.0f} of those"
    numbers = {"steps_at_ten_times": soon, "steps": late, "worth": worth, "scale": found}
    fix = f"lora_alpha: {2 * (run_facts.settings.get('lora_r') or 16)}"
    return [Signal("F61", "counterfactual", says, 0.75, numbers, fix=fix)]


def _crossing(curve: Sequence[float], level: float) -> float | None:
    """Steps after which the loss is below this level, between two steps by a straight line."""
    for n in range(1, len(curve)):
        if curve[n] <= level:
            return n - 1 + (curve[n - 1] - level) / max(curve[n - 1] - curve[n], 1e-9)
    return None


def _planned(run_facts: RunFacts) -> int:
    """Optimizer steps of the run, as far as they are known."""
    planned = run_facts.trace.total_steps if run_facts.trace else run_facts.settings.get("max_steps")
    return int(planned) if planned and planned > 0 else USUAL_STEPS


def _of_step_size(
    run_facts: RunFacts, code: str, tried: Tried, says: str, expect: str, numbers: dict[str, Any]
) -> list[Signal]:
    """Signals for the learning rate and for alpha / r, which the evidence cannot tell apart; the unusual one first."""
    r, found = run_facts.settings.get("lora_r"), scale(run_facts)
    is_scale = found is not None and odd_one(run_facts, code) == "F61" and not USUAL_SCALE[0] <= found <= USUAL_SCALE[1]
    of_rate, of_scale = (0.45, 0.8) if is_scale else (0.8, 0.3)
    fixes = {code: f"learning_rate: {tried.best * tried.rate:.2g}", "F61": f"lora_alpha: {2 * (r or 16)}"}
    signals = [
        Signal(one, "counterfactual", says, weight, {**numbers, "scale": found}, fix=fixes[one], expect=expect)
        for one, weight in ((code, of_rate), ("F61", of_scale))
    ]
    return sorted(signals, key=lambda signal: -signal.weight)


def _capacity(model: nn.Module) -> float:
    """Rank of the adapters times the share of the linear layers that have one; infinite without adapters."""
    adapters = adapters_of(model)
    with extra_adapters(model, rank=1) as pairs:
        linears = len(pairs) // 2
    return sum(min(a.A.shape) for a in adapters) / max(linears, 1) if adapters else math.inf


def _learn(
    live: LiveModel, run_facts: RunFacts, batch: dict[str, Any], rate: float, steps: int, clip: float | None
) -> list[float]:
    """Losses before each step and after the last, as the training computes them."""
    with fresh_adapters(live, run_facts):
        return _descend(live, batch, trainable_of(live.model), rate, steps, clip, live)


def _learn_wide(
    live: LiveModel, run_facts: RunFacts, batch: dict[str, Any], steps: int, rate: float = 2e-3
) -> list[float]:
    """Losses with extra adapters of rank 32 on every linear layer, by AdamW, at a rate for these."""
    with fresh_adapters(live, run_facts), extra_adapters(live.model) as parameters:
        return _descend(live, batch, parameters, rate, steps, 1.0, None)


def _descend(
    live: LiveModel,
    batch: dict[str, Any],
    parameters: Sequence[nn.Parameter],
    rate: float,
    steps: int,
    clip: float | None,
    made_by: LiveModel | None,
) -> list[float]:
    live.model.eval()  # no dropout, so that only the rate differs
    if _checkpoints(live.model):
        live.model.train()  # transformers checkpoints only in training mode
    if not parameters:
        return [math.nan]
    optimizer = optimizer_of(live, parameters, rate) if made_by else torch.optim.AdamW(parameters, lr=rate)
    inputs, losses = on_device(live, batch), []
    for _ in range(steps):
        loss = training_loss(live, inputs)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]) or not loss.requires_grad:
            return losses
        if len(losses) > LEAST_STEPS and min(losses[-3:]) > 2 * losses[0] + 1:
            return losses  # diverged: further steps add nothing
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        losses.append(float(training_loss(live, inputs)))
    return losses


def _end(curve: Sequence[float]) -> float:
    """Mean of the last two losses; infinity if they are not finite."""
    last = np.array(curve[-2:], float)
    return float(last.mean()) if np.isfinite(last).all() else math.inf


def _rounded(x: float) -> float | None:
    return round(x, 4) if math.isfinite(x) else None


def _checkpoints(model: nn.Module) -> bool:
    """Some modules use gradient checkpointing, which transformers does only in training mode."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
