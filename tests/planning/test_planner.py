"""What a plan chooses, within what, and what it says where nothing fits; bytes and seconds by arithmetic alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from inline_snapshot import snapshot

from solotune.config.load import load_config
from solotune.config.run_config import RunConfig
from solotune.errors import InputError
from solotune.planning.gpus import CARDS, card_named, card_of, cpu_card
from solotune.planning.layer_profile import (
    EvaluationMoment,
    EvaluationPass,
    LayerCost,
    Linear,
    Matmul,
    MemoryStrategy,
    ModelShape,
    Pass,
    Polynomial,
    Workload,
)
from solotune.planning.memory import (
    footprint,
    logit_bytes,
    optimizer_bytes,
    quantisation_bytes,
    weight_bytes,
)
from solotune.planning.peak_memory import CATEGORIES
from solotune.planning.planner import bytes_of, full_rows, make_plan, precisions
from solotune.planning.throughput import seconds
from tests.messages import stable

GIB = 1 << 30
H100 = CARDS["h100"]


def llama_8b() -> ModelShape:
    """The Llama-3.1-8B shape with r=16 on q,k,v,o, as `shapes.model_shape` finds it."""
    layer = LayerCost(
        kept=Polynomial(851968, 94472),
        output=Polynomial(0, 8192),
        forward_peak=Polynomial(851968, 123144),
        backward_extra=Polynomial(0, 73728),
        forward=Pass((Matmul(Polynomial(0, 4.37e8), Polynomial(4.4e8, 1e5), True),), Polynomial(2.6e6, 295968), 39),
        backward=Pass((Matmul(Polynomial(0, 4.38e8), Polynomial(4.4e8, 1e5), True),), Polynomial(2.6e6, 549924), 48),
        how="compiled",
        evaluation=(EvaluationMoment(Polynomial(0, 102400)), EvaluationMoment(Polynomial(0, 73728), 14336 * 4096)),
    )
    evaluation = EvaluationPass(
        Polynomial(0, 16644), (EvaluationMoment(Polynomial(0, 49420)),), 8.0, 131072, 4096, 16384
    )
    nothing = Pass((), Polynomial(), 0)
    outside = LayerCost(
        Polynomial(0, 32772), Polynomial(0, 8192), Polynomial(0, 57872), Polynomial(0, 90108), nothing, nothing, "eager"
    )
    linears = (
        Linear(4096, 4096, 64, False, True),
        Linear(1024, 4096, 64, False, True),
        Linear(14336, 4096, 64, False, False),
        Linear(4096, 14336, 32, False, False),
    )
    one = tuple(linear._replace(count=linear.count // 32) for linear in linears)
    sizes = (4096, 128256, 32, 128, 131072)
    head = (outside, (4, 6), 1 << 27, 16, 2, True)
    return ModelShape(
        "llama", linears, 1050939392, *sizes, (layer,) * 32, *head, (one,) * 32, evaluation, 128256 * 4096
    )


def config(**keys: object) -> RunConfig:
    return load_config({"model_name_or_path": "m", "dataset": "d", **keys})


def planned(card=H100, free=None, shape=None, host=None, **keys):
    checked, known = config(**keys), shape or llama_8b()
    return make_plan(checked, lambda _: known, card, full_rows(checked.batches), free, host_free_bytes=host)


WORK = Workload(4, 2048, 2048, 1.0, 1.0, 2, None)
KNOBS = MemoryStrategy("nf4", True, False, 32, False, "paged_adamw_8bit", "cuda")

# --- bytes


def test_measured_steps_are_predicted():
    """One H100 80GB, 4 x 2048 full rows, r=16 on q,k,v,o (docs/decisions.md): GiB and tokens/s."""
    shape = llama_8b()
    used = footprint(shape, KNOBS, WORK, H100)
    assert used.peak_bytes / GIB == pytest.approx(9.01, rel=0.03)
    assert seconds(shape, KNOBS, WORK, H100).tokens_per_second == pytest.approx(11_271, rel=0.25)


def test_categories_are_the_designs_and_their_sum_is_the_peak():
    used = footprint(llama_8b(), KNOBS, WORK, H100)
    assert tuple(used.by_category) == CATEGORIES
    assert sum(used.by_category.values()) - used.paged_bytes == used.peak_bytes < used.card_bytes


def test_bytes_of_the_base_by_precision():
    shape = llama_8b()
    frozen, other = 6979321856, 2 * 1050939392
    for precision, mirrored, a_weight in (
        ("nf4", False, 0.5),
        ("nf4", True, 2.5),
        ("fp8", False, 2),
        ("bf16", False, 2),
    ):
        knobs = replace(KNOBS, base_precision=precision, has_dequantized_copy=mirrored)
        assert weight_bytes(shape, knobs) == a_weight * frozen + other
    # 4.127 bits a weight, of which 0.127 are the scales and theirs (QLoRA, section 3); 4.5 without the second
    assert 8 * quantisation_bytes(shape, KNOBS) / frozen == pytest.approx(0.127, abs=0.001)
    assert 8 * quantisation_bytes(shape, replace(KNOBS, is_double_quantised=False)) / frozen == pytest.approx(
        0.5, abs=1e-3
    )
    assert quantisation_bytes(shape, replace(KNOBS, base_precision="bf16")) == 0


def test_workspace_is_the_librarys_and_the_largest_weight_expanded():
    def workspace(card, work=WORK, **knobs):
        return footprint(llama_8b(), replace(KNOBS, **knobs), work, CARDS[card]).by_category["workspace"]

    widest = 14336 * 4096
    assert workspace("h100") == (64 << 20) + widest * 2 + widest // 16  # one for forward's thread, one for backward's
    assert workspace("h100", has_dequantized_copy=True) == workspace("h100", base_precision="fp8") == 64 << 20
    assert workspace("a100-80", base_precision="bf16") == (16 << 20) + (256 << 10)
    packed = replace(WORK, has_one_shape=True)  # recorded passes have theirs instead of those of the other passes
    assert workspace("h100", packed, has_dequantized_copy=True) == 64 << 20
    assert workspace("h100", packed, has_dequantized_copy=True, is_offloaded=True) == 64 << 20


def test_logits_are_a_chunk_of_the_supervised_ones():
    shape = llama_8b()
    few = replace(WORK, supervised_share=0.1)  # 819 of the 8,192 tokens, less than a chunk of 1,046
    assert logit_bytes(shape, few) == pytest.approx(819.2 * 128256 * 4)
    assert logit_bytes(shape, WORK) == 1046 * 128256 * 6


def test_long_rows_go_through_a_checkpointed_mlp_in_parts():
    shape = llama_8b()
    size = {t: footprint(shape, KNOBS, replace(WORK, rows=1, tokens=t), H100) for t in (16384, 65536)}
    kept = {t: 33 * 8192 * t for t in size}
    assert size[65536].moment == "backward"
    over = {t: size[t].by_category["activations"] - kept[t] for t in size}
    assert over[65536] < 3.1 * over[16384]  # and not 4 times


def test_optimizer_bytes():
    shape = llama_8b()
    whole, paged = optimizer_bytes(shape, replace(KNOBS, optim="adamw_torch"))
    assert (whole, paged) == (8 * shape.num_trainable, 0)
    whole, paged = optimizer_bytes(shape, replace(KNOBS, optim="adamw_8bit"))
    assert whole == pytest.approx((2 + 8 / 256) * shape.num_trainable)
    assert paged == 0
    assert optimizer_bytes(shape, KNOBS) == (whole, 2 * shape.num_trainable)
    tiny = replace(shape, linears=(Linear(48, 100, 1, False, True),))
    assert optimizer_bytes(tiny, KNOBS) == (8 * (1792 + 768), 0)  # too few for 8 bits; padded to blocks of 256


def test_each_checkpointed_layer_takes_less_and_longer():
    shape = llama_8b()
    options = [replace(KNOBS, num_checkpointed=n) for n in range(33)]
    sizes = [footprint(shape, knobs, WORK, H100).peak_bytes for knobs in options]
    times = [seconds(shape, knobs, WORK, H100).step for knobs in options]
    assert sizes == sorted(sizes, reverse=True)
    assert times == sorted(times)
    assert sizes[0] - sizes[31] > 20 * GIB
    # a layer less kept is what it keeps beside its input
    assert sizes[10] - sizes[11] == pytest.approx((94472 - 8192) * 8192 + 851968, abs=2)


def test_offloading_takes_the_inputs_off_the_card():
    shape, long = llama_8b(), replace(WORK, rows=1, tokens=65536)
    there, off = (footprint(shape, replace(KNOBS, is_offloaded=o), long, H100) for o in (False, True))
    assert off.host.activations == off.host_bytes == 31 * 8192 * 65536  # the last checkpointed layer's stays
    assert there.host_bytes == 0
    assert there.peak_bytes - off.peak_bytes > 0.9 * off.host_bytes
    assert seconds(shape, replace(KNOBS, is_offloaded=True), long, H100).step > seconds(shape, KNOBS, long, H100).step


# --- choices


def test_a_large_card_keeps_all_and_a_small_one_less():
    large = planned()
    assert large.fits
    assert {c.key: c.value for c in large.choices} == {"gradient_checkpointing": False, "base_residency": "dequantized"}
    small = planned(CARDS["l4"])
    chosen = {c.key: c.value for c in small.choices}
    assert small.fits
    assert chosen["base_residency"] == "quantized"
    assert 0 < chosen["gradient_checkpointing"] < 32
    assert small.option.footprint.peak_bytes < small.budget.bytes
    assert all(choice.because for choice in (*large.choices, *small.choices))


def test_the_chosen_is_the_fastest_that_fits():
    plan = planned(memory_budget="20GiB")
    fewer = replace(plan.option.knobs, num_checkpointed=plan.option.knobs.num_checkpointed - 1)
    assert not plan.budget.holds(footprint(llama_8b(), fewer, full_rows(config().batches), H100))
    assert plan.resolved.gradient_checkpointing == plan.option.knobs.num_checkpointed
    assert plan.resolved.source_of("gradient_checkpointing") == "plan"


def test_keys_that_are_set_are_left_alone():
    plan = planned(gradient_checkpointing=True, base_residency="quantized", activation_offload=False)
    assert plan.choices == []
    assert plan.resolved.gradient_checkpointing is True
    assert plan.option.knobs == replace(KNOBS, is_offloaded=False)


def test_offload_is_chosen_only_where_nothing_else_fits():
    keys = {"max_length": 100_000, "per_device_train_batch_size": 1, "memory_budget": "24GiB"}
    plan = planned(**keys)
    assert plan.fits and plan.option.knobs.is_offloaded
    assert {c.key: c.value for c in plan.choices}["activation_offload"] is True
    assert not planned(**{**keys, "max_length": 8192}).option.knobs.is_offloaded


@pytest.mark.parametrize(
    ("card", "order"),
    [("h100", ["fp8", "nf4"]), ("4090", ["fp8", "nf4"]), ("a100-80", ["bf16", "nf4"]), ("t4", ["fp32", "nf4"])],
)
def test_precision_by_quality_then_by_what_fits(card, order):
    assert precisions(config(base_precision="auto").memory, CARDS[card]) == order
    assert precisions(config().memory, CARDS[card]) == ["nf4"]
    assert "fp8" not in precisions(config(base_precision="auto", matmul_precision="bf16").memory, CARDS[card])


def test_auto_precision_falls_back_to_nf4_and_says_why():
    assert planned(base_precision="auto").resolved.base_precision == "fp8"
    assert planned(CARDS["a100-40"], base_precision="auto").resolved.base_precision == "bf16"
    plan = planned(CARDS["3060"], base_precision="auto")
    assert plan.resolved.base_precision == "nf4"
    assert ("base_precision", "nf4", "only 4 bits fit") in plan.choices


# --- budgets


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * GIB),
        ("9.5 GiB", int(9.5 * GIB)),
        ("24GB", 24 * 10**9),
        ("500 MiB", 500 << 20),
        (".5GiB", GIB // 2),
    ],
)
def test_sizes(text, size):
    assert bytes_of(text) == size
    assert config(memory_budget=text).memory_budget == text


@pytest.mark.parametrize("wrong", ["24", "24 G", "lots", "-3GiB", "0GiB", 0.0, 1.0, 1.5, -0.5, 24, "1.2.3GiB"])
def test_what_is_no_budget_is_refused(wrong):
    with pytest.raises(InputError) as caught:
        config(memory_budget=wrong)
    assert stable(caught.value).replace(f"{wrong!r} ({type(wrong).__name__})", "<wrong>") == snapshot(
        "python, memory_budget: <wrong> is not allowed; allowed: auto, a fraction of the GPU's memory between 0 and 1 (0.9), or a size (24GiB, 9.5 GiB, 24GB)"
    )


def test_a_share_and_auto():
    assert planned(memory_budget=0.5).budget.bytes == H100.memory_bytes // 2
    assert planned().budget.bytes == int(0.94 * H100.memory_bytes)
    free = planned(free=30 * GIB)
    assert free.budget.bytes < 30 * GIB
    assert "30.0 GiB of 79.1 GiB are free" in free.budget.because
    assert free.option.footprint.card_bytes < 30.5 * GIB  # its context is there already


def test_a_budget_does_not_help_where_another_process_has_the_card():
    assert not planned(free=6 * GIB, memory_budget="20GiB", base_offload=False).fits


def test_more_than_the_card_has_is_refused():
    with pytest.raises(InputError) as raised:
        planned(CARDS["l4"], memory_budget="24GiB")
    assert stable(raised.value) == snapshot("""\
