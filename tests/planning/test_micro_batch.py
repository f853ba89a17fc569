"""A micro-batch of more rows where the copies of streamed layers set the pace."""

from __future__ import annotations

from dataclasses import replace

import pytest
from inline_snapshot import snapshot
from planning.test_planner import H100, config, llama_8b, planned

from solotune.config.settings import MICRO_BATCH
from solotune.planning.gpus import cpu_card
from solotune.planning.planner import full_rows, make_plan

SHORT = {
    "max_length": 256, "base_precision": "bf16", "memory_budget": "8GiB",
    "gradient_checkpointing": True, "activation_offload": True, "base_offload": True,
}  # fmt: skip


def test_rows_of_a_micro_batch_are_raised_where_copies_set_the_pace():
    plan = planned(**SHORT)
    chosen = {choice.key: choice for choice in plan.choices}
    rows, accumulation = plan.resolved.per_device_train_batch_size, plan.resolved.gradient_accumulation_steps
    assert rows * accumulation == 32 and rows > 4
    assert (chosen["per_device_train_batch_size"].value, chosen["gradient_accumulation_steps"].value) == (
        rows,
        accumulation,
    )
    assert chosen["per_device_train_batch_size"].because == snapshot(
        "each micro-batch copies 13.0 GiB of streamed layers twice: 10,996 tokens/s instead of 1,967"
    )
    assert {plan.resolved.source_of(key) for key in MICRO_BATCH} == {"plan"}
    kept = planned(**SHORT, per_device_train_batch_size=4)
    assert plan.option.seconds.tokens_per_second > 1.5 * kept.option.seconds.tokens_per_second


@pytest.mark.parametrize("keys", [{"per_device_train_batch_size": 4}, {"gradient_accumulation_steps": 8}])
def test_rows_that_somebody_wrote_are_kept_and_the_gain_is_named(keys):
    plan = planned(**SHORT, **keys)
    assert (plan.resolved.per_device_train_batch_size, plan.resolved.gradient_accumulation_steps) == (4, 8)
    assert not {choice.key for choice in plan.choices} & set(MICRO_BATCH)
    note = next(note for note in plan.notes if "set the pace" in note)
    faster = planned(**SHORT).option.seconds.tokens_per_second
    assert note.startswith("copies of streamed layers set the pace: per_device_train_batch_size: 32 with ")
    assert f"{faster:,.0f} tokens/s instead of {plan.option.seconds.tokens_per_second:,.0f}" in note


@pytest.mark.parametrize(
    "keys", [{**SHORT, "memory_budget": "40GiB", "base_offload": False}, {**SHORT, "max_length": 8192}]
)
def test_rows_stay_where_nothing_is_streamed_or_copies_cost_nothing(keys):
    plan = planned(**keys)
    assert plan.resolved.per_device_train_batch_size == 4
    assert not any("set the pace" in note for note in plan.notes)


def test_the_work_of_larger_micro_batches_is_counted_if_it_can_be():
    """Rows of other lengths are padded to the longest: twice the rows, and here three times the places."""
    checked, shape = config(**SHORT), llama_8b()
    work = full_rows(checked.batches)

    def padded(other):
        rows = other.per_device_train_batch_size
        places = {4: 256, 8: 400, 16: 700, 32: 1300}[rows]
        sizes = {"rows": rows, "accumulation": other.gradient_accumulation_steps, "tokens": places}
        return replace(work, **sizes, mean_tokens=places, real_share=256 / places)

    plan = make_plan(checked, lambda _: shape, H100, work, None, workloads=padded)
    assert plan.resolved.per_device_train_batch_size < planned(**SHORT).resolved.per_device_train_batch_size


def test_a_cpu_has_no_link_to_share():
    keys = {**SHORT, "base_precision": "fp32", "bf16": False, "memory_budget": "auto"}
    plan = planned(cpu_card(200 << 30, 100), free=190 << 30, **keys)
    assert plan.option.knobs.num_streamed == 32 and plan.resolved.per_device_train_batch_size == 4
