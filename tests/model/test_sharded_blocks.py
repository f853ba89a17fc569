"""The parts of a frozen base on several ranks: each byte is on one of them, and all can read it."""

from __future__ import annotations

import copy

import pytest
import torch

from solotune.errors import CheckError, InputError
from solotune.hardware.peer_memory import ShareableBytes
from solotune.model import sharded_blocks
from solotune.model.frozen_linear import FrozenLinear
from solotune.model.host_blocks import HostBlock
from solotune.model.layer_blocks import ALIGNMENT
from solotune.model.loading import load_model
from solotune.model.sharded_blocks import ShardedBlock, SharedBase, part_of
from solotune.runtime.heartbeat import Peer
from solotune.runtime.world import ALONE, World

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_bytes", [0, 256, 512, 1024, 7 * 256, 1_000_192])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_parts_are_aligned_and_make_up_the_block(num_bytes: int, count: int) -> None:
    parts = [part_of(num_bytes, number, count) for number in range(count)]
    assert [0, *(end for _, end in parts)] == [*(begin for begin, _ in parts), num_bytes]
    sizes = [end - begin for begin, end in parts]
    assert all(begin % ALIGNMENT == 0 for begin, _ in parts) and max(sizes) - min(sizes) <= ALIGNMENT


@pytest.mark.parametrize(
    ("family", "precision", "count"), [("llama", "nf4", 3), ("gpt2", "fp32", 2), ("qwen2", "bf16", 5)]
)
def test_each_rank_reads_the_whole_layer_out_of_the_parts_of_all(family, precision, count, tiny_config) -> None:
    layer = load_model(tiny_config(family, base_precision=precision), CPU, torch.float32).layers[1]
    whole, layers = HostBlock(copy.deepcopy(layer), CPU), [copy.deepcopy(layer) for _ in range(count)]
    blocks = [ShardedBlock(one, CPU, number, count) for number, one in enumerate(layers)]
    assert sum(block.num_bytes_on_device for block in blocks) == whole.num_bytes == blocks[0].num_bytes
    frozen = [part for one in layers for part in one.modules() if isinstance(part, FrozenLinear)]
    assert not any(buffer.numel() for part in frozen for buffer in part.buffers())  # nothing else is kept
    handles = [block.own.handle() for block in blocks]
    for block, one in zip(blocks, layers, strict=True):
        block.open(handles, CPU)
        slot = torch.zeros(whole.num_bytes, dtype=torch.uint8)
        block.point_to(slot)
        block.copy_into(slot)
        for name, tensor in layer.named_buffers():
            assert torch.equal(one.get_buffer(name), tensor), name
    for block in blocks:
        block.own.close_door()
        block.let_go()
    with pytest.raises(RuntimeError, match="unable to open file"):
        blocks[0].open(handles, CPU)


def test_ranks_begin_with_different_cards(tiny_config) -> None:
    """All eight would wait for the first card otherwise."""
    layer = load_model(tiny_config(), CPU, torch.float32).layers[0]
    block = ShardedBlock(layer, CPU, 1, 3)
    parts = [ShareableBytes(end - begin, CPU) for begin, end in (part_of(block.num_bytes, i, 3) for i in range(3))]
    block.open([part.handle() for part in parts], CPU)
    assert [part_of(block.num_bytes, number, 3)[0] for number in (1, 2, 0)] == [begin for begin, _ in block._parts]


@pytest.mark.parametrize(("hosts", "seen"), [("", "one rank"), ("aab", "rank 2 is alone on its machine")])
def test_a_rank_that_is_alone_on_its_machine_is_refused(hosts: str, seen: str, tiny_config) -> None:
    world = world_on(hosts) if hosts else ALONE
    with pytest.raises(InputError) as refused:
        load_model(tiny_config(base_sharding=True), CPU, torch.float32, world=world)
    assert (refused.value.seen, refused.value.allowed) == (
        seen, "at least 2 ranks on each machine (in a plan: --gpu h100x2)",
    )  # fmt: skip
    assert "torchrun --nproc-per-node=N" in str(refused.value.change) and "base_offload" in str(refused.value.change)


@pytest.mark.parametrize("fails", ["handle", "opened"])
def test_memory_that_cannot_be_read_says_which_rank_and_the_other_way(fails: str, tiny_config, monkeypatch) -> None:
    def no(*_: object) -> None:
        raise RuntimeError("CUDA error: peer access is not supported between these two devices\nmore")

    if fails == "handle":
        monkeypatch.setattr(ShareableBytes, "handle", no)
    else:
        monkeypatch.setattr(sharded_blocks, "opened", no)
    world = world_on("aa")
    monkeypatch.setattr(world, "all_gather", lambda value: [value, value])
    with pytest.raises(CheckError) as refused:
        load_model(tiny_config(base_sharding=True), CPU, torch.float32, world=world)
    assert "rank 0" in str(refused.value.seen) and "peer access is not supported" in str(refused.value.seen)
    assert "base_offload: true" in str(refused.value.change)


def test_ranks_of_two_machines_share_among_themselves() -> None:
    shared = SharedBase(world_on("abab"), CPU)
    assert shared._ranks == [0, 2]


def world_on(hosts: str) -> World:
    """Rank 0 of a world whose ranks are on these machines."""
    ranks = [Peer(rank, 1, "node", host) for rank, host in enumerate(hosts)]
    return World(0, len(ranks), peers=ranks[1:], _own=ranks[0])
