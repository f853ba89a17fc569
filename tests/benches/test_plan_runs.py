"""bench.plan_runs: its cases are configs that are accepted and planned, and its summary has their errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planning.test_planner import GIB, llama_8b

from bench.plan_cases import CASES, MODELS, SETS
from bench.plan_runs import _batches, config_of, plan_on, summary
from solotune.hardware.machine import probe, resolve_for_machine
from solotune.planning.gpus import CARDS
from solotune.planning.layer_profile import Linear
from solotune.planning.plan_inputs import for_card, shapes_of

H200 = CARDS["h200"]


def shape_of(model):
    """The 8B shape with the layers' sizes of another: bytes of weights are right, activations are not."""
    sizes = MODELS[model]
    hidden, inner, depth = (sizes[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    kv = sizes["num_key_value_heads"] * sizes.get("head_dim", hidden // sizes["num_attention_heads"])
    each = ((hidden, hidden, 2, True), (kv, hidden, 2, True), (inner, hidden, 2, False), (hidden, inner, 1, False))
    one = tuple(Linear(out, into, count, False, is_adapted) for out, into, count, is_adapted in each)
    table, shape = sizes["vocab_size"] * hidden, llama_8b()
    tied = sizes["tie_word_embeddings"]
    return replace(
        shape,
        linears=tuple(linear._replace(count=linear.count * depth) for linear in one),
        layer_linears=(one,) * depth,
        layers=(shape.layers[0],) * depth,
        other_parameters=table * (1 if tied else 2),
        embedding_parameters=0 if tied else table,
    )


@pytest.fixture(scope="module")
def machine():
    return for_card("h200", probe())


def planned(case, folder, shapes, machine):
    config, _ = resolve_for_machine(config_of(case, folder), machine)
    return plan_on(H200, config, case, shapes, None, 128 * GIB)


def test_every_set_has_its_cases_and_every_config_loads(tmp_path):
    assert len({case.name for case in CASES}) == len(CASES)
    assert len(SETS["resident"]) >= 30
    assert sum("base_offload=true" in case.overrides for case in SETS["streamed"]) >= 12
    for case in CASES:
        config = config_of(case, tmp_path)
        assert (config.max_length, config.per_device_train_batch_size) == (case.tokens, case.rows)


@pytest.mark.parametrize("name", ["streamed", "70B"])
def test_every_streamed_case_is_planned_for_a_card_and_streams(name, tmp_path, machine):
    shapes = {model: shape_of(model) for model in MODELS}
    for case in SETS[name]:
        plan = planned(case, tmp_path, lambda _, of=case.model: shapes[of], machine)
        knobs = plan.option.knobs
        assert plan.fits, case.name
        is_wanted = "base_offload=false" not in case.overrides
        assert bool(knobs.num_streamed) == bool(plan.option.footprint.host.layers) == is_wanted, case.name
        assert knobs.is_offloaded or "activation_offload=true" not in case.overrides
        rows = plan.resolved.per_device_train_batch_size
        assert rows == (32 if case.rows_are_open else case.rows), case.name


@pytest.mark.slow
def test_every_streamed_case_is_planned_from_the_models_own_layers(tmp_path, machine):
    shapes = shapes_of()
    for case in (*SETS["streamed"], *SETS["70B"]):
        assert planned(case, tmp_path, shapes, machine).fits, case.name


def test_cases_of_one_shape_share_a_process_and_no_process_has_many():
    numbers = [number for number, case in enumerate(CASES) if case in SETS["streamed"]]
    batches = _batches(numbers, 8)
    assert sorted(number for batch in batches for number in batch) == numbers
    assert max(map(len, batches)) <= 3
    assert all(len({CASES[number].model for number in batch}) == 1 for batch in batches)


def test_the_summary_has_the_errors():
    results = [
        {
            "case": "a",
            "predicted": {
                "peak_bytes": peak,
                "tokens_per_second": 1,
                "seconds": {"step": step},
                "host_by_category": {"layers": 90, "embedding": 7, "activations": 15},
            },
            "measured": {"peak_bytes": 100, "tokens_per_second": 1, "step_seconds": 2.0, "host_bytes": pinned},
        }
        for peak, step, pinned in ((101, 2.2, 100), (97, 1.8, 0), (102, 3.0, 105))
    ]
    text = summary([*results, {"case": "b", "error": "out of memory"}])
    assert "3 runs. Peak: median error 2.0%, worst 3.0%, most under -3.0%." in text
    assert "Step: median error 10.0%, worst 50.0%." in text
    assert "Pinned host memory: worst error 5.0% of 2 runs." in text
    assert "| b | out of memory |" in text
