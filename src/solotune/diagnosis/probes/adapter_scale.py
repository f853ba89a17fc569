"""The factor by which the model really multiplies B A x, module by module, against alpha / r of the settings (F61).

A module is called on a random input with its adapter on and off. The difference is a multiple of B A x, whatever class
adds it; where it is not (DoRA, another input), the module is left out. Costs no pass of the model.
"""

from __future__ import annotations

import numpy as np
import torch

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import is_ours, scale, setting
from solotune.diagnosis.probes.probed_model import adapters_of, adapters_off, device_of, restore_model_state
from solotune.diagnosis.run_facts import LiveModel, RunFacts

NUM_MODULES, NUM_INPUTS = 8, 4
SAME, IS_MULTIPLE = 0.02, 0.02
"""Relative: scales that are equal, and what a difference of outputs may have beside a multiple of B A x."""


def scale_of_modules(live: LiveModel) -> list[float]:
    """The factors of some modules in model order."""
    adapters = [a for a in adapters_of(live.model) if a.A.dim() == a.B.dim() == 2 and a.A.is_floating_point()]
    found, device = [], device_of(live.model)
    with restore_model_state(live), torch.no_grad():
        live.model.eval()
        for adapter in adapters[:: max(1, len(adapters) // NUM_MODULES)]:
            adapter.B.normal_(std=0.5)
            module = live.model.get_submodule(adapter.name)
            inputs = torch.randn(NUM_INPUTS, adapter.A.shape[1], device=device, dtype=adapter.A.dtype)
            try:
                on = module(inputs)
                with adapters_off(module):
                    off = module(inputs)
            except (RuntimeError, TypeError, ValueError, IndexError):  # it takes something else
                continue
            if not isinstance(on, torch.Tensor) or not isinstance(off, torch.Tensor):
                continue
            added = (on - off).float()
            product = inputs.float() @ adapter.A.float().T @ adapter.B.float().T
            if added.shape != product.shape or not float(product.square().sum()):
                continue
            factor = float((added * product).sum() / product.square().sum())
            rest = float((added - factor * product).norm())
            if np.isfinite(factor) and rest <= IS_MULTIPLE * float((abs(factor) * product).norm()) + 1e-5:
                found.append(factor)
    return found


def other_scale(live: LiveModel, run_facts: RunFacts) -> list[Signal]:
    """F61 if every module multiplies by another factor than the settings give."""
    expected, rank = scale(run_facts), setting(run_facts, "lora_r")
    patterns = run_facts.saved.adapter_config if run_facts.saved else {}
    has_patterns = any((patterns.get(key) or run_facts.settings.get(key)) for key in ("alpha_pattern", "rank_pattern"))
    if live.is_rebuilt or is_ours(run_facts) or not expected or not rank or has_patterns:
        return []
    factors = scale_of_modules(live)
    allowed = [expected, expected * rank**0.5]  # rsLoRA, which the settings need not name
    if not factors or any(abs(factor / one - 1) < SAME for factor in factors for one in allowed):
        return []
    factor = float(np.median(factors))
    says = f"the model multiplies the adapters by {factor:.3g}, and the settings give alpha / r = {expected:.3g}"
    numbers = {"factor": factor, "expected": expected, "modules": len(factors)}
    return [Signal("F61", "invariant", says, 0.9, numbers, fix="scale the adapters by lora_alpha / lora_r")]
