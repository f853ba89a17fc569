"""P12: load the saved adapter into the model: check that it fits, changes the output, and equals the merged model.

    keys match no adapter of this model, or many are missing                F78
    B is zero in every layer after training                                 F75
    merged model differs from base and adapter by more than rounding        F76

Costs three forward passes on one small batch.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.probes.adapter_gradients import _small
from solotune.diagnosis.probes.probed_model import adapters_of, adapters_off, logits_of, restore_model_state
from solotune.diagnosis.probes.skipped import Skipped
from solotune.diagnosis.run_facts import LiveModel, RunFacts, Saved

LOST, MOST_LOST = 0.04, 0.34  # of the adapter's effect on the distribution; a merge in 16 bits loses under 0.01
WORTH = 0.01  # nats a token
_ROOT = "base_model.model."
_KEY = re.compile(r"^(?:base_model\.)?(?:model\.)?(.*?)\.?lora_(?:embedding_)?([AB])(?:\.|$)")


def reloaded(live: LiveModel, run_facts: RunFacts, budget: float) -> tuple[list[Signal], dict[str, Any]]:
    """P12."""
    saved = run_facts.saved
    adapters = adapters_of(live.model)
    if saved is None:
        raise Skipped("no adapter was saved")
    if not adapters:
        raise Skipped("the model has no adapter")
    batch = _small(live)
    with restore_model_state(live), torch.no_grad():
        live.model.eval()
        with adapters_off(live.model):
            off = logits_of(live.model, batch).float().log_softmax(-1)
        fitted, strange = _put_in(live.model, saved)
        on = logits_of(live.model, batch).float().log_softmax(-1)
        does = _divergence(on, off)
        B = [tensor for name, tensor in saved.adapter.items() if (k := _KEY.match(name)) and k[2] == "B"]
        found: dict[str, Any] = {
            "tensors": len(saved.adapter),
            "fitted": fitted,
            "of": 2 * len(adapters),
            "strange": strange[:5],
            "named_as_peft": all(name.startswith(_ROOT) for name in saved.adapter),
            "B_zero": sum(not b.any() for b in B),
            "B": len(B),
            "does": does,
        }
        signals = _file(found, strange, len(B), does)
        if saved.merged is not None and does > 1e-6:
            merged = saved.merged().to(next(live.model.parameters()).device).eval()
            found["merged_differs"] = _divergence(logits_of(merged, batch).float().log_softmax(-1), on)
            signals += _merged(found, does)
    return signals, found


def _file(found: dict[str, Any], strange: list[str], num_B: int, does: float) -> list[Signal]:
    if strange and found["fitted"] < 0.5 * found["of"]:
        says = f"{len(strange)} of the {found['tensors']} saved tensors match no adapter of this model ({strange[0]})"
        return [
            Signal("F78", "invariant", says, 0.9, found, fix="load it strictly, on the base that it was trained on")
        ]
    if not found["tensors"] or (num_B and found["B_zero"] == num_B):
        what = "no tensor" if not found["tensors"] else f"B is zero in all {num_B} adapters"
        says = "the saved adapter has no tensors: it changes nothing" if not found["tensors"] else what + " on disk"
        return [Signal("F75", "invariant", says, 0.9, found, fix="save after training")]
    if found["fitted"] == found["of"] and does > 1e-6:
        says = f"the saved adapter fits, and changes the output distribution by {does:.3g} nats a token"
        cleared = (
            ("F75", "F78") if found["named_as_peft"] else ("F75",)
        )  # names are matched more freely here than by PEFT
        return [Signal(code, "measured", says, 0.8, found, against=True) for code in cleared]
    return []


def _merged(found: dict[str, Any], does: float) -> list[Signal]:
    differs = found["merged_differs"]
    says = f"the merged model differs from base + adapter by {differs:.3g} nats a token; the adapter changes {does:.3g}"
    if differs > max(LOST * does, WORTH):
        fix = "merge into the 16-bit base that the adapter was trained on, and do not quantize afterwards"
        kind, weight = ("invariant", 0.9) if differs > MOST_LOST * does else ("measured", 0.75)
        return [Signal("F76", kind, says, weight, found, fix=fix)]
    return [Signal("F76", "measured", says, 0.8, found, against=True)]


def _put_in(model: nn.Module, saved: Saved) -> tuple[int, list[str]]:
    """Copy the saved tensors into the model's adapters; return how many fitted and the names of the others."""
    places = {}
    for adapter in adapters_of(model):
        for part in ("A", "B"):
            places[(_layer(adapter.name), part)] = getattr(adapter, part)
    strange, fitted = [], 0
    for name, tensor in saved.adapter.items():
        key = _KEY.match(name)
        place = places.get((_layer(key[1]), key[2])) if key else None
        if key and place is not None and place.shape == tensor.shape:
            place.data.copy_(tensor)
            fitted += 1
        elif key:
            strange.append(name)
    return fitted, strange


def _layer(name: str) -> str:
    """A layer's name without the prefixes of framework wrappers."""
    return re.sub(r"^(base_model\.)?(model\.)*", "", name)


def _divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """KL(p, q), nats a token."""
    return float((p.exp() * (p - q)).sum(-1).mean())
