"""The loss of a model on held-out rows, its standard error, and exact match.

Loss per supervised token is a ratio of sums over rows, L = sum(l_i) / sum(n_i), where n_i is the weight of a row's
supervised tokens (their number, unless the data has weights) and l_i the sum of their losses, each times its weight:
the quantity that training minimises.

Standard error
--------------
Groups of rows are independent, tokens of one row are not: with tokens taken as independent, the error would be several
times too small on chat rows. `statistics` has the formula.

Exact match
-----------
The share of rows for which greedy decoding would give the reference answer, token for token, with its end-of-turn
token. Nothing has to be generated: greedy decoding gives the reference exactly when every reference token is the argmax
given the tokens before it, and one teacher-forced pass shows that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from solotune.dataset import Example
from solotune.dataset.collate import collate, num_labels
from solotune.dataset.example import lengths_of
from solotune.evaluation.statistics import independent, ratio_and_stderr
from solotune.hardware.gpu_errors import stage
from solotune.model.loading import TrainableModel
from solotune.result_repr import ResultRepr
from solotune.runtime import signals
from solotune.runtime.world import ALONE, World


@dataclass(frozen=True, repr=False)
class Score(ResultRepr):
    """Held-out figures of one model; losses are nats per supervised token, by weight."""

    loss: float
    stderr: float
    tokens: int
    exact_match: float
    exact_match_stderr: float
    rows: int
    row_losses: tuple[float, ...] = ()  # weighted sums over each row, in the order of the rows given
    row_weights: tuple[float, ...] = ()
    row_hits: tuple[bool, ...] = ()  # whether each row is an exact match
    row_groups: tuple[str, ...] | None = None  # the units of errors and tests; None: rows
    num_groups: int | None = None  # groups that the rows are in, if they are fewer than the rows

    def figures(self) -> dict[str, object]:
        return {"loss": self.loss, "stderr": self.stderr, "exact_match": self.exact_match, "rows": self.rows}

    def to_json(self) -> dict[str, Any]:
        return {"loss": self.loss, "stderr": self.stderr, "tokens": self.tokens}


@stage("evaluating")
@torch.no_grad()
def score(
    model: TrainableModel,
    rows: Sequence[Example],
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    world: World = ALONE,
) -> Score:
    """Loss (by weight) and exact match of the model as it is, in evaluation mode; the mode is restored.

    Args:
        world: the ranks that share the passes; each gets the score of all rows.
    """
    was_training = model.module.training
    model.module.eval()
    losses, counts, exact = [0.0] * len(rows), [num_labels(row) for row in rows], [False] * len(rows)
    by_length = np.argsort(lengths_of(rows), kind="stable").tolist()  # similar lengths together: little padding
    for start in range(world.rank * batch_size, len(rows), world.size * batch_size):
        chosen = by_length[start : start + batch_size]
        batch = collate([rows[i] for i in chosen], model.device)
        losses_N, correct_N = model.token_losses(batch)
        weighted_N = batch.weighted(losses_N)
        sizes = [counts[i] for i in chosen]
        for i, row_losses, row_hits in zip(chosen, weighted_N.split(sizes), correct_N.split(sizes), strict=True):
            losses[i], exact[i] = row_losses.double().sum().item(), bool(row_hits.all())
        signals.check_stop()
        progress(min(start + batch_size, len(rows)), len(rows))
    model.module.train(was_training)
    if world.size > 1:  # each row was measured by one rank, and is 0 on the others
        measured = torch.tensor([losses, exact], dtype=torch.float64, device=model.device)
        world.all_reduce(measured)
        losses, exact = measured[0].tolist(), measured[1].bool().tolist()
    return score_of(rows, losses, exact)


def score_of(rows: Sequence[Example], losses: Sequence[float], hits: Sequence[bool]) -> Score:
    """The score made of what was measured of each row: its weighted sum of losses, and whether it is an exact match."""
    weights = [row.total_weight for row in rows]
    named = [row.group or row.where for row in rows]
    groups, num_groups = independent(named), len(set(named))
    loss, stderr = ratio_and_stderr(losses, weights, groups)
    share, share_stderr = ratio_and_stderr(hits, [1.0] * len(rows), groups)
    return Score(
        loss,
        stderr,
        sum(num_labels(row) for row in rows),
        share,
        share_stderr,
        len(rows),
        tuple(losses),
        tuple(weights),
        tuple(hits),
        tuple(groups) if groups else None,
        num_groups if num_groups < len(rows) else None,
    )
