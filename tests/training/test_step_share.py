"""The parts of a step that ranks compute: together they are the step, in six families."""

from __future__ import annotations

import dataclasses
import signal
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from tiny import random_rows

from solotune.dataset.collate import PaddedShape, collate
from solotune.dataset.example import Example
from solotune.dataset.sampler import BatchSampler, deal
from solotune.model import lora
from solotune.model.loading import load_model
from solotune.runtime.signals import StopRequested
from solotune.runtime.world import ALONE, World
from solotune.training.forward_backward import accumulate
from solotune.training.loop import train_step
from solotune.training.step_share import StepRows, StepShare

CPU = torch.device("cpu")


def weighted(rows: list[Example]) -> list[Example]:
    return [
        dataclasses.replace(row, weights=np.where(row.loss_mask, 1.0 + i % 3, 0).astype(np.float32))
        for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize(("count", "size", "ranks"), [(16, 2, 2), (16, 2, 4), (13, 4, 3), (5, 8, 4), (2, 4, 4)])
def test_every_row_is_dealt_once_and_nobody_waits_long(count: int, size: int, ranks: int) -> None:
    rows, sizes = list(range(100, 100 + count)), [7 + 13 * i % 31 for i in range(count)]
    dealt = deal(rows, sizes, size, ranks)
    parts = [part for rank in dealt for part in rank]
    assert sorted(row for part in parts for row in part.rows) == rows
    assert sorted(part.number for part in parts) == list(range(len(parts)))
    assert max(len(part.rows) for part in parts) <= size
    assert max(map(len, dealt)) == -(-count // (size * ranks))  # as many passes as one rank of a full step
    assert min(map(len, dealt)) >= (1 if count >= ranks else 0)
    by_row = dict(zip(rows, sizes, strict=True))
    work = [sum(len(part.rows) * max(by_row[row] for row in part.rows) for part in rank) for rank in dealt]
    assert max(work) - min(work) <= size * max(sizes)


def test_a_micro_batch_of_the_step_is_the_same_on_any_number_of_ranks() -> None:
    """And so are its seeds of dropout."""
    rows, sizes = list(range(16)), [3 * i % 17 for i in range(16)]
    two, four = ({p.number: p.rows for rank in deal(rows, sizes, 2, n) for p in rank} for n in (2, 4))
    assert two == four


FAMILIES = ["llama", "qwen3", "gemma2", "phi", "gpt2", "mixtral"]


@pytest.mark.parametrize(("family", "packing"), [*((family, False) for family in FAMILIES), ("llama", True)])
def test_the_gradients_of_all_ranks_are_that_of_the_step(tiny_config, family: str, packing: bool) -> None:
    config = tiny_config(family, packing=packing, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    model = load_model(config, CPU, torch.float32)
    for layer in model.lora_layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(0))
    rows = weighted(random_rows(7))  # fewer than a step has: the last one of an epoch
    packs = [[0, 3], [1], [2, 4, 6], [5]] if packing else [[i] for i in range(7)]

    def gradient(world: World) -> tuple[torch.Tensor, StepShare]:
        batches = dataclasses.replace(config.batches, ranks=world.size)
        schedule = BatchSampler.of(batches, len(packs))
        source = StepRows(rows, packs, schedule, None, CPU, world)
        share = source.share(next(schedule.steps(0)))
        model.zero_gradients()
        for batch in share.batches:
            accumulate(model, batch, share.total_weight, torch.zeros(2))
        assert model.flat_params.grad is not None
        return model.flat_params.grad.clone(), share

    alone = tiny_config(family, packing=packing, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    whole = StepRows(rows, packs, BatchSampler.of(alone.batches, len(packs)), None, CPU, ALONE)
    share = whole.share(next(BatchSampler.of(alone.batches, len(packs)).steps(0)))
    model.zero_gradients()
    accumulate(model, share.batches[0], share.total_weight, torch.zeros(2))
    assert model.flat_params.grad is not None
    wanted = model.flat_params.grad.clone()
    parts = [gradient(World(rank, 2)) for rank in range(2)]
    for _, part in parts:
        assert (part.num_tokens, part.num_supervised) == (share.num_tokens, share.num_supervised)
        assert part.total_weight == pytest.approx(share.total_weight)
    total = parts[0][0] + parts[1][0]
    assert float((total - wanted).norm() / wanted.norm()) < 1e-6


def test_dropout_follows_the_micro_batch_and_not_the_rank() -> None:
    layer = SimpleNamespace(pass_seeds=torch.zeros(2, dtype=torch.int32))
    model = cast("Any", SimpleNamespace(lora_layers={"q": layer}, is_compiled=True))
    seen = []
    for rank, size in ((0, 2), (3, 4)):
        StepShare([], [], [], 0, 0, 0.0, World(rank, size)).seed_dropout(model, (1, 2), 5)
        seen.append(layer.pass_seeds.tolist())
    lora.seed_dropout(model.lora_layers, 1, 2, 5)
    assert seen == [layer.pass_seeds.tolist()] * 2
    model.is_compiled = False
    drawn = []
    for rank, number in ((0, 5), (1, 5), (1, 6)):
        StepShare([], [], [], 0, 0, 0.0, World(rank, 2)).seed_dropout(model, (1, 2), number)
        drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_rank_that_stops_while_it_waits_leaves_its_part_for_the_others(tiny_config) -> None:
    """Its gradients were set to zero once, and rank 0 made an update of half the rows."""

    class Waiting(World):
        def all_reduce(self, *tensors: torch.Tensor) -> None:
            self.sent = [tensor.clone() for tensor in tensors]
            raise StopRequested(signal.SIGTERM)

    model = load_model(tiny_config(), CPU, torch.float32)
    world, batch, before = Waiting(1, 2), collate(random_rows(3), CPU), model.flat_params.detach().clone()
    share = dataclasses.replace(StepShare.whole([batch]), world=world)
    with pytest.raises(StopRequested):
        train_step(model, [batch], torch.optim.SGD([model.flat_params], 1.0), 1.0, share=share)
    assert model.flat_params.grad is not None
    assert bool(world.sent[0].any())
    assert torch.equal(model.flat_params.grad, world.sent[0])
    assert torch.equal(model.flat_params.detach(), before)


def test_packs_of_one_shape_keep_it() -> None:
    rows = random_rows(4)
    packs = [[0, 1], [2], [3]]
    schedule = BatchSampler(3, 2, 1, 1, 0, 2)
    shape = PaddedShape.of(packs, 2, 64)
    shares = [StepRows(rows, packs, schedule, shape, CPU, World(rank, 2)).share([[0, 1], [2]]) for rank in (0, 1)]
    assert {batch.input_ids_BT.shape for share in shares for batch in share.batches} == {(2, 64)}
