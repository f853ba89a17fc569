"""Rows of an evaluation pass: as many as fit beside training, and what to change where a number is set."""

from __future__ import annotations

from dataclasses import replace

from planning.test_planner import GIB, H100, config, llama_8b

from solotune.config.settings import EVAL_ROWS
from solotune.planning.plan import Plan
from solotune.planning.planner import full_rows, make_plan
from tests.messages import stable

LONG = {"eval_batch": (8, 8192), "eval_labels": 400, "answers": (3, 500, 128)}


def planned(rows: dict, memory_budget: str, **keys) -> Plan:
    checked = config(memory_budget=memory_budget, max_length=2048, **keys)
    work = replace(full_rows(checked.batches), **rows)
    return make_plan(checked, lambda _: llama_8b(), H100, work, None)


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


def test_answers_that_fit_in_fewer_rows_do_not_refuse_a_number_that_somebody_wrote():
    """Generation takes halves where memory is short."""
    keys = {"per_device_eval_batch_size": 8, "gradient_checkpointing": True, "base_residency": "quantized"}
    keys["base_precision"] = "nf4"
    rows = {"eval_batch": (8, 500), "eval_labels": 100, "answers": (8, 500, 8_000)}
    most = planned(rows, "40GiB", **keys).option.footprint.peaks
    plan = planned(rows, "12GiB", base_offload=False, **keys)
    assert plan.fits and plan.resolved.per_device_eval_batch_size == 8
    assert plan.option.footprint.peaks.answers < 12 * GIB < most.answers
    assert plan.option.footprint.peaks.evaluation == most.evaluation


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
