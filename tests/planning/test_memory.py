"""What a plan says of frozen layers that stream from host memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from inline_snapshot import snapshot
from planning.test_planner import GIB, H100, KNOBS, WORK, llama_8b, planned

from solotune.planning.gpus import CARDS, cpu_card
from solotune.planning.memory import _moments, footprint, host_memory, ring_bytes, stored_bytes
from solotune.planning.throughput import seconds, streaming
from tests.messages import stable


def test_layers_stream_only_where_no_precision_fits_on_the_card():
    assert planned(memory_budget="10GiB").resolved.base_offload is False
    small = planned(memory_budget="6GiB", base_precision="auto")
    assert small.fits and small.option.knobs.num_streamed
    assert small.resolved.base_precision == "nf4"
    assert {choice.key for choice in small.choices} >= {"base_offload", "base_precision"}
    assert not planned(memory_budget="6GiB", base_offload=False).fits


def test_as_few_layers_stream_as_the_budget_allows_where_copies_cost_time():
    slow = replace(H100, link_bytes=2e9)
    keys = {"gradient_checkpointing": True, "activation_offload": False}
    numbers = [planned(slow, memory_budget=f"{size}GiB", **keys).option.knobs.num_streamed for size in (6, 7, 8)]
    assert numbers == sorted(numbers, reverse=True) and numbers[0] > numbers[-1] > 0


def test_a_number_of_the_config_is_kept():
    for wanted, number in ((True, 32), (5, 5), (99, 32), (False, 0)):
        assert planned(memory_budget="40GiB", base_offload=wanted).option.knobs.num_streamed == number


def test_the_card_holds_two_streamed_layers_and_the_host_all_of_them_and_the_embedding():
    """8B, NF4, 4 x 2,048, every layer checkpointed, one H200: 5.55 GiB with the embedding on the card, 8.70 with all."""
    streamed = replace(KNOBS, num_streamed=32)
    used, resident = (footprint(llama_8b(), knobs, WORK, H100) for knobs in (streamed, KNOBS))
    host, card = used.host, sum(ring_bytes(llama_8b(), streamed))
    assert card * 16 == host.layers
    assert (host.embedding, host.activations) == (2 * 128256 * 4096, 0)
    assert resident.peak_bytes - used.peak_bytes == pytest.approx(used.host_bytes - card, rel=1e-6)
    assert (used.peak_bytes + host.embedding) / GIB == pytest.approx(5.55, rel=0.05)
    assert host.in_words() == "4.3 GiB (3.4 of frozen layers, 1.0 of the embedding)"


def test_a_slot_of_the_ring_is_as_large_as_the_largest_streamed_layer():
    wide = tuple(linear._replace(out_features=2 * linear.out_features) for linear in llama_8b().layer_linears[0])
    shape = replace(llama_8b(), layer_linears=(*llama_8b().layer_linears[1:], wide))
    all_of_them, but_the_last = (replace(KNOBS, num_streamed=number) for number in (32, 16))  # 16: every other one
    assert sum(ring_bytes(shape, all_of_them)) == 2 * sum(stored_bytes(shape, 31, KNOBS))
    assert sum(ring_bytes(shape, but_the_last)) == 2 * sum(stored_bytes(shape, 0, KNOBS))
    assert host_memory(shape, all_of_them, WORK).layers == sum(
        sum(stored_bytes(shape, number, KNOBS)) for number in range(32)
    )


def test_a_table_that_is_the_head_too_stays_on_the_card():
    tied, streamed = replace(llama_8b(), embedding_parameters=0), replace(KNOBS, num_streamed=32)
    assert footprint(tied, streamed, WORK, H100).host.embedding == 0
    assert footprint(llama_8b(), KNOBS, WORK, H100).host.embedding == 0  # no layer is streamed


def test_the_card_holds_the_inputs_of_two_checkpointed_layers_if_they_are_offloaded():
    """Beside the input of the layer that runs, the one before it; after the last checkpointed layer, its own too."""
    row, kept = 8192 * 8192, 94472 * 8192 + 851968
    for count, before_last in (
        (32, 2 * row),
        (20, 3 * row + 11 * kept),
        (1, 2 * row + 30 * kept),
        (0, row + 31 * kept),
    ):
        knobs = replace(KNOBS, num_checkpointed=count, is_offloaded=True)
        moments = [m for m in _moments(llama_8b(), knobs, WORK) if m.name == "forward"]
        assert moments[-1].activations - (123144 * 8192 + 851968) == pytest.approx(before_last)
        assert host_memory(llama_8b(), knobs, WORK).activations == max(0, count - 1) * row
    first, second, *_ = [m.activations for m in _moments(llama_8b(), replace(KNOBS, is_offloaded=True), WORK)]
    assert second - first == row


def test_on_a_cpu_streamed_layers_are_in_the_same_memory():
    streamed, cpu = replace(KNOBS, num_streamed=32, device="cpu"), cpu_card(64 * GIB, 100)
    used, resident = (footprint(llama_8b(), knobs, WORK, cpu) for knobs in (streamed, replace(KNOBS, device="cpu")))
    assert used.peak_bytes - resident.peak_bytes == pytest.approx(sum(ring_bytes(llama_8b(), streamed)), rel=1e-6)


def test_a_host_without_the_memory_is_no_place_for_the_base():
    assert planned(memory_budget="6GiB", host=8 * GIB).fits
    small = {"memory_budget": "5GiB", "per_device_train_batch_size": 1, "max_length": 128}
    plan = planned(**small, host=1 * GIB)
    assert plan.lacks_host_memory and plan.changes == []
    assert stable(plan.refusal()) == snapshot("""\