python, memory_budget: more than the memory of the card
  seen:    memory_budget: 24GiB
  allowed: at most 22.0 GiB, the memory of l4
  change:  memory_budget: auto\
""")


# --- where nothing fits


def test_the_nearest_change_is_named_and_works():
    plan = planned(memory_budget="9.5GiB", gradient_checkpointing=False)
    assert not plan.fits
    assert plan.changes == [("gradient_checkpointing", "auto")]
    error = plan.refusal()
    assert error.exit_code == 3
    assert str(error).startswith("the run does not fit in memory\n  seen:    ")
    assert "change:  gradient_checkpointing: auto (then " in str(error)
    assert planned(memory_budget="9.5GiB", gradient_checkpointing="auto").fits


def test_a_smaller_micro_batch_keeps_the_step_as_it_is():
    keys = {"memory_budget": "8GiB", "activation_offload": False, "base_offload": False}
    plan = planned(**keys)
    assert dict(plan.changes) == {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 16}
    assert planned(**keys, **dict(plan.changes)).fits


def test_several_changes_where_one_does_not_do():
    keys = {"memory_budget": "6.5GiB", "base_precision": "fp8", "base_offload": False}
    plan = planned(**keys, gradient_checkpointing=False, host=1 * GIB)  # too little to stream the base from
    changes = dict(plan.changes)
    assert len(changes) > 1
    assert changes["base_precision"] == "nf4"
    assert planned(**{**keys, "gradient_checkpointing": False, **changes}, host=1 * GIB).fits


def test_where_no_change_helps_a_larger_card_is_named():
    plan = planned(memory_budget="4GiB")
    assert plan.changes == [] and plan.changed is None
    assert plan.suggestion().startswith("a smaller model, or a card with ")


# --- cards


def test_cards_are_found_by_name():
    assert card_named("H100").name == card_named("nvidia-h100").name == "h100"
    assert card_named("RTX 4090").name == "4090"
    assert card_named("a100").name == "a100-80"
    with pytest.raises(InputError) as raised:
        card_named("h10")
    assert "t4, " in (raised.value.allowed or "")
    assert raised.value.change == "--gpu h100"


def test_the_card_that_is_here_has_its_own_memory():
    here = card_of("NVIDIA H100 80GB HBM3", 84_900_000_000, (9, 0))
    assert (here.name, here.memory_bytes, here.fp8_tflops) == ("h100", 84_900_000_000, 1979)
    unknown = card_of("NVIDIA RTX 9999", 50 * GIB, (8, 6))
    assert unknown.name == "NVIDIA RTX 9999 (rates of a6000)"
    assert not unknown.has_fp8


def test_every_card_is_plausible():
    for card in CARDS.values():
        assert 7 * GIB < card.memory_bytes < 200 * GIB
        assert card.has_fp8 == (card.compute_capability >= (8, 9))
        assert card_of(card.shown_as[0], card.memory_bytes, card.compute_capability).name == card.name


def test_a_cpu_is_planned_by_its_resident_memory():
    plan = planned(cpu_card(16 * GIB, 100), free=15 * GIB, bf16=False, base_precision="fp32", memory_budget="auto")
    assert plan.card.is_cpu
    assert plan.option.footprint.outside_bytes == plan.option.footprint.paged_bytes == 0
