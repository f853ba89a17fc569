"""Collate rows of tokens into tensors, padded or packed.

Why no attention mask
---------------------
Padding is on the right and attention is causal, so no real token attends to padding, and labels are given by position,
so no padding token is a label. The padding id therefore has no meaning, and a tokenizer whose padding token equals its
end-of-turn token (SmolLM2's, and the walkthrough's) cannot lose that token from the loss. Left padding would need a
mask, and shifts the positions of models with absolute ones.

Packing
-------
The position ids of a packed sequence restart at 0 with each row; transformers keeps attention within each such segment.
The unused end of a sequence is one more segment, of padding. The first token of a row is never a label, so no loss
crosses from one row to the next.

Loss weights are a tensor parallel to the labels, in row order, as the model returns the losses; a batch without weights
has no such tensor and is computed without it.

Shape legend: B sequences, T tokens of the longest, N labels, S segment boundaries.
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
    label_positions_N: (
        torch.Tensor
    )  # int64: positions of the labels in the flat B * T tokens; each is predicted one position earlier
    position_ids_BT: torch.Tensor | None  # int64; None if no sequence is packed
    cu_seqlens_S: (
        torch.Tensor | None
    )  # int32, with position_ids: start of each of the S - 1 segments in the flat B * T tokens, and the end
    weights_N: torch.Tensor | None  # float32, weight of each label in row order; None if all are 1
    rows: Sequence[Example]
    is_label_N: torch.Tensor | None = None  # bool, False for labels that `padded` added

    @property
    def num_supervised(self) -> int:
        """Number of labels; counted on the rows, so no transfer from the device is needed."""
        return sum(num_labels(row) for row in self.rows)

    @property
    def total_weight(self) -> float:
        """Sum of the labels' weights; `num_supervised` if all are 1."""
        return sum(row.total_weight for row in self.rows)

    @property
    def label_mask_BT(self) -> torch.Tensor:
        """bool: whether the token at this position is a label."""
        flat = torch.zeros(self.input_ids_BT.numel(), dtype=torch.bool, device=self.input_ids_BT.device)
        flat[self.label_positions_N] = True
        return flat.view(self.input_ids_BT.shape)

    def weighted(self, losses_N: torch.Tensor) -> torch.Tensor:
        """Multiply each label's loss by its weight."""
        return losses_N if self.weights_N is None else losses_N * self.weights_N

    def num_correct(self, correct_N: torch.Tensor) -> torch.Tensor:
        """Number of labels that were predicted correctly."""
        return (correct_N if self.is_label_N is None else correct_N & self.is_label_N).sum()

    def padded(self, count: int) -> Batch:
        """Add labels of weight 0 up to `count`, so that the losses of several batches have one shape."""
        here, missing = len(self.label_positions_N), count - len(self.label_positions_N)
        weights = torch.ones(here, device=self.input_ids_BT.device) if self.weights_N is None else self.weights_N
        return self._replace(
            label_positions_N=F.pad(self.label_positions_N, (0, missing), value=1),
            weights_N=F.pad(weights, (0, missing)),
            is_label_N=torch.arange(count, device=self.input_ids_BT.device) < here,
        )

    @property
    def num_tokens(self) -> int:
        """Number of tokens without padding."""
        return sum(len(row.input_ids) for row in self.rows)


class PaddedShape(NamedTuple):
    """The shape that all packed batches of a run are padded to, so that the compiler sees one shape."""

    num_packs: int  # B
    length: int  # T
    num_starts: int  # S

    @classmethod
    def of(cls, packs: Iterable[Sized], num_packs: int, length: int) -> PaddedShape:
        """A shape that fits any `num_packs` of these packs; the padding of a pack counts as one more segment."""
        return cls(num_packs, length, num_packs * (1 + max(map(len, packs))) + 1)


def num_labels(row: Example) -> int:
    """Number of labels of a row: its loss tokens without the first token, which nothing predicts."""
    return int(np.count_nonzero(row.loss_mask[1:]))


def _label_weights(row: Example) -> np.ndarray:
    """float32 (labels,)"""
    return np.ones(num_labels(row), np.float32) if row.weights is None else row.weights[1:][row.loss_mask[1:]]


def collate(rows: Sequence[Example], device: torch.device) -> Batch:
    """Collate each row into a sequence of its own, right-padded to the longest."""
    return collate_packs([[row] for row in rows], device)


def collate_packs(packs: Sequence[Sequence[Example]], device: torch.device, shape: PaddedShape | None = None) -> Batch:
    """Collate each pack into a sequence of concatenated rows, right-padded to the longest or to `shape`."""
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
    # computed on the host: reading it back from the device would synchronise
    label_positions_N = tensor(np.concatenate(labels))
    weights = None
    if any(row.weights is not None for row in rows):
        weights = tensor(np.concatenate([_label_weights(row) for row in rows]))
    if not shape and all(len(pack) == 1 for pack in packs):
        return Batch(tensor(input_ids), label_positions_N, None, None, weights, rows)
    starts += [input_ids.size] * ((shape.num_starts if shape else len(starts) + 1) - len(starts))
    cu_seqlens_S = tensor(np.array(starts, dtype=np.int32))
    return Batch(tensor(input_ids), label_positions_N, tensor(positions), cu_seqlens_S, weights, rows)
