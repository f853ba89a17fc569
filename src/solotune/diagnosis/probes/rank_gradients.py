"""P15: compare the gradient that the ranks of a run exchange with the gradient of all their tokens.

    the direction of rank 0's own rows              nothing is exchanged (F79)
    N times, or an N-th, of all tokens' gradient    summed instead of averaged, or divided twice (F80)
    a mean of the ranks' means                      tokens of short rows count more (F80)

Each rank gets one row (in each of its micro-batches), and the rows have as unequal numbers of labels as there are. Each
tensor is judged for itself, since some programs exchange only a part. With as many micro-batches as ranks, a factor N
may also come from the accumulation (F74): it is left to P9. Costs at least 2 N passes over one row for N ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import setting, world_size
from solotune.diagnosis.probes.grad_accumulation import SAME, gap, gradient_of, weighted_gradient
from solotune.diagnosis.probes.probed_model import (
    has_labels,
    on_device,
    restore_model_state,
    sequences_of,
    trainable_of,
)
from solotune.diagnosis.probes.skipped import Skipped
from solotune.diagnosis.run_facts import LiveModel, RunFacts

MOST_RANKS = 16
MOST_MICRO_BATCHES = 16
ALONG = 0.03
"""Sine of the angle between two gradients of one direction."""
_FIX = "divide by the loss tokens of all ranks, and multiply by the number of ranks if gradients are averaged"
_FIX_EXCHANGE = "call the wrapped model in every forward, and average the gradients of all tensors over the ranks"


def exchanged_against_whole(live: LiveModel, run_facts: RunFacts, budget: float) -> tuple[list[Signal], dict[str, Any]]:
    """P15."""
    if live.backward_of_ranks is None:
        raise Skipped("how the ranks exchange gradients is not known")
    count = max(2, world_size(run_facts))
    accumulated = max(1, int(setting(run_facts, "gradient_accumulation_steps") or 1))
    if accumulated > MOST_MICRO_BATCHES:
        raise Skipped(f"a step has {accumulated} micro-batches on each rank")
    batches = _unequal(live, count)
    labels = [_num_labels(batch) for batch in batches]
    with restore_model_state(live) as model:
        model.eval()
        parameters = trainable_of(model)
        if not parameters:
            raise Skipped("no parameter is trainable")
        live.backward_of_ranks(model, [[batch] * accumulated for batch in batches])
        theirs = gradient_of(parameters)
        alone = [weighted_gradient(live, [batch], parameters, [1.0]) for batch in batches]
    by_tokens = sum((g * (n / sum(labels)) for g, n in zip(alone, labels, strict=True)), torch.zeros_like(theirs))
    by_means = torch.stack(alone).mean(0)
    if not theirs.any() or not by_tokens.any():
        raise Skipped("there is no gradient")
    found = {
        "ranks": count,
        "micro_batches": accumulated,
        "labels": labels,
        "norm_ratio": float(theirs.norm() / by_tokens.norm()),
        "from_tokens": gap(theirs, by_tokens),
        "from_means": gap(theirs, by_means),
        "unexchanged": _unexchanged(parameters, theirs, alone[0], (by_tokens, by_means)),
        "tensors": len(parameters),
    }
    signals = _signals(found, theirs, (by_tokens, by_means))
    if run_facts.ranks is not None and (run_facts.ranks.adapters or run_facts.ranks.logs):
        signals = [s for s in signals if s.code != "F79" or not s.against]  # adapters also differ if they start so
    return signals, found


def _unequal(live: LiveModel, count: int) -> list[Any]:
    """One row for each rank, from the fewest to the most labels."""
    if count > MOST_RANKS:
        raise Skipped(f"it compares at most {MOST_RANKS} ranks, and the run has {count}")
    ones = (sequences_of(batch, 1) for batch in live.batches)
    batches = sorted((on_device(live, one) for one in ones if has_labels(one)), key=_num_labels)
    if len(batches) < count:
        raise Skipped(f"{len(batches)} batches have labels, and the run has {count} ranks")
    return [batches[round(i * (len(batches) - 1) / (count - 1))] for i in range(count)]


def _num_labels(batch: Any) -> int:
    return int((batch["labels"][..., 1:] != -100).sum()) if "labels" in batch else 1


def _unexchanged(
    parameters: list[nn.Parameter], theirs: torch.Tensor, own: torch.Tensor, whole: tuple[torch.Tensor, ...]
) -> int:
    """Tensors whose gradient has the direction of rank 0's own rows, and not of all rows."""
    sizes = [parameter.numel() for parameter in parameters]
    parts = [gradient.split(sizes) for gradient in (theirs, own, *whole)]
    count = 0
    for mine, alone, *others in zip(*parts, strict=True):
        if mine.any() and alone.any() and _angle(mine, alone) < ALONG:
            count += min(_angle(mine, other) for other in others) > ALONG
    return count


def _angle(one: torch.Tensor, other: torch.Tensor) -> float:
    """The sine of the angle between two gradients; 1 at more than a right angle."""
    cosine = float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0))
    return (1 - min(cosine, 1.0) ** 2) ** 0.5 if cosine > 0 else 1.0


def _signals(found: dict[str, Any], theirs: torch.Tensor, whole: tuple[torch.Tensor, ...]) -> list[Signal]:
    count, num_alone = found["ranks"], found["unexchanged"]
    if num_alone:
        says = f"the gradient of {num_alone} of {found['tensors']} tensors is that of rank 0's own rows: it is not "
        says += f"averaged over the {count} ranks"
        return [Signal("F79", "invariant", says, 0.9, found, fix=_FIX_EXCHANGE)]
    exchanged = Signal("F79", "measured", "the ranks exchange all gradients", 0.9, found, against=True)
    for factor, why in ((count, "they are summed"), (1 / count, "the loss is divided by the number of ranks twice")):
        if count != found["micro_batches"] and min(gap(theirs / factor, one) for one in whole) < SAME:
            says = f"the gradient of {count} ranks is {found['norm_ratio']:.2g} times that of all their tokens: {why}"
            return [Signal("F80", "invariant", says, 0.9, found, fix=_FIX), exchanged]
    far = found["from_tokens"]
    if far <= SAME:
        says = f"the gradient of {count} ranks equals that of all their tokens (difference {far:.1%})"
        return [Signal("F80", "measured", says, 0.9, found, against=True), exchanged]
    if found["from_means"] < 0.2 * far:
        says = f"the gradient of {count} ranks is a mean of their means (difference {found['from_means']:.1%}), and "
        says += f"{far:.0%} away from that of all their tokens ({', '.join(map(str, found['labels']))} labels)"
        return [Signal("F80", "measured", says, min(0.85, 0.5 + 0.5 * far), found, fix=_FIX), exchanged]
    return []
