"""Micro-batches: what padding of labels leaves as it was, and how passes add up. Graphs: tests/gpu/test_graphs.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import random_rows

from solotune.dataset.collate import collate_packs
from solotune.model.loading import load_model
from solotune.training.forward_backward import MicroBatchRunner, accumulate

CPU = torch.device("cpu")


@pytest.mark.parametrize("weight", [None, 3.0])
def test_labels_added_to_reach_a_number_change_nothing(weight, tiny_config):
    model = load_model(tiny_config("llama"), CPU, torch.float32)
    rows = random_rows(6)
    if weight:
        rows[2] = replace(rows[2], weights=np.full(len(rows[2].input_ids), weight, np.float32))
    for layer in model.lora_layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(1))
    batch = collate_packs([rows[:3], rows[3:]], CPU)
    runner, results = MicroBatchRunner(model), []
    for given in (batch, batch.padded(len(batch.label_positions_N) + 7)):
        model.zero_gradients()
        runner.loss_and_correct_2.zero_()
        runner.run(accumulate, given, batch.total_weight)
        results.append((runner.loss_and_correct_2.clone(), model.flat_params.grad.clone()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    assert results[0][1].norm() > 0.01


def test_gradients_and_sums_add_up_over_micro_batches(tiny_config):
    model = load_model(tiny_config("llama"), CPU, torch.float32)
    one, other = (collate_packs([rows], CPU) for rows in (random_rows(3), random_rows(2, seed=5)))
    runner, alone = MicroBatchRunner(model), []
    for batch in (one, other):
        model.zero_gradients()
        runner.loss_and_correct_2.zero_()
        runner.run(accumulate, batch, 10.0)
        alone.append((runner.loss_and_correct_2.clone(), model.flat_params.grad.clone()))
    model.zero_gradients()
    runner.loss_and_correct_2.zero_()
    for batch in (one, other):
        runner.run(accumulate, batch, 10.0)
    together = (runner.loss_and_correct_2, model.flat_params.grad)
    for whole, first, second in zip(together, *alone, strict=True):
        torch.testing.assert_close(whole, first + second, rtol=1e-5, atol=1e-7)
