"""P8: run the evaluation of the training twice. Without dropout and noise both are equal to the last bit.

If they differ, it runs twice again with the model forced into evaluation mode. Costs two evaluations, or four.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.probes.probed_model import adapters_of, device_of, is_untouched, restore_model_state
from solotune.diagnosis.probes.saved_adapter import _put_in
from solotune.diagnosis.probes.skipped import Skipped
from solotune.diagnosis.run_facts import LiveModel, RunFacts

EQUAL, EQUAL_ON_CPU = 1e-3, 1e-6  # relative: nondeterministic GPU kernels differ by less
SMALL_B = 0.02  # standard deviation


def evaluated_twice(live: LiveModel, run_facts: RunFacts, budget: float) -> tuple[list[Signal], dict[str, Any]]:
    """P8."""
    if live.evaluate is None:
        raise Skipped("the evaluation function of the training is not known")
    with restore_model_state(live):
        _fill(live, run_facts)
        started = time.perf_counter()
        first = float(live.evaluate(live.model))
        if (seconds := time.perf_counter() - started) > budget:
            raise Skipped(f"one evaluation takes {seconds:.0f} s, which is longer than the budget")
        second = float(live.evaluate(live.model))
        found: dict[str, Any] = {"first": first, "second": second}
        gap = abs(first - second) / max(abs(first), 1e-9)
        equal = EQUAL_ON_CPU if device_of(live.model).type == "cpu" else EQUAL
        if not gap > equal:  # both NaN: another fault
            says = f"two evaluations agree: {first:.6g} and {second:.6g}"
            return [Signal("F45", "measured", says, 0.9, found, against=True)], found
        handles = [m.register_forward_pre_hook(_evaluation_mode) for m in live.model.modules()]
        try:
            pair = [float(live.evaluate(live.model)) for _ in range(2)]
        finally:
            for handle in handles:
                handle.remove()
    found["held_in_evaluation_mode"] = pair
    says = f"two evaluations of the same rows differ: {first:.4f} and {second:.4f}"
    signals = [Signal("F45", "measured", says, 0.8, found, fix="model.eval() before evaluating")]
    if abs(pair[0] - pair[1]) <= equal * abs(pair[0]):
        says += f"; in forced evaluation mode both are {pair[0]:.4f}"
        signals.append(Signal("F45", "counterfactual", says, 0.95, found, fix="model.eval() before evaluating"))
    return signals, found


@torch.no_grad()
def _fill(live: LiveModel, run_facts: RunFacts) -> None:
    """Load the saved adapter, else draw a small B: with B = 0, dropout before A changes nothing."""
    if is_untouched(live.model) and run_facts.saved is not None:
        _put_in(live.model, run_facts.saved)
    if is_untouched(live.model):
        for adapter in adapters_of(live.model):
            adapter.B.normal_(std=SMALL_B)


def _evaluation_mode(module: nn.Module, inputs: Any) -> None:
    module.training = False
