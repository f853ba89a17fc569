"""Rows of tokens to padded tensors.

Padding goes to the right and needs no attention mask: attention is causal, so no real token ever sees a pad behind it,
and labels are taken by position, so no pad is ever supervised. Which id pads is therefore without meaning, and a
tokenizer whose pad equals its end-of-turn token (SmolLM2's, and the walkthrough's) cannot lose that token from the
loss. Left padding would need a mask, and shifts the positions of models with absolute ones.

Shape legend: B rows, T tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from solotune.dataset import Example

PAD_ID = 0  # any valid id


class Batch(NamedTuple):
    """One forward pass."""

    input_ids_BT: torch.Tensor  # int64
    supervised_BT: torch.Tensor  # bool: the token at this position is a label
    rows: Sequence[Example]

    @property
    def num_supervised(self) -> int:
        """Labels in this batch; counted on the rows, so it costs no transfer from the device."""
        return sum(num_labels(row) for row in self.rows)

    @property
    def num_tokens(self) -> int:
        """Real tokens, without padding."""
        return sum(len(row.input_ids) for row in self.rows)


def num_labels(row: Example) -> int:
    """Supervised tokens that something predicts: the first token of a row has no predecessor."""
    return int(np.count_nonzero(row.supervised[1:]))


def collate(rows: Sequence[Example], device: torch.device) -> Batch:
    """Right-pads `rows` to the longest of them."""
    longest = max(len(row.input_ids) for row in rows)
    input_ids = np.full((len(rows), longest), PAD_ID, dtype=np.int64)
    supervised = np.zeros((len(rows), longest), dtype=bool)
    for i, row in enumerate(rows):
        input_ids[i, : len(row.input_ids)] = row.input_ids
        supervised[i, : len(row.supervised)] = row.supervised
    return Batch(
        torch.from_numpy(input_ids).to(device, non_blocking=True),
        torch.from_numpy(supervised).to(device, non_blocking=True),
        rows,
    )
