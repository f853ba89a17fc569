"""Batch sampler: the packs of rows, the order of an epoch, and the micro-batches of each step.

An epoch's order is a permutation drawn from (seed, epoch), so a run can be resumed from its step number alone.

Several ranks
-------------
A step of N ranks has the rows of N times as many micro-batches. Every rank computes the whole step and takes its part
(`deal`), so nobody has to send rows, and the weights of the whole step are known everywhere. Rows of similar length
share a micro-batch, and the ranks get micro-batches of similar lengths one after another, forwards and then backwards:
a step takes as long as its slowest rank. The mean over a step does not depend on who computes which row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from solotune.config.settings import BatchSettings
from solotune.dataset.collate import PaddedShape
from solotune.dataset.example import Example, lengths_of
from solotune.dataset.packing import pack


@dataclass(frozen=True)
class BatchSampler:
    """The number of steps, and the rows (or packs of rows) of each step."""

    num_rows: int
    micro_batch_size: int
    accumulation: int
    total_steps: int
    seed: int
    ranks: int = 1

    @classmethod
    def of(cls, batches: BatchSettings, num_rows: int) -> BatchSampler:
        """The sampler of a run over `num_rows` rows or packs."""
        per_epoch = math.ceil(num_rows / (batches.batch_size * batches.accumulation * batches.ranks))
        total = batches.max_steps if batches.max_steps > 0 else math.ceil(batches.num_epochs * per_epoch)
        return cls(num_rows, batches.batch_size, batches.accumulation, total, batches.seed, batches.ranks)

    @property
    def rows_per_step(self) -> int:
        return self.micro_batch_size * self.accumulation * self.ranks

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_rows / self.rows_per_step)

    def epoch_at(self, step: int) -> float:
        """Number of epochs after `step` steps."""
        return step / self.steps_per_epoch

    def row_order(self, epoch: int) -> np.ndarray:
        """int64 (num_rows,): the order of rows in an epoch (epochs count from 0)."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)

    def steps(self, done: int) -> Iterator[list[list[int]]]:
        """Yield the micro-batches (row numbers) of each step after `done`; an epoch's last step may be smaller."""
        rows_per_step = self.rows_per_step
        order_epoch, order = -1, np.empty(0, np.int64)
        for step in range(done, self.total_steps):
            epoch, within = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order_epoch, order = epoch, self.row_order(epoch)
            rows = order[within * rows_per_step : (within + 1) * rows_per_step].tolist()
            yield [rows[i : i + self.micro_batch_size] for i in range(0, len(rows), self.micro_batch_size)]


def deal(rows: Sequence[int], sizes: Sequence[int], micro_batch_size: int, ranks: int) -> list[list[Numbered]]:
    """Deal the rows of a step to ranks: for each rank its micro-batches, with their numbers in the whole step.

    Args:
        rows: of the step; the last one of an epoch may have so few that a rank gets none.
        sizes: the tokens of each of these rows.
    """
    longest_first = [row for _, row in sorted(zip(sizes, rows, strict=True), key=lambda pair: -pair[0])]
    rounds = math.ceil(len(rows) / (micro_batch_size * ranks))
    count = min(rounds * ranks, len(rows))
    ends = [len(rows) * (number + 1) // count for number in range(count)]
    dealt: list[list[Numbered]] = [[] for _ in range(ranks)]
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        turn, place = divmod(number, ranks)
        rank = place if turn % 2 == 0 else ranks - 1 - place
        dealt[rank].append(Numbered(number, longest_first[start:end]))
    return dealt


class Numbered(NamedTuple):
    """A micro-batch and its number in the whole step."""

    number: int
    rows: list[int]


def pack_sequences(batches: BatchSettings, rows: Sequence[Example]) -> list[list[int]] | np.ndarray:
    """Return the row numbers of each training sequence: one row each, or several when packing."""
    if not batches.packing:
        return np.arange(len(rows))[:, None]
    return pack(lengths_of(rows), batches.max_length)


def pack_and_shape(
    batches: BatchSettings, rows: Sequence[Example]
) -> tuple[list[list[int]] | np.ndarray, PaddedShape | None]:
    """Return the training sequences, and the shape that batches are padded to if they are packed and compiled."""
    packs = pack_sequences(batches, rows)
    if not batches.has_one_shape:
        return packs, None
    return packs, PaddedShape.of(packs, batches.batch_size, batches.max_length)
