"""What a plan says of frozen layers that stream from host memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planning.test_planner import GIB, H100, KNOBS, WORK, config, llama_8b, planned

from solotune.planning.gpus import CARDS
from solotune.planning.memory import footprint, streamed_bytes
from solotune.planning.planner import full_rows, make_plan
from solotune.planning.throughput import seconds, streaming


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


def test_the_card_holds_two_streamed_layers_and_the_host_all_of_them():
    """8B, NF4, 4 x 2,048, every layer checkpointed: 5.55 GiB were measured on an H200, 8.70 with the base there."""
    streamed = replace(KNOBS, num_streamed=32)
    host, card = streamed_bytes(llama_8b(), streamed)
    assert sum(card) * 16 == sum(host)
    used, resident = (footprint(llama_8b(), knobs, WORK, H100) for knobs in (streamed, KNOBS))
    assert used.host_bytes == pytest.approx(sum(host))
    assert resident.peak_bytes - used.peak_bytes == pytest.approx(sum(host) - sum(card), rel=1e-6)
    assert used.peak_bytes / GIB == pytest.approx(5.55, rel=0.05)


def test_a_host_without_the_memory_is_no_place_for_the_base():
    checked = config(memory_budget="6GiB")
    shape, work = llama_8b(), full_rows(checked.batches)
    assert make_plan(checked, lambda _: shape, H100, work, None, host_free_bytes=8 * GIB).fits
    assert not make_plan(checked, lambda _: shape, H100, work, None, host_free_bytes=3 * GIB).fits


def test_copies_beside_longer_compute_cost_nothing_and_longer_copies_set_the_pace():
    layers, all_of_them = [1.0] * 8, [True] * 8
    assert streaming(layers, all_of_them, 0.9) == 8
    assert streaming(layers, all_of_them, 3.0) == 1 + 6 * 3 + 1  # the first two are there
    assert streaming(layers, [False] * 8, 3.0) == 8
    assert streaming(layers, [number % 4 == 0 for number in range(8)], 3.0) == 8  # two streamed layers, both there


def test_on_a_slow_link_the_step_is_as_long_as_its_copies():
    streamed = replace(KNOBS, num_streamed=32)
    at = [seconds(llama_8b(), streamed, WORK, replace(H100, link_bytes=speed)).step for speed in (1e9, 55e9, 1e15)]
    copies = sum(streamed_bytes(llama_8b(), streamed)[0]) / 1e9 * 2 * WORK.accumulation
    assert at[0] == pytest.approx(copies, rel=0.2)
    assert at[1] == pytest.approx(at[2], rel=0.05)


def test_every_card_has_a_link():
    assert all(10e9 < card.link_bytes < 100e9 for card in CARDS.values())
