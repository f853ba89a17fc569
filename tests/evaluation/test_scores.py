"""Held-out figures: the standard error, exact match without generating, base against tuned."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import random_rows

from solotune.dataset.collate import num_labels
from solotune.evaluation.compare import Evaluation, loss_difference
from solotune.evaluation.generation import generate
from solotune.evaluation.scores import score
from solotune.evaluation.statistics import ratio_and_stderr
from solotune.model.loading import load_model
from solotune.model.lora import adapters_off

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_config):
    return load_model(tiny_config(), CPU, torch.float32)


def test_the_ratio_estimators_error_is_the_spread_over_repeated_samples():
    """Drawn again and again, the estimate scatters as the formula says, and not as if tokens were independent."""
    rng = np.random.default_rng(0)
    estimates, errors, naive = [], [], []
    for _ in range(400):
        counts = rng.integers(5, 60, 80)
        level = rng.normal(2.0, 0.5, 80)  # rows differ, tokens of one row do not
        sums = level * counts
        ratio, stderr = ratio_and_stderr(sums.tolist(), counts.tolist())
        estimates.append(ratio)
        errors.append(stderr)
        naive.append(np.repeat(level, counts).std() / math.sqrt(counts.sum()))
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.1)
    assert np.mean(naive) < 0.3 * np.std(estimates)


def test_one_row_has_no_standard_error():
    assert ratio_and_stderr([3.0], [2]) == (1.5, math.inf)


def test_score_is_the_mean_over_tokens_whatever_the_batch(model):
    rows = random_rows(11)
    scores = [score(model, rows, size) for size in (1, 4, 32)]
    assert scores[0].tokens == sum(num_labels(row) for row in rows)
    for other in scores[1:]:
        assert other.loss == pytest.approx(scores[0].loss, rel=1e-6)
        assert other.row_losses == pytest.approx(scores[0].row_losses, rel=1e-5)
    assert model.module.training is False
    model.module.train()
    score(model, rows, 4)
    assert model.module.training is True


def test_exact_match_is_what_greedy_decoding_gives(model):
    """Rows whose answer is what the model itself says match; change one token and they do not."""
    rows = []
    for row in random_rows(6, longest=12):
        start = int(row.loss_mask.argmax())
        said = generate(model, row.input_ids[:start].tolist(), len(row.input_ids) - start, [])
        row.input_ids[start:] = said
        rows.append(row)
    assert score(model, rows, 4).exact_match == 1.0
    last = rows[0].input_ids
    last[-1] = (last[-1] + 1) % 128
    result = score(model, rows, 4)
    assert result.exact_match == pytest.approx(5 / 6)
    assert result.exact_match_stderr == pytest.approx(math.sqrt(5 / 6 * 1 / 6 / 5))


def test_the_paired_difference_is_sharper_than_the_two_errors(model):
    rows = random_rows(30)
    generator = torch.Generator().manual_seed(0)
    for layer in model.lora_layers.values():
        layer.lora_B.data.normal_(0, 0.005, generator=generator)
    tuned = score(model, rows, 8)
    with adapters_off(model.module):
        base = score(model, rows, 8)
    difference, stderr = loss_difference(base, tuned)
    assert difference == pytest.approx(tuned.loss - base.loss, abs=1e-9)
    assert 0 < stderr < 0.5 * math.hypot(base.stderr, tuned.stderr)


def test_generation_stops_at_a_stop_token_and_leaves_it_out(model):
    free = generate(model, [5, 6, 7], 8, [])
    assert len(free) == 8
    stopped = generate(model, [5, 6, 7], 8, [free[3]])
    assert stopped == free[: free.index(free[3])]


def test_errors_are_over_groups_of_rows(model):
    """Twelve groups of three equal rows are twelve observations, not 36; of one group nothing can be said."""
    rows = random_rows(12, longest=12)
    grouped = [
        replace(row, group=str(number), where=f"a:{copy}") for number, row in enumerate(rows) for copy in range(3)
    ]
    once, thrice = score(model, rows, 4), score(model, grouped, 4)
    assert thrice.loss == pytest.approx(once.loss)
    assert thrice.stderr == pytest.approx(once.stderr)
    assert (once.num_groups, thrice.num_groups) == (None, 12)
    assert Evaluation(thrice, thrice, []).units == "36 held-out rows in 12 groups"
    assert Evaluation(few := score(model, grouped[:6], 4), few, []).units == "6 held-out rows in 2 groups"
    one = score(model, grouped[:3], 4)
    assert one.row_groups is None
    assert Evaluation(one, one, []).units == "3 held-out rows of 1 group"
