"""Rows of tokens to tensors, padded or packed.

Padding goes to the right and needs no attention mask: attention is causal, so no real token ever sees a pad behind it,
and labels are taken by position, so no pad is ever supervised. Which id pads is therefore without meaning, and a
tokenizer whose pad equals its end-of-turn token (SmolLM2's, and the walkthrough's) cannot lose that token from the
loss. Left padding would need a mask, and shifts the positions of models with absolute ones.

A packed sequence says where its rows begin through its positions, which restart at 0; transformers keeps attention
within each such stretch. What is left over at its end is one more stretch, of pads. A row's first token is never a
label, so no loss crosses from one row to the next.

Weights stand beside the labels, one each in row order, as the losses come out of the model; a batch without any has
no such tensor, and computes what it computed before there were weights.

Shape legend: B sequences, T tokens of the longest, N labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from solotune.dataset import Example

PAD_ID = 0  # any valid id


class Batch(NamedTuple):
    """One forward pass."""

    input_ids_BT: torch.Tensor  # int64
    label_positions_N: torch.Tensor  # int64: where the labels are among the B * T tokens; each is predicted one earlier
    position_ids_BT: torch.Tensor | None  # int64, where several rows share a sequence
    cu_seqlens_S: (
        torch.Tensor | None
    )  # int32, there: where each of S - 1 rows begins in the B * T tokens, and their end
    weights_N: torch.Tensor | None  # float32, of the labels in row order, where one of them is not 1
    rows: Sequence[Example]
    is_label_N: torch.Tensor | None = None  # bool, where some of the N were added by `padded`

    @property
    def num_supervised(self) -> int:
        """Labels in this batch; counted on the rows, so it costs no transfer from the device."""
        return sum(num_labels(row) for row in self.rows)

    @property
    def total_weight(self) -> float:
        """Sum of the labels' weights; `num_supervised` where all are 1."""
        return sum(row.total_weight for row in self.rows)

    @property
    def label_mask_BT(self) -> torch.Tensor:
        """bool: the token at this position is a label."""
        flat = torch.zeros(self.input_ids_BT.numel(), dtype=torch.bool, device=self.input_ids_BT.device)
        flat[self.label_positions_N] = True
        return flat.view(self.input_ids_BT.shape)

    def weighted(self, losses_N: torch.Tensor) -> torch.Tensor:
        """The losses of the labels, each times its weight."""
        return losses_N if self.weights_N is None else losses_N * self.weights_N

    def num_correct(self, correct_N: torch.Tensor) -> torch.Tensor:
        """How many of the labels were hit."""
        return (correct_N if self.is_label_N is None else correct_N & self.is_label_N).sum()

    def padded(self, count: int) -> Batch:
        """With labels of weight 0 added up to `count`, so that the losses of several batches have one shape."""
        here, missing = len(self.label_positions_N), count - len(self.label_positions_N)
        weights = torch.ones(here, device=self.input_ids_BT.device) if self.weights_N is None else self.weights_N
        return self._replace(
            label_positions_N=F.pad(self.label_positions_N, (0, missing), value=1),
            weights_N=F.pad(weights, (0, missing)),
            is_label_N=torch.arange(count, device=self.input_ids_BT.device) < here,
        )

    @property
    def num_tokens(self) -> int:
        """Real tokens, without padding."""
        return sum(len(row.input_ids) for row in self.rows)


class PaddedShape(NamedTuple):
    """What all packed passes of a run are padded to, so that a compiler sees one shape."""

    num_packs: int  # B
    length: int  # T
    num_starts: int  # S

    @classmethod
    def of(cls, packs: Iterable[Sized], num_packs: int, length: int) -> PaddedShape:
        """Room for any `num_packs` of these packs; a pack's left-over tokens count as one more row."""
        return cls(num_packs, length, num_packs * (1 + max(map(len, packs))) + 1)


def num_labels(row: Example) -> int:
    """Supervised tokens that something predicts: the first token of a row has no predecessor."""
    return int(np.count_nonzero(row.loss_mask[1:]))


def _label_weights(row: Example) -> np.ndarray:
    """float32 (labels,)"""
    return np.ones(num_labels(row), np.float32) if row.weights is None else row.weights[1:][row.loss_mask[1:]]


def collate(rows: Sequence[Example], device: torch.device) -> Batch:
    """A sequence for each row, right-padded to the longest."""
    return collate_packs([[row] for row in rows], device)


def collate_packs(packs: Sequence[Sequence[Example]], device: torch.device, shape: PaddedShape | None = None) -> Batch:
    """A sequence for each pack, its rows one behind the other, right-padded to the longest or to `shape`."""
    longest = max(sum(len(row.input_ids) for row in pack) for pack in packs)
    size = (shape.num_packs, shape.length) if shape else (len(packs), longest)
    input_ids = np.full(size, PAD_ID, dtype=np.int64)
    labels: list[np.ndarray] = []
    positions = np.tile(np.arange(size[1]), (size[0], 1))
    starts: list[int] = []
    for i, pack in enumerate(packs):
        start = 0
        for row in pack:
            end = start + len(row.input_ids)
            input_ids[i, start:end] = row.input_ids
            labels.append(np.flatnonzero(row.loss_mask[1:]) + (i * size[1] + start + 1))
            positions[i, start:end] = np.arange(end - start)
            starts.append(i * size[1] + start)
            start = end
        positions[i, start:] = np.arange(size[1] - start)
        if start < size[1]:
            starts.append(i * size[1] + start)
    starts += [i * size[1] for i in range(len(packs), size[0])]

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    rows = [row for pack in packs for row in pack]
    label_positions_N = tensor(np.concatenate(labels))  # counted here: asking the device for them would wait for it
    weights = None
    if any(row.weights is not None for row in rows):
        weights = tensor(np.concatenate([_label_weights(row) for row in rows]))
    if not shape and all(len(pack) == 1 for pack in packs):
        return Batch(tensor(input_ids), label_positions_N, None, None, weights, rows)
    starts += [input_ids.size] * ((shape.num_starts if shape else len(starts) + 1) - len(starts))
    cu_seqlens_S = tensor(np.array(starts, dtype=np.int32))
    return Batch(tensor(input_ids), label_positions_N, tensor(positions), cu_seqlens_S, weights, rows)
