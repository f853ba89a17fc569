"""Evaluations and answers in the plan: their peak, fewer rows in a pass, and what to change."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planning.test_planner import GIB, H100, KNOBS, WORK, config, llama_8b

from solotune.config.settings import EVAL_ROWS
from solotune.planning.memory import footprint
from solotune.planning.plan import Plan
from solotune.planning.planner import full_rows, make_plan
from tests.messages import stable

LONG = {"eval_batch": (8, 8192), "eval_labels": 400, "answers": (3, 500, 128)}


def planned(rows: dict, memory_budget: str, **keys) -> Plan:
    checked = config(memory_budget=memory_budget, max_length=2048, **keys)
    work = replace(full_rows(checked.batches), **rows)
    return make_plan(checked, lambda _: llama_8b(), H100, work, None)


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


def test_training_is_planned_as_without_evaluations_and_passes_get_the_rows_that_fit():
    for budget, tokens, rows in (("60GiB", 8192, 8), ("9.5GiB", 8192, 4), ("9.5GiB", 16384, 2)):
        alone, plan = planned({}, budget), planned({**LONG, "eval_batch": (8, tokens)}, budget)
        assert plan.fits and plan.option.knobs == alone.option.knobs
        assert plan.resolved.per_device_eval_batch_size == rows
        assert plan.resolved.source_of(EVAL_ROWS) == ("default" if rows == 8 else "plan")
        assert plan.option.footprint.peaks.training == alone.option.footprint.peak_bytes
    (choice,) = [one for one in plan.choices if one.key == EVAL_ROWS]
    assert choice.value == 2
    assert stable(choice.because).startswith("an evaluation with 8 rows at a time would need 20.")


def test_a_number_that_somebody_wrote_is_kept_and_the_error_names_it():
    keys = {"per_device_eval_batch_size": 8, "gradient_checkpointing": True, "base_precision": "nf4"}
    assert planned(LONG, "20GiB", **keys).resolved.per_device_eval_batch_size == 8
    plan = planned(LONG, "12GiB", base_offload=False, **keys)
    assert not plan.fits and plan.changes == [(EVAL_ROWS, 4)]
    assert "(evaluation)" in str(plan.refusal()) and "per_device_eval_batch_size: 4 (then " in str(plan.refusal())
    assert plan.to_json()["peak_at"] == "evaluation"
    assert plan.to_json()["peaks"]["evaluation"] == plan.to_json()["peak_bytes"] > 12 * GIB


def test_longer_answers_than_fit_are_named():
    work = {"eval_batch": (1, 500), "eval_labels": 100, "answers": (1, 500, 100_000)}
    plan = planned(work, "12GiB", base_offload=False, gradient_checkpointing=True)
    assert not plan.fits and plan.option.footprint.moment == "answers"
    assert plan.changes == [("max_new_tokens", 25_000)]
    assert plan.changed is not None and plan.changed.fits


def test_where_training_does_not_fit_evaluations_are_not_blamed():
    plan = planned(LONG, "4GiB", base_offload=False, per_device_train_batch_size=1)
    assert not plan.fits
    assert EVAL_ROWS not in dict(plan.changes)
    assert (EVAL_ROWS, 1, "it needs the least memory") in plan.choices
