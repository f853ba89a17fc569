"""Plans of several ranks: what they choose, what it takes and gives, and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from inline_snapshot import snapshot
from planning.test_planner import H100, KNOBS, WORK, config, llama_8b

from solotune.errors import InputError
from solotune.planning import constants as known
from solotune.planning.gpus import CARDS, cards_named
from solotune.planning.memory import footprint, joined_weights, stored_bytes
from solotune.planning.planner import full_rows, make_plan
from solotune.planning.throughput import all_reduce, seconds, streaming

GIB = 1 << 30
BF16 = replace(KNOBS, base_precision="bf16")


def planned_on(count: int, card=H100, host=None, local=None, **keys):
    """A plan for so many ranks, all on one machine if not said otherwise."""
    checked, shape = config(**keys).on_ranks(count), llama_8b()
    work = replace(full_rows(checked.batches), local_ranks=local or count)
    return make_plan(checked, lambda _: shape, card, work, None, host_free_bytes=host)


# --- cards


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [("h100x2", "h100", 2), ("4090x8", "4090", 8), ("RTX 4090 x4", "4090", 4), ("rtx4090", "4090", 1),
     ("a100-40X16", "a100-40", 16), ("h100x1", "h100", 1), ("6000-ada", "6000-ada", 1)],
)  # fmt: skip
def test_cards_and_their_number(text, name, count):
    assert (cards_named(text).card.name, cards_named(text).count) == (name, count)


@pytest.mark.parametrize("text", ["h100x0", "h100x1000", "h100x", "h100x-2", "h100 x 17"])
def test_a_number_that_no_machine_has_is_refused(text):
    with pytest.raises(InputError) as raised:
        cards_named(text)
    error = raised.value
    assert error.problem == "command line, --gpu: not a number of GPUs in one machine"
    assert (error.seen, error.allowed, error.change) == (text, "a card, then x1 to x16", "--gpu h100x2")


@pytest.mark.parametrize(("text", "change"), [("2xh100", "h100x2"), ("h10x4", "h100x4"), ("8x4090", "4090x8")])
def test_what_was_meant_is_named(text, change):
    with pytest.raises(InputError) as raised:
        cards_named(text)
    assert raised.value.change == f"--gpu {change}"


def test_links_between_cards():
    assert (H100.peer_link, H100.peer_bytes, H100.all_reduce_bytes) == ("NVLink", 0.83 * 450e9, 0.69 * 450e9)
    card = CARDS["4090"]  # PCIe 4: 24.7 GB/s; an all-reduce goes to the host and from there to the next card
    assert (card.peer_link, card.peer_bytes, card.all_reduce_bytes) == ("PCIe", 24.7e9, 12.35e9)
    assert H100.has_peer_access and not card.has_peer_access
    assert H100.beside(1).link_bytes == 55e9 and H100.beside(7).link_bytes == 25e9  # 200 GB/s for all


# --- bytes and seconds


def test_an_all_reduce_sends_its_bytes_nearly_twice():
    fixed = known.ALL_REDUCE_SECONDS
    assert all_reduce(10**9, 1, 1e9) == 0
    assert all_reduce(400 * 10**6, 2, 100e9) == pytest.approx(fixed + 2 * (known.HOP_SECONDS + 0.002))
    assert all_reduce(400 * 10**6, 8, 100e9) == pytest.approx(fixed + 14 * (known.HOP_SECONDS + 0.0005))


def test_measured_all_reduces_are_predicted():
    """Two H200, NCCL, one after the other, so without the loop that waits: milliseconds by megabytes."""
    waits = 1e-4
    for size, measured in ((1, 0.047), (56, 0.224), (168, 0.583), (512, 1.698)):
        found = all_reduce(size * 10**6, 2, CARDS["h200"].all_reduce_bytes) - waits
        assert 1e3 * found == pytest.approx(measured, rel=0.05)


def test_ranks_add_one_all_reduce_to_a_step_and_multiply_its_rows():
    shape = llama_8b()
    alone, both = (seconds(shape, KNOBS, replace(WORK, ranks=n, local_ranks=n), H100) for n in (1, 2))
    assert alone.communication == 0
    assert both.communication == all_reduce(4 * joined_weights(shape), 2, 0.69 * 450e9)
    assert both.step == pytest.approx(alone.step + both.communication)
    assert both.tokens_per_second == pytest.approx(2 * WORK.tokens_per_step / both.step)
    used = [footprint(shape, KNOBS, replace(WORK, ranks=n), H100) for n in (1, 2)]
    assert used[0].peak_bytes == used[1].peak_bytes
    assert used[1].card_bytes - used[0].card_bytes == known.NCCL_BYTES


@pytest.mark.parametrize("count", [2, 8])
def test_a_sharded_base_is_its_part_and_two_layers(count):
    shape, sharded = llama_8b(), replace(BF16, num_shards=count)
    frozen, layer = 2 * 6979321856, sum(stored_bytes(shape, 0, BF16))
    used = footprint(shape, sharded, WORK, H100)
    table = 2 * 128256 * 4096  # the token embedding, which goes to the host
    assert used.by_category["weights"] == frozen // count + 2 * 1050939392 - table + 2 * layer
    assert used.peers_bytes == frozen - frozen // count
    assert used.host_bytes == table


def test_a_sharded_step_is_as_long_as_its_copies_over_a_slow_link_and_else_as_its_compute():
    shape, sharded = llama_8b(), replace(BF16, num_shards=4)
    at = [seconds(shape, sharded, WORK, replace(H100, nvlink_bytes=speed)).step for speed in (1e9, 450e9, 1e15)]
    # all layers but the two that are there, each way: three quarters of them from the others, at 0.83 GB/s
    copied = 2 * (2 * 6979321856 * 30 / 32) * 3 / 4
    assert at[0] == pytest.approx(copied / 0.83e9 * WORK.accumulation, rel=0.1)
    layer = sum(stored_bytes(shape, 0, BF16))
    copies = 64 * WORK.accumulation * (layer * 3 / 4 / (0.83 * 450e9) + 2 * layer / 4 / H100.bandwidth_bytes)
    # products are slower while a copy is under way; else the copies are hidden
    assert at[1] == pytest.approx(seconds(shape, BF16, WORK, H100).step + (1 / 0.87 - 1) * copies, rel=0.02)
    resident = seconds(shape, BF16, WORK, H100).step
    assert resident <= at[2] == pytest.approx(resident, rel=0.05)


def test_inputs_from_the_host_and_weights_from_other_cards_do_not_share_a_link():
    copies = [1.0] * 50, [0.6] * 50
    assert streaming(*copies, arriving=[0, *[0.6] * 49], one_link=False) == pytest.approx(50, rel=0.02)
    assert streaming(*copies, arriving=[0, *[0.6] * 49]) == pytest.approx(60, rel=0.05)


# --- choices

SMALL: dict[str, Any] = {
    "base_precision": "bf16",
    "memory_budget": "8GiB",
    "gradient_checkpointing": True,
    "max_length": 512,
}
ROWS: dict[str, Any] = {"per_device_train_batch_size": 4}


def test_a_base_that_fits_is_on_each_card():
    plan = planned_on(2)
    assert plan.option.knobs.num_shards == 1 and plan.option.knobs.num_streamed == 0
    assert plan.resolved.base_sharding is False and plan.resolved.source_of("base_sharding") == "plan"
    assert "base_sharding" not in {choice.key for choice in plan.choices}
    assert config().on_ranks(1).base_sharding == "auto" == planned_on(1).resolved.base_sharding


def test_a_base_that_does_not_fit_is_sharded_over_nvlink_and_the_plan_says_why():
    plan = planned_on(4, **SMALL, **ROWS)
    assert plan.fits and plan.option.knobs.num_shards == 4 and plan.option.knobs.num_streamed == 0
    assert (plan.resolved.base_sharding, plan.resolved.base_offload) == (True, False)
    (choice,) = [choice for choice in plan.choices if choice.key == "base_sharding"]
    assert choice.because == snapshot(
        "the base does not fit; each of 4 GPUs holds 3.2 GiB of its layers, and copies the rest from the others over NVLink; 47,226 tokens/s, streamed from host memory 22,244 tokens/s"
    )
    streamed = planned_on(4, **SMALL, **ROWS, base_sharding=False)
    assert streamed.option.knobs.num_streamed and streamed.resolved.base_sharding is False
    assert plan.option.seconds.step < streamed.option.seconds.step
    assert plan.option.instead is not None and plan.option.instead.knobs.num_streamed


def test_the_fastest_that_fits_is_taken():
    slow = replace(H100, nvlink_bytes=10e9)  # slower than the link to the host
    plan = planned_on(4, slow, **SMALL, **ROWS)
    (choice,) = [choice for choice in plan.choices if choice.key == "base_offload"]
    assert plan.option.knobs.num_streamed and ", sharded " in choice.because
    assert planned_on(4, slow, **SMALL, **ROWS, host=1 * GIB).option.knobs.num_shards == 4  # the host is too small


def test_cards_that_do_not_read_each_others_memory_stream_from_the_host():
    plan = planned_on(4, CARDS["4090"], **SMALL)
    assert plan.option.knobs.num_streamed and plan.option.instead is None
    wanted = planned_on(4, CARDS["4090"], **SMALL, base_sharding=True)
    assert wanted.option.knobs.num_shards == 4
    assert any(note.startswith("base_sharding needs GPUs that read each other's memory") for note in wanted.notes)


def test_sharding_is_named_where_a_config_forbids_it():
    keys = {**SMALL, "base_offload": False, "activation_offload": False, "per_device_train_batch_size": 1}
    plan = planned_on(4, **keys, base_sharding=False)
    assert plan.changes == [("base_sharding", "auto")]
    assert planned_on(4, **keys).fits and not planned_on(1, **keys).fits


def test_a_dequantized_copy_stays_on_the_card():
    plan = planned_on(2, base_residency="dequantized", memory_budget="8GiB")
    assert not plan.fits
    assert ("base_residency", "auto") in plan.changes


def test_more_rows_do_not_move_a_sharded_base_to_the_host():
    plan = planned_on(4, **SMALL)
    assert plan.resolved.per_device_train_batch_size > 4
    assert (plan.resolved.base_sharding, plan.resolved.base_offload) == (True, False)


def test_copies_of_short_micro_batches_ask_for_more_rows():
    keys = {**SMALL, "max_length": 128, "base_sharding": True, "gradient_checkpointing": True}
    plan = planned_on(4, replace(H100, nvlink_bytes=60e9), **keys)
    chosen = {choice.key: choice for choice in plan.choices}
    assert "of sharded layers twice" in chosen["per_device_train_batch_size"].because
    assert chosen["gradient_accumulation_steps"].because == "the same 128 rows a step"
    kept = planned_on(4, replace(H100, nvlink_bytes=60e9), **keys, per_device_train_batch_size=4)
    assert any(note.startswith("copies of sharded layers set the pace") for note in kept.notes)


# --- what the ranks share


def test_each_rank_pins_its_own_host_memory():
    keys = {**SMALL, "base_offload": True}
    one, two = planned_on(1, **keys, host=64 * GIB), planned_on(2, **keys, host=64 * GIB)
    assert one.option.footprint.host_bytes == two.option.footprint.host_bytes
    rows = dict(two.host_memory())
    assert rows["pinned host memory of 2 ranks"] == 2 * two.option.footprint.host_bytes
    assert two.notes[0].startswith("each rank pins its own host memory: ")
    small = planned_on(2, **keys, host=9 * GIB)
    assert small.lacks_host_memory
    error = small.refusal()
    assert "to pin for each of 2 ranks" in str(error.seen)
    assert "the 9.0 GiB that are free for each of 2 ranks" in str(error.allowed)
    assert planned_on(2, **keys, host=9 * GIB).suggestion() == snapshot(
        "base_precision: nf4 (then 2.8 GiB, 20,175 tokens/s)"
    )


def test_the_host_memory_has_one_bandwidth_for_all_cards():
    keys = {**SMALL, "base_offload": True}
    alone, eight = planned_on(1, **keys), planned_on(8, H100.beside(7), **keys)
    assert eight.option.seconds.tokens_per_second < 8 * alone.option.seconds.tokens_per_second


def test_what_a_plan_of_ranks_shows():
    plan = planned_on(4, **SMALL)
    assert plan.times() == snapshot(
        {
            "load": "0:07",
            "first step": "0:13",
            "step": "1.33 s, 49,268 tokens/s on 4 GPUs (predicted)",
            "each GPU": "12,317 tokens/s, 16 x 2 of the 128 rows of a step",
            "all-reduce": "0.4 ms a step, over NVLink, 310 GB/s (predicted)",
            "sharding": "9.8 GiB of layers from the other GPUs in each pass, at 374 GB/s",
            "link": "55.0 GB/s from host memory to the card, as such cards have; solotune doctor measures it",
        }
    )
    found = plan.to_json()["ranks"]
    assert found == {
        "size": 4,
        "on_one_machine": 4,
        "rows_per_step": plan.ranks.rows_per_step,
        "tokens_per_second_per_gpu": plan.option.seconds.tokens_per_second / 4,
        "communication_seconds": plan.option.seconds.communication,
        "link": "NVLink",
        "all_reduce_bytes_per_second": 0.69 * 450e9,
        "copy_bytes_per_second": 0.83 * 450e9,
        "bytes_on_other_gpus": 2 * 6979321856 * 3 // 4,
        "host_bytes_of_all": 4 * plan.option.footprint.host_bytes,
    }
    assert plan.ranks.rows_per_step == 128
    assert "ranks" not in planned_on(1).to_json() and "each GPU" not in planned_on(1).times()


def test_what_all_gpus_of_a_machine_give_beside_one():
    both, alone = planned_on(2), planned_on(1)
    rate = f"{both.option.seconds.tokens_per_second:,.0f} tokens/s (predicted): torchrun ..."
    assert both.compared_with(alone, "torchrun ...") == [f"on the 2 GPUs of this machine: 2.00 times as fast, {rate}"]
    large = {**SMALL, "base_offload": False, "activation_offload": False, "memory_budget": "9GiB"}
    (note,) = planned_on(4, **large).compared_with(planned_on(1, **large), "torchrun ...")
    assert note.startswith("on the 4 GPUs of this machine: it fits there, ")
    nothing = planned_on(2, **large, base_sharding=False)
    assert nothing.compared_with(alone, "torchrun ...") == []


def test_the_network_between_machines_is_not_known():
    plan = planned_on(4, local=2)
    assert any("4 ranks, 2 of them on a machine: the time of the network" in note for note in plan.notes)
    assert planned_on(8, local=4, **SMALL).option.knobs.num_shards == 4  # within a machine
