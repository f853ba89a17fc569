"""P2 and P3: compare the logits of a text in its batch, padded (P2) or packed (P3), with its logits alone.

Each document runs alone, from position 0, and the log-probabilities of its tokens are compared with those in the batch.
If they differ, the batch is fixed one thing at a time (mask, then positions); the change that brings the difference to
zero names the fault. Always with `use_cache=False`: with a cache, transformers does not detect packed documents, and
every batch would differ. Costs two forward passes, and two more if a difference is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.texts import Batches, Document
from solotune.diagnosis.probes.probed_model import Batch, logits_of, on_device, restore_model_state
from solotune.diagnosis.probes.skipped import Skipped
from solotune.diagnosis.run_facts import LiveModel, RunFacts

EQUAL, EQUAL_FLOAT32 = 2e-2, 2e-3  # nats, mean over tokens: rounding stays below; float32 showed 1e-6
MOST_TOKENS = 4096


def padded_against_alone(live: LiveModel, run_facts: RunFacts, budget: float) -> tuple[list[Signal], dict[str, Any]]:
    """P2."""
    batch, documents = _chosen(live, run_facts, packed=False)
    with restore_model_state(live), torch.no_grad():
        live.model.eval()
        alone = _alone(live, documents)
        here = _difference(live, batch, documents, alone)
        found: dict[str, Any] = {"difference": here}
        equal = _equal(live)
        if here < equal:
            return _no_harm(
                ("F27", "F28"), f"padded rows have the same logits as alone (difference {here:.1g} nats)", found
            )
        mask = _real(batch, documents)
        given = dict(batch)
        found["with_mask"] = _difference(live, {**given, "attention_mask": mask}, documents, alone)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        fixed = {**given, "attention_mask": mask, "position_ids": positions}
        found["with_mask_and_positions"] = _difference(live, fixed, documents, alone)
    if found["with_mask"] < equal or (found["with_mask"] < 0.5 * here and "attention_mask" not in batch):
        code, what, fix = "F28", "with an attention_mask from the lengths", "pass attention_mask, 0 at padding"
        after = min(found["with_mask"], found["with_mask_and_positions"])
    elif found["with_mask_and_positions"] < equal:
        after, code, what = found["with_mask_and_positions"], "F27", "with positions counted from the first real token"
        fix = "padding_side: right, or position_ids = attention_mask.cumsum(-1) - 1"
    else:
        return [], found
    says = f"log-probabilities of rows in a batch and alone differ by {here:.2g} nats a token, {what} by {after:.1g}"
    return [Signal(code, "counterfactual", says, 0.95, found, fix=fix)], found


def packed_against_alone(live: LiveModel, run_facts: RunFacts, budget: float) -> tuple[list[Signal], dict[str, Any]]:
    """P3."""
    batch, documents = _chosen(live, run_facts, packed=True)
    later = [d for d in documents if d.start > 0]
    with restore_model_state(live), torch.no_grad():
        live.model.eval()
        alone = _alone(live, later)
        here = _difference(live, batch, later, alone)
        found: dict[str, Any] = {"difference": here}
        equal = _equal(live)
        if here < equal:
            return _no_harm(("F31",), f"packed rows have the same logits as alone (difference {here:.1g} nats)", found)
        positions = _restarting(batch, documents)
        with_positions = {**batch, "position_ids": positions}
        if _is_blocked(batch):
            found["with_positions"] = _difference(live, with_positions, later, alone)
            code, after, fix = "F32", found["with_positions"], "restart position_ids with each document"
            what = "with positions that restart"
        else:
            apart = {key: value for key, value in with_positions.items() if key != "attention_mask"}
            found["apart"] = _difference(live, apart, later, alone)
            code, after, what = "F31", found["apart"], "separated by restarting positions"
            fix = "position_ids that restart with each document, without attention_mask, use_cache=False"
            if after >= equal:  # the model does not separate documents by positions: use a block mask
                apart = {**apart, "attention_mask": _blocks(batch, documents, live)}
                after = found["apart_by_mask"] = _difference(live, apart, later, alone)
    if after > max(equal, 0.2 * here):
        return [], found
    says = f"log-probabilities of rows in a pack and alone differ by {here:.2g} nats a token, {what} by {after:.1g}"
    return [Signal(code, "counterfactual", says, 0.95, found, fix=fix)], found


def _equal(live: LiveModel) -> float:
    is_whole = all(p.dtype == torch.float32 for p in live.model.parameters() if p.is_floating_point())
    return EQUAL_FLOAT32 if is_whole else EQUAL


def _chosen(live: LiveModel, run_facts: RunFacts, packed: bool) -> tuple[dict[str, Any], list[Document]]:
    """The first batch that is padded (or packed), and its documents."""
    for batch in live.batches:
        view = Batches.of(run_facts, [batch])
        suits = view.is_packed if packed else (view.is_padded and not view.is_packed)
        if suits and batch["input_ids"].numel() <= MOST_TOKENS:
            return on_device(live, batch), [d for d in view.documents if len(d.ids) > 1]
    raise Skipped(f"no batch is {'packed' if packed else 'padded'}")


def _no_harm(codes: Sequence[str], says: str, found: dict[str, Any]) -> tuple[list[Signal], dict[str, Any]]:
    return [Signal(code, "measured", says, 0.9, found, against=True) for code in codes], found


def _alone(live: LiveModel, documents: Sequence[Document]) -> list[torch.Tensor]:
    """Log-probability of each token but the first, for each document alone."""
    device = next(live.model.parameters()).device
    found = []
    for document in documents:
        ids_T = torch.as_tensor(document.ids, device=device)
        inputs = {"input_ids": ids_T[None], "attention_mask": torch.ones_like(ids_T)[None]}
        found.append(_log_probabilities(logits_of(live.model, inputs)[0], ids_T))
    return found


def _log_probabilities(logits_TV: torch.Tensor, ids_T: torch.Tensor) -> torch.Tensor:
    return -torch.nn.functional.cross_entropy(logits_TV[:-1].float(), ids_T[1:], reduction="none")


def _difference(live: LiveModel, batch: Batch, documents: Sequence[Document], alone: Sequence[torch.Tensor]) -> float:
    """Mean absolute difference over the tokens of all documents, in nats."""
    logits_BTV = logits_of(live.model, batch)
    gaps = []
    for document, expected in zip(documents, alone, strict=True):
        places = slice(document.start, document.end)
        ids_T = batch["input_ids"][document.sequence, places]
        gaps.append((_log_probabilities(logits_BTV[document.sequence, places], ids_T) - expected).abs())
    return float(torch.cat(gaps).mean())


def _real(batch: Batch, documents: Sequence[Document]) -> torch.Tensor:
    mask = torch.zeros_like(batch["input_ids"])
    for document in documents:
        mask[document.sequence, document.start : document.end] = 1
    return mask


def _restarting(batch: Batch, documents: Sequence[Document]) -> torch.Tensor:
    positions = torch.zeros_like(batch["input_ids"])
    for d in documents:
        positions[d.sequence, d.start : d.end] = torch.arange(d.end - d.start, device=positions.device)
    return positions


def _is_blocked(batch: Batch) -> bool:
    mask = batch.get("attention_mask")
    return mask is not None and (mask.dim() == 4 or int(mask.max()) > 1)


def _blocks(batch: Batch, documents: Sequence[Document], live: LiveModel) -> torch.Tensor:
    """Additive mask (B, 1, T, T): each token attends to its own document, up to itself."""
    ids_BT = batch["input_ids"]
    number_BT = torch.full_like(ids_BT, -1)
    for number, d in enumerate(documents):
        number_BT[d.sequence, d.start : d.end] = number
    length = ids_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=ids_BT.device).tril()
    allowed = (number_BT[:, :, None] == number_BT[:, None]) & causal_TT
    dtype = next(p.dtype for p in live.model.parameters() if p.is_floating_point())
    return torch.zeros(allowed.shape, dtype=dtype, device=ids_BT.device).masked_fill(~allowed, torch.finfo(dtype).min)[
        :, None
    ]
