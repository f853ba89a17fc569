"""CUDA graphs of passes on one GPU: the numbers of passes without them, and memory given back.

sh scripts/test -n 0 -m gpu tests/gpu/test_graphs.py
"""

from __future__ import annotations

import pytest
import torch
from tiny import random_rows

from solotune.dataset.collate import PaddedShape, collate, collate_packs
from solotune.model.loading import load_model
from solotune.training import loop
from solotune.training.forward_backward import MicroBatchRunner, accumulate
from solotune.training.optimizer import make_optimizer

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


def config_of(tiny_config, **more):
    options = {"use_cpu": False, "bf16": True, "torch_compile": True, "packing": True, "lora_dropout": 0.1, **more}
    return tiny_config(options.pop("family", "llama"), **options)


def steps_of(config, batches, with_graphs):
    """Loss, accuracy and gradient norm of each step (two micro-batches), the adapters after them, and the passes."""
    model = load_model(config, GPU, torch.bfloat16)
    runner = MicroBatchRunner(model, with_graphs and config.takes_graphs)
    optimizer = make_optimizer(config.optimizer, [model.flat_params])
    model.module.train()
    numbers = []
    for step, pair in enumerate(zip(batches[::2], batches[1::2], strict=True)):
        numbers.append(loop.train_step(model, pair, optimizer, 1.0, (0, step), runner))
    return numbers, model.flat_params.detach().clone(), runner


@pytest.mark.parametrize(
    "more",
    [
        {"base_precision": "nf4"},
        {"base_precision": "fp8"},
        {"base_precision": "bf16", "gradient_checkpointing": 1},
        {"family": "qwen3", "base_precision": "nf4", "optim": "paged_adamw_8bit"},
    ],
    ids=str,
)
def test_the_numbers_are_those_of_launched_passes(more, tiny_config):
    config = config_of(tiny_config, **more)
    rows = random_rows(48)
    shape = PaddedShape.of([range(4)] * 2, 2, 96)
    packs = [collate_packs([rows[i : i + 2], rows[i + 2 : i + 4]], GPU, shape) for i in range(0, 48, 4)]
    assert len({len(batch.label_positions_N) for batch in packs}) > 3
    launched, adapters, _ = steps_of(config, packs, with_graphs=False)
    replayed, same_adapters, runner = steps_of(config, packs, with_graphs=True)
    assert runner.unsupported_reason is None and len(runner._graphs) >= 1
    for one, other in zip(launched, replayed, strict=True):
        assert one == pytest.approx(other, rel=2e-3)
    assert (adapters - same_adapters).norm() < 0.02 * adapters.norm()
    assert launched[0] != pytest.approx(launched[-1], rel=2e-3)  # it learned, so equal is not trivial


def test_another_shape_and_release_give_the_memory_back(tiny_config):
    config = config_of(tiny_config, base_precision="bf16")
    long = [collate(random_rows(8, longest=100, seed=1), GPU) for _ in range(8)]
    _, _, runner = steps_of(config, long, with_graphs=True)
    model = runner.model
    assert runner._graphs
    reserved = torch.cuda.memory_reserved()
    runner.run(accumulate, collate(random_rows(2), GPU), 1.0)
    assert not runner._graphs  # one of its own needs the shape to come again
    runner.run(accumulate, long[0], 1.0)
    runner.run(accumulate, long[0], 1.0)
    runner.run(accumulate, long[0], 1.0)
    assert runner._graphs and torch.cuda.memory_reserved() <= 1.2 * reserved
    runner.release()
    assert not runner._graphs and torch.cuda.memory_reserved() < reserved
    model.zero_gradients()


def test_a_model_that_looks_into_its_data_is_launched_as_before(tiny_config):
    config = config_of(tiny_config, base_precision="bf16", lora_dropout=0.0)
    batches = [collate(random_rows(4), GPU) for _ in range(8)]
    expected, _, _ = steps_of(config, batches, with_graphs=False)
    model = load_model(config, GPU, torch.bfloat16)
    model.module.base_model.norm.register_forward_hook(lambda module, given, y: y * bool(y.sum().item()))
    runner = MicroBatchRunner(model, config.takes_graphs)
    optimizer = make_optimizer(config.optimizer, [model.flat_params])
    model.module.train()
    found = [
        loop.train_step(model, pair, optimizer, 1.0, (0, step), runner)
        for step, pair in enumerate(zip(batches[::2], batches[1::2], strict=True))
    ]
    assert runner.unsupported_reason and not runner._graphs
    for one, other in zip(expected, found, strict=True):
        assert one == pytest.approx(other, rel=2e-3)
