"""Distances between two models' predictions."""

from __future__ import annotations

import math

import pytest
import torch

from solotune.exporters.log_prob_error import LogProbError


def test_figures_of_a_known_pair_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    error = LogProbError()
    error.add(p.log(), q.log() + 7.0)  # logits are known up to a constant
    assert error.mean_kl == pytest.approx(0.25 * math.log(2))
    assert error.max_logprob_diff == pytest.approx(math.log(2))
    assert (error.top1_agreement, error.positions) == (0.0, 1)


def test_sums_are_over_all_rows():
    logits_TV = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    error = LogProbError()
    error.add(logits_TV, logits_TV)
    error.add(logits_TV[:1], -logits_TV[:1])
    assert error.positions == 6
    assert error.top1_agreement == pytest.approx(5 / 6)
    assert error.mean_kl == pytest.approx(error.max_kl / 6)


def test_shapes_must_be_equal():
    with pytest.raises(ValueError, match="shapes"):
        LogProbError().add(torch.zeros(2, 3), torch.zeros(2, 4))
