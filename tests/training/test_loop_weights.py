"""The weighted loss: plain PyTorch's numbers and gradients, however rows are batched, packed or accumulated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import metrics_of, random_rows

from solotune.dataset import Example
from solotune.dataset.collate import collate, collate_packs
from solotune.evaluation import scores
from solotune.model.loading import load_model
from solotune.training import loop

CPU = torch.device("cpu")


def weighted_rows(count: int) -> list[Example]:
    """Rows with a weight of its own for each token, every third without any."""
    rng = np.random.default_rng(1)
    rows = []
    for number, row in enumerate(random_rows(count)):
        weights = np.where(row.loss_mask, rng.uniform(0.05, 4, len(row.input_ids)), 0).astype(np.float32)
        rows.append(replace(row, weights=None if number % 3 == 2 else weights))
    return rows


@pytest.fixture
def model(tiny_config):
    model = load_model(tiny_config(packing=True), CPU, torch.float32)
    for layer in model.lora_layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(0))
    return model


def reference(model, rows: Sequence[Example]) -> tuple[float, list[torch.Tensor]]:
    """sum_n w_n l_n / sum_n w_n and its gradients: whole logits, row by row, PyTorch's own cross-entropy."""
    upper, lower = torch.zeros(()), 0.0
    for row in rows:
        ids = torch.from_numpy(row.input_ids).long()
        losses = F.cross_entropy(model.module(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        weights = torch.from_numpy(row.loss_mask * 1.0 if row.weights is None else row.weights)[1:]
        upper = upper + (weights * losses)[row.loss_mask[1:]].sum()
        lower += float(weights.double()[row.loss_mask[1:]].sum())
    loss = (upper / lower).float()
    return loss.item(), list(torch.autograd.grad(loss, model.trainable))


def step(model, batches) -> tuple[float, list[torch.Tensor]]:
    """What `train_step` reports, and the gradients that it gives to the optimizer."""
    grads: list[torch.Tensor] = []
    optimizer = torch.optim.SGD(model.trainable, lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: grads.extend(p.grad.clone() for p in model.trainable))
    loss = loop.train_step(model, batches, optimizer, math.inf).loss
    return loss, grads


def assert_same(ours: tuple[float, list[torch.Tensor]], theirs: tuple[float, list[torch.Tensor]]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    largest = max(grad.abs().max().item() for grad in theirs[1])
    assert largest > 1e-3
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert (mine - other).abs().max().item() <= 1e-6 * largest


def test_however_rows_are_put_together_it_is_the_plain_definition(model) -> None:
    rows = weighted_rows(8)
    plain = reference(model, rows)
    assert_same(step(model, [collate(rows, CPU)]), plain)  # 1 x 8
    assert_same(step(model, [collate([row], CPU) for row in rows]), plain)  # 8 x 1
    assert_same(step(model, [collate(rows[:3], CPU), collate(rows[3:], CPU)]), plain)
    assert_same(step(model, [collate_packs([rows[:3], rows[3:5]], CPU), collate_packs([rows[5:]], CPU)]), plain)
    unweighted = reference(model, [replace(row, weights=None) for row in rows])
    assert abs(unweighted[0] - plain[0]) > 1e-3


def test_a_row_of_weight_2_is_that_row_given_twice(model) -> None:
    rows = random_rows(5)
    doubled = replace(rows[0], weights=np.float32(2) * rows[0].loss_mask)
    assert_same(step(model, [collate([doubled, *rows[1:]], CPU)]), step(model, [collate([rows[0], *rows], CPU)]))


def test_only_ratios_matter(model) -> None:
    rows = random_rows(4)
    tripled = [replace(row, weights=np.float32(3) * row.loss_mask) for row in rows]
    assert_same(step(model, [collate(tripled, CPU)]), step(model, [collate(rows, CPU)]))


def test_weights_of_one_are_bit_equal_to_none(model) -> None:
    rows = random_rows(6)
    assert collate(rows, CPU).weights_N is None
    ones = [replace(row, weights=row.loss_mask.astype(np.float32)) for row in rows]
    ours, theirs = step(model, [collate(ones, CPU)]), step(model, [collate(rows, CPU)])
    assert ours[0] == theirs[0]
    assert all(torch.equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_the_least_and_the_largest_weights_stay_finite(model, scale: float) -> None:
    rows = random_rows(4)
    scaled = [replace(row, weights=np.float32(scale) * row.loss_mask) for row in rows]
    assert_same(step(model, [collate(scaled, CPU)]), step(model, [collate(rows, CPU)]))


def test_a_run_records_the_sum_of_the_weights(tiny_config, tmp_path) -> None:
    from solotune.display.progress import SilentDisplay
    from solotune.run.run_dir import RunDirectory

    config = tiny_config(max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    config = config.replaced("test", output_dir=str(tmp_path / "run"))
    model, run, rows = load_model(config, CPU, torch.float32), RunDirectory.create(config.output_dir), weighted_rows(8)
    score = loop.train(model, rows, rows, config, run, SilentDisplay())
    (recorded,) = [e for e in metrics_of(run) if e["event"] == "step"]
    assert recorded["total_weight"] == pytest.approx(sum(row.total_weight for row in rows))
    assert recorded["total_weight"] != recorded["num_supervised"] == sum(scores.num_labels(row) for row in rows)
    assert score is not None
    assert score.tokens == recorded["num_supervised"]


# --- held out


def test_the_held_out_loss_has_the_same_weights(model) -> None:
    rows = weighted_rows(11)
    loss, _ = reference(model, rows)
    for size in (1, 4, 32):
        score = scores.score(model, rows, size)
        assert score.loss == pytest.approx(loss, rel=1e-6)
    plain = scores.score(model, [replace(row, weights=None) for row in rows], 4)
    assert (score.tokens, score.exact_match) == (plain.tokens, plain.exact_match)
    assert score.row_weights == tuple(row.total_weight for row in rows)


def test_the_standard_error_is_the_spread_over_repeated_weighted_samples() -> None:
    """Rows differ in loss, length and weight, the latter with the loss: the formula says how estimates scatter."""
    rng = np.random.default_rng(0)
    estimates, errors, by_count = [], [], []
    for _ in range(400):
        counts, level = rng.integers(5, 60, 80), rng.normal(2.0, 0.5, 80)
        weight = np.where(rng.random(80) < 0.2, 4.0, 0.5) * np.exp(0.3 * (level - 2))
        ratio, stderr = scores.ratio_and_stderr((weight * counts * level).tolist(), (weight * counts).tolist())
        estimates.append(ratio)
        errors.append(stderr)
        by_count.append(scores.ratio_and_stderr((counts * level).tolist(), counts.tolist())[1])
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.1)
    assert np.mean(by_count) < 0.8 * np.std(estimates)
