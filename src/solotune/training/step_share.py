"""What one rank computes of a step, and what it has to know of the whole step.

    share = StepRows(...).share(micro_batches)
    share.batches        the micro-batches of this rank, on its device
    share.numbers        their numbers in the whole step: seeds of dropout
    share.total_weight   of the whole step: the loss is divided by it on every rank, and then summed

Every rank counts the whole step on its own, from the rows: nothing has to be sent before backward, and no rank can
divide by its own number, which would be a mean of means.

Dropout
-------
A micro-batch has the same seeds whichever rank computes it. So 2 ranks with 4 micro-batches each and 4 ranks with 2 are
the same step, also with dropout. One rank alone cuts its step into other micro-batches: there, equality is for dropout
0. Layers that are not compiled draw from PyTorch's generator; several ranks seed it for each micro-batch, and so a
resumed run needs no generator states of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from solotune.dataset import Example
from solotune.dataset.collate import Batch, PaddedShape, collate_packs, num_labels
from solotune.dataset.sampler import BatchSampler, Numbered, deal
from solotune.errors import DeviceError
from solotune.model import lora
from solotune.model.loading import TrainableModel
from solotune.runtime.world import ALONE, World


@dataclass(frozen=True)
class StepShare:
    """The micro-batches of this rank, and the counts of the whole step."""

    batches: Sequence[Batch]
    numbers: Sequence[int]
    rows: Sequence[Example]  # of the whole step
    num_tokens: int  # of the whole step, as the next two
    num_supervised: int
    total_weight: float
    world: World = ALONE

    @classmethod
    def whole(cls, batches: Sequence[Batch]) -> StepShare:
        """All micro-batches of a step, for one rank."""
        return cls(
            batches,
            range(len(batches)),
            [row for batch in batches for row in batch.rows],
            sum(batch.num_tokens for batch in batches),
            sum(batch.num_supervised for batch in batches),
            sum(batch.total_weight for batch in batches),
        )

    def seed_dropout(self, model: TrainableModel, seeds: tuple[int, ...], number: int) -> None:
        """Seed the dropout of a micro-batch by its number in the whole step."""
        lora.seed_dropout(model.lora_layers, *seeds, number)
        if self.world.size > 1 and not model.is_compiled:
            torch.manual_seed(int(np.random.SeedSequence((*seeds, number)).generate_state(1, np.uint64)[0] >> 1))


class StepRows:
    """The rows of each step, dealt to ranks and collated."""

    def __init__(
        self,
        rows: Sequence[Example],
        packs: Sequence[Sequence[int]] | np.ndarray,
        schedule: BatchSampler,
        shape: PaddedShape | None,
        device: torch.device,
        world: World,
    ) -> None:
        self._rows, self._packs, self._schedule = rows, packs, schedule
        self._shape, self._device, self._world = shape, device, world

    def share(self, micro_batches: Sequence[Sequence[int]]) -> StepShare:
        """This rank's part of a step.

        Args:
            micro_batches: the packs of the whole step, as the sampler gives them.
        """
        if self._world.size == 1:
            return StepShare.whole([self._collated(part) for part in micro_batches])
        step = [pack for part in micro_batches for pack in part]
        whole = {pack: [self._rows[row] for row in self._packs[pack]] for pack in step}
        sizes = [sum(len(row.input_ids) for row in whole[pack]) for pack in step]
        dealt = deal(step, sizes, self._schedule.micro_batch_size, self._world.size)
        own: list[Numbered] = dealt[self._world.rank]
        rows = [row for pack in step for row in whole[pack]]
        return StepShare(
            [self._collated(part.rows) for part in own],
            [part.number for part in own],
            rows,
            sum(sizes),
            sum(map(num_labels, rows)),
            sum(row.total_weight for row in rows),
            self._world,
        )

    def _collated(self, packs: Sequence[int]) -> Batch:
        chosen = [[self._rows[row] for row in self._packs[pack]] for pack in packs]
        return collate_packs(chosen, self._device, self._shape)


def require_same_adapters(model: TrainableModel, world: World, step: int) -> None:
    """Compare the adapters of all ranks, by a checksum of their bits.

    Raises:
        DeviceError: those of a rank differ from rank 0's.
    """
    if world.size == 1:
        return
    found = world.all_gather(int(model.flat_params.detach().view(torch.int32).sum(dtype=torch.int64)))
    if others := [rank for rank, checksum in enumerate(found) if checksum != found[0]]:
        raise DeviceError(
            f"step {step}: the adapters of rank {', '.join(map(str, others))} differ from those of rank 0, though all "
            "ranks made the same updates; no checkpoint was saved",
            change="continue with --resume; if it happens again, check that rank's GPU (nvidia-smi -q) and its driver",
        )
