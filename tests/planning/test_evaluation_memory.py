"""Bytes at the peak of evaluations and of generated answers, by arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planning.test_planner import H100, KNOBS, WORK, llama_8b

from solotune.planning.memory import footprint

LONG = {"eval_batch": (8, 8192), "eval_labels": 400, "answers": (3, 500, 128)}


def test_an_evaluation_needs_the_base_and_a_pass_without_gradients():
    """8B, NF4: three inner widths of SwiGLU beside the rest of a layer; logits in float32, twice."""
    before = footprint(llama_8b(), KNOBS, WORK, H100)
    assert before.peaks[1:] == (0, 0) and before.peaks.training == before.peak_bytes
    long = footprint(llama_8b(), KNOBS, replace(WORK, **LONG), H100)
    assert long.moment == "evaluation" and long.peak_bytes == long.peaks.evaluation
    assert long.peaks.training == before.peak_bytes
    assert long.by_category["activations"] == pytest.approx(8 * 8192 * (102400 + 16644), rel=1e-3)
    short = footprint(llama_8b(), KNOBS, replace(WORK, eval_batch=(8, 200), eval_labels=150), H100)
    fixed = before.peak_bytes - sum(before.by_category[name] for name in ("activations", "logits"))
    assert short.peaks.evaluation < fixed + 1.01 * 1046 * 128256 * 8 + 1200 * 2 * 4096 + 1600 * 8192
    assert short.moment != "evaluation"


def test_the_optimizers_state_is_gone_when_answers_are_generated():
    knobs, many = replace(KNOBS, optim="adamw_torch"), replace(WORK, answers=(64, 2000, 4096))
    used = footprint(llama_8b(), knobs, many, H100)
    assert used.moment == "answers" and used.by_category["optimizer"] == 0
    cached = 64 * 6096 * (131072 + 2048)
    assert used.by_category["activations"] == pytest.approx(cached, rel=0.01)
    assert used.by_category["logits"] == 64 * 128256 * 6
    paged = footprint(llama_8b(), KNOBS, many, H100)
    assert paged.paged_bytes == 0 and paged.peak_bytes == used.peak_bytes
