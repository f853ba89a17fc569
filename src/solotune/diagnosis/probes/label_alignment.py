"""Which token a loss expects as the label of a position: measured on the loss itself, for P1.

One label after the other is replaced, and the loss changes with it. The change shows at which position the loss reads
the logits for this label:

    loss(label v at t) - loss(label u at t)  =  a x (log p[t - s](u) - log p[t - s](v))      s = 0, 1 or 2

The logits of a position are for the token after it, so the label at t has to be token t - s + 1: the token at its own
position if the loss shifts once (s = 1, as transformers' models do), the token after it if the loss does not shift
(s = 0), the token before it if it shifts twice (s = 2). Weights, label smoothing and any way to average only change a.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.labels import LabelFacts
from solotune.diagnosis.facts.texts import Document
from solotune.diagnosis.probes.probed_model import logits_of, on_device, sequences_of, training_loss
from solotune.diagnosis.run_facts import LiveModel

UNLIKE = 1.5
"""Ratio of losses that clean runs do not show."""
FEW = 0.05
"""Labels that are another token, such as a constant in place of the mask (F20)."""
NUM_CHANGED = 5
SHIFTS = (0, 1, 2)  # s
FITS, DIFFERS = 0.01, 0.04
"""Remainder of the changes, relative to their size, of the loss's own s (0.00001) and of any other (0.1)."""


@torch.no_grad()
def expected_shift(live: LiveModel, documents: Sequence[Document]) -> int | None:
    """k if the loss expects token t + k as the label of position t; None if it does not follow the labels."""
    chosen = next((d for d in documents if d.learned[len(SHIFTS) :].sum() >= NUM_CHANGED), None)
    if chosen is None:
        return None
    batch = live.batches[chosen.batch]
    size = batch["input_ids"].shape[0]
    rest = {k: v[chosen.sequence :] if v.dim() and v.shape[0] == size else v for k, v in batch.items()}
    row = sequences_of(rest, 1)
    if row["input_ids"].shape[0] != 1 or "labels" not in row:
        return None
    inputs = {key: row[key] for key in ("input_ids", "attention_mask", "position_ids") if key in row}
    chances_TV = logits_of(live.model, on_device(live, inputs))[0].float().log_softmax(-1).cpu()
    places = np.flatnonzero(chosen.learned[len(SHIFTS) :]) + len(SHIFTS) + chosen.start
    return _fitting(live, row, chances_TV, places[:: len(places) // NUM_CHANGED][:NUM_CHANGED].tolist())


def misplaced(facts: LabelFacts, found: dict[str, Any]) -> list[Signal]:
    """F22 if the labels are not the tokens that the loss expects, by what P1 found.

    Where the loss does not follow the labels one by one, the loss of the correct ones decides.
    """
    expected, shift = found.get("expected_shift"), facts.shift or 0
    is_known = facts.shift is not None or facts.unlike < FEW * facts.labels
    if expected is not None and is_known and expected == shift:
        if not shift:
            return []
        says = f"the label of a position is {_token_at(shift)}, and the loss expects this one: it shifts nothing itself"
        return [Signal("F22", "measured", says, 0.95, {"labels": shift, "loss": expected}, against=True)]
    signals = []
    if expected is not None and is_known:
        says = f"the label of a position is {_token_at(shift)}, and the loss expects {_token_at(expected)}"
        signals.append(Signal("F22", "invariant", says, 0.95, {"labels": shift, "loss": expected}, fix=_fix(expected)))
    if facts.shift is not None and "as_trained" in found:
        numbers = {"as_trained": found["as_trained"], "labels_right": found["labels_right"]}
        if numbers["as_trained"] >= UNLIKE * max(numbers["labels_right"], 1e-6):
            says = f"with correct labels the first loss falls from {numbers['as_trained']:.2f} to "
            says += f"{numbers['labels_right']:.2f}"
            signals.append(Signal("F22", "counterfactual", says, 0.95, numbers))
    return signals


def _token_at(shift: int) -> str:
    """The token of a label, in words."""
    return f"the token {abs(shift)} {'after' if shift > 0 else 'before'} it" if shift else "its own token"


def _fix(expected: int) -> str:
    if not expected:
        return "labels = input_ids, with -100 where masked; do not shift them yourself"
    return "compare the logits of each position with the token after it: shift once, in the loss or in the labels"


def _fitting(
    live: LiveModel, row: dict[str, torch.Tensor], chances_TV: torch.Tensor, places: Sequence[int]
) -> int | None:
    generator = torch.Generator().manual_seed(0)
    first = float(training_loss(live, row))
    changes, explained = [], []
    for t in places:
        old, labels = int(row["labels"][0, t]), row["labels"].clone()
        new = int(torch.randint(chances_TV.shape[1], (1,), generator=generator))
        labels[0, t] = new
        changes.append(float(training_loss(live, {**row, "labels": labels})) - first)
        explained.append([float(chances_TV[t - s, old] - chances_TV[t - s, new]) for s in SHIFTS])
    seen, by_shift = np.array(changes), np.array(explained).T
    if not np.isfinite(seen).all() or not np.isfinite(by_shift).all() or not np.linalg.norm(seen):
        return None
    left = {}
    for s, x in zip(SHIFTS, by_shift, strict=True):
        factor = max(float(x @ seen) / max(float(x @ x), 1e-12), 0.0)
        left[s] = float(np.linalg.norm(seen - factor * x) / np.linalg.norm(seen))
    best, second, *_ = sorted(SHIFTS, key=lambda s: left[s])
    return 1 - best if left[best] < FITS and left[second] > DIFFERS else None
