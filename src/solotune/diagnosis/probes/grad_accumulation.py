"""P9: compare the gradient that the training accumulates over micro-batches with the gradient of all their tokens.

    norm ratio near the number of micro-batches     the losses are not divided (F74)
    direction differs from the mean over tokens     a mean of means: short rows weigh more (F74)

Adam hides the first, since a constant factor cancels; it shows in the logged loss and the gradient norm. Costs three
forward and backward passes over about two rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.probes.probed_model import (
    has_labels,
    on_device,
    restore_model_state,
    sequences_of,
    trainable_of,
    training_loss,
)
from solotune.diagnosis.probes.skipped import Skipped
from solotune.diagnosis.run_facts import LiveModel, RunFacts

SAME = 0.05  # relative difference of gradients: rounding, or a few differing weights, stay below


def accumulated_against_whole(
    live: LiveModel, run_facts: RunFacts, budget: float
) -> tuple[list[Signal], dict[str, Any]]:
    """P9."""
    if live.backward is None:
        raise Skipped("how the training accumulates gradients is not known")
    count = int(run_facts.settings.get("gradient_accumulation_steps") or 2)
    count = max(2, min(count, 4))
    ones = (sequences_of(batch, 1) for batch in live.batches)
    batches = [on_device(live, one) for one in ones if has_labels(one)][:count]
    if len(batches) < 2:
        raise Skipped("fewer than two batches have labels")
    labels = [int((b["labels"][..., 1:] != -100).sum()) for b in batches if "labels" in b]
    with restore_model_state(live) as model:
        model.eval()
        parameters = trainable_of(model)
        if not parameters:
            raise Skipped("no parameter is trainable")
        live.backward(model, batches)
        theirs = gradient_of(parameters)
        by_tokens = weighted_gradient(live, batches, parameters, [n / sum(labels) for n in labels])
        by_means = weighted_gradient(live, batches, parameters, [1 / len(batches)] * len(batches))
    if not theirs.any() or not by_tokens.any():
        raise Skipped("there is no gradient")
    ratio = float(theirs.norm() / by_tokens.norm())
    cosine = float(torch.nn.functional.cosine_similarity(theirs, by_tokens, dim=0))
    found = {
        "micro_batches": len(batches),
        "labels": labels,
        "norm_ratio": ratio,
        "cosine": cosine,
        "from_tokens": gap(theirs, by_tokens),
        "from_means": gap(theirs, by_means),
    }
    fix = "divide by the labels of the whole step (num_items_in_batch)"
    divided = theirs / len(batches)
    found["divided_from_either"] = min(gap(divided, by_means), gap(divided, by_tokens))
    if found["divided_from_either"] < SAME:
        says = f"the gradient accumulated over {len(batches)} batches is {ratio:.2f} times that of all their tokens"
        return [Signal("F74", "invariant", says, 0.9, found, fix=fix)], found
    if found["from_tokens"] > SAME and found["from_means"] < 0.2 * found["from_tokens"]:
        says = (
            f"the accumulated gradient is a mean of {len(batches)} batch means (difference {found['from_means']:.1%}) "
        )
        says += f"and {found['from_tokens']:.0%} away from the mean over tokens ({', '.join(map(str, labels))} labels)"
        weight = min(0.85, 0.5 + 0.5 * found["from_tokens"])
        return [Signal("F74", "measured", says, weight, found, fix=fix)], found
    if found["from_tokens"] <= SAME:
        says = f"the accumulated gradient equals the gradient of all tokens (difference {found['from_tokens']:.1%})"
        return [Signal("F74", "measured", says, 0.9, found, against=True)], found
    return [], found


def weighted_gradient(
    live: LiveModel, batches: Sequence[Mapping[str, Any]], parameters: Sequence[nn.Parameter], weights: Sequence[float]
) -> torch.Tensor:
    for p in parameters:
        p.grad = None
    for batch, weight in zip(batches, weights, strict=True):
        (training_loss(live, batch) * weight).backward()
    return gradient_of(parameters)


def gradient_of(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).detach().float().flatten() for p in parameters]
    )


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())
