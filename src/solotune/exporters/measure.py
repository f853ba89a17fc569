"""How near a model is to the one that was trained, over the same rows, without both in memory.

    trained = predictions(model, rows)                 hidden states of the predicted tokens; a few MB
    ... the weights are swapped, or another model is loaded ...
    fit = compare(trained, predictions(model, rows), rows, head, head)

An output head gives logits from hidden states, chunk by chunk, so nothing of the size of all logits is kept.

Shape legend: N predicted tokens of all rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from solotune.dataset import Example
from solotune.dataset.collate import collate
from solotune.evaluation.scores import ratio_and_stderr
from solotune.exporters.log_prob_error import LogProbError
from solotune.model.loss import Head
from solotune.runtime import signals

BATCH = 4  # rows
CHUNK_LOGITS = 1 << 25  # logits compared at a time; in float64, a few copies of 256 MiB


@dataclass(frozen=True)
class Fit:
    """A model against the trained one, on tokens that the rows are trained on. Losses are those of the model itself."""

    mean_kl: float
    max_kl: float
    top1_agreement: float
    max_logprob_diff: float
    positions: int
    loss: float
    stderr: float
    exact_match: float
    rows: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def predictions(module: PreTrainedModel, rows: Sequence[Example]) -> torch.Tensor:
    """Last hidden states that predict the rows' labels, (N, D), in row order, on the CPU."""
    was_training, device = module.training, next(module.parameters()).device
    module.eval()
    found = []
    for at in range(0, len(rows), BATCH):
        batch = collate(rows[at : at + BATCH], device)
        hidden = module.base_model(input_ids=batch.input_ids_BT, use_cache=False).last_hidden_state
        found.append(hidden.flatten(0, 1).index_select(0, batch.label_positions_N - 1).cpu())
        signals.check_stop()
    module.train(was_training)
    return torch.cat(found)


@torch.no_grad()
def compare(
    trained_ND: torch.Tensor,
    other_ND: torch.Tensor,
    rows: Sequence[Example],
    trained_head: Head,
    other_head: Head,
    device: torch.device,
) -> Fit:
    """Compare the predictions of two models for the labels of `rows`."""
    labels_N = torch.cat([torch.from_numpy(row.input_ids[1:][row.loss_mask[1:]]).long() for row in rows]).to(device)
    error, losses, correct = LogProbError(), [], []
    vocab = trained_head(trained_ND[:1].to(device)).shape[-1]
    for part in torch.arange(len(labels_N)).split(max(1, CHUNK_LOGITS // vocab)):
        given, mine = (head(h[part].to(device)) for head, h in ((trained_head, trained_ND), (other_head, other_ND)))
        mine = mine[:, :vocab]  # a loader may have padded the embedding
        error.add(given, mine)
        losses.append(F.cross_entropy(mine.float(), labels_N[part.to(device)], reduction="none").cpu())
        correct.append((mine.argmax(-1) == labels_N[part.to(device)]).cpu())
    loss, stderr, exact = _scores(torch.cat(losses), torch.cat(correct), rows)
    return Fit(
        error.mean_kl, error.max_kl, error.top1_agreement, error.max_logprob_diff, error.positions,
        loss, stderr, exact, len(rows),
    )  # fmt: skip


def _scores(losses_N: torch.Tensor, correct_N: torch.Tensor, rows: Sequence[Example]) -> tuple[float, float, float]:
    """Loss by weight with its standard error, and the share of rows whose every label is the most likely token."""
    sizes = [int(row.loss_mask[1:].sum()) for row in rows]
    sums = []
    for row, losses in zip(rows, losses_N.double().split(sizes), strict=True):
        if row.weights is not None:
            losses = losses * torch.from_numpy(row.weights[1:][row.loss_mask[1:]]).double()
        sums.append(float(losses.sum()))
    loss, stderr = ratio_and_stderr(sums, [row.total_weight for row in rows])
    exact = [bool(one.all()) for one in correct_N.split(sizes)]
    return loss, stderr, sum(exact) / len(exact)