the run does not fit in host memory
  seen:    1.4 GiB (0.4 of frozen layers, 1.0 of the embedding) to pin; the GPU would hold 4.9 GiB
  allowed: 922 MiB: 90% of the 1.0 GiB that are free
  change:  1.6 GiB of free host memory, a smaller model, or a larger card\
""")
    assert not planned(**small, base_offload=False, host=1 * GIB).lacks_host_memory


def test_a_plan_that_is_not_for_this_machine_says_what_to_have():
    assert planned(memory_budget="6GiB").notes[0] == snapshot(
        "it pins 6.0 GiB (3.4 of frozen layers, 1.0 of the embedding, 1.7 of activations) of host memory; not compared with a host's memory (solotune plan --host-memory 64GiB does)"
    )
    assert not any("host" in note for note in planned(memory_budget="6GiB", host=64 * GIB).notes)


def test_streaming_is_named_where_a_config_forbids_it():
    plan = planned(memory_budget="6GiB", base_offload=False, per_device_train_batch_size=1)
    assert plan.changes == [("base_offload", "auto")]
    assert planned(memory_budget="6GiB", per_device_train_batch_size=1).fits


# --- seconds


def test_copies_beside_longer_compute_cost_nothing_and_longer_copies_set_the_pace():
    layers = [1.0] * 8
    assert streaming(layers, [0.9] * 8) == 8
    assert streaming(layers, [3.0] * 8) == 1 + 6 * 3 + 1  # the first two are there
    assert streaming(layers, [0.0] * 8) == 8
    assert streaming(layers, [3.0, 0, 0, 0] * 2) == 8  # two streamed layers, both there
    assert streaming(layers, [1.0, 1.0, 5.0, 1.0, 1.0, 1.0, 1.0, 1.0]) == 8 + 4  # one large layer


def test_inputs_leave_beside_compute_and_a_slow_link_holds_the_next_layer_up():
    layers = [1.0] * 4
    assert streaming(layers, [0] * 4, leaving=[0.9, 0.9, 0.9, 0]) == 4
    # each of the first three starts when the copy of the one before has ended; the last one has none to wait for
    assert streaming(layers, [0] * 4, leaving=[2.0, 2.0, 2.0, 0]) == 2 + 2 + 1 + 1
    assert streaming(layers, [0.9] * 4, leaving=[0.9, 0.9, 0.9, 0]) == 4  # the other direction


def test_inputs_come_back_beside_compute_and_share_the_link_with_weights():
    layers = [1.0] * 4  # of backward: the last checkpointed layer's input is there
    assert streaming(layers, [0] * 4, arriving=[0, 0.5, 0.5, 0.5]) == 4.5  # nobody asked for the first before
    assert streaming(layers, [0] * 4, arriving=[0, 2.0, 2.0, 2.0]) == 1 + 2 + 2 + 2 + 1
    # weights 0.6 and inputs 0.6 a layer: more than a layer computes, so the link sets the pace
    assert streaming([1.0] * 50, [0.6] * 50, arriving=[0, *[0.6] * 49]) == pytest.approx(50 * 1.2, rel=0.05)
    assert streaming([1.0] * 50, [0.4] * 50, arriving=[0, *[0.4] * 49]) == pytest.approx(50, rel=0.02)


def test_on_a_slow_link_the_step_is_as_long_as_its_copies():
    streamed, shape = replace(KNOBS, num_streamed=32), llama_8b()
    at = [seconds(shape, streamed, WORK, replace(H100, link_bytes=speed)).step for speed in (1e9, 55e9, 1e15)]
    moved = 2 * host_memory(shape, streamed, WORK).layers + 8192 * 8192  # the layers twice, rows of the embedding once
    assert at[0] == pytest.approx(moved / 1e9 * WORK.accumulation, rel=0.1)
    assert at[1] == pytest.approx(at[2], rel=0.05)


def test_streamed_8b_is_as_fast_as_resident_and_activations_cost_little():
    """One H200, 4 x 2,048: 11,677 tokens/s streamed, 11,735 resident."""
    card, packed = replace(CARDS["h200"], link_bytes=54.9e9), replace(WORK, has_one_shape=True)
    knobs = [KNOBS, replace(KNOBS, num_streamed=32), replace(KNOBS, num_streamed=32, is_offloaded=True)]
    speeds = [seconds(llama_8b(), one, packed, card).tokens_per_second for one in knobs]
    assert speeds[0] == pytest.approx(11_735, rel=0.05) and speeds[1] == pytest.approx(11_677, rel=0.05)
    assert 0.97 * speeds[0] < speeds[2] < speeds[1] <= speeds[0]


def test_every_card_has_a_link():
    assert all(10e9 < card.link_bytes < 100e9 for card in CARDS.values())
