"""A frozen base split over the GPUs of one machine: each rank keeps a part of every layer's block on its own card.

    block of a layer      | part of rank 0 | part of rank 1 | part of rank 2 | part of rank 3 |
    card of rank 1        slot             <- a copy of the whole block, made of its own part and of three peers' memory

A frozen weight is never written, so no collective and no common pace are needed: when its ring needs a layer, a rank
copies the parts of the others out of their memory (`peer_memory.py`), as it would copy them from the host. The ring and
all that computes with it are the same, and so are the bits.

    blocks = LayerBlocks(layers, frozen, SharedBase(world, device).block)      while loading
    shared.connect(blocks)      tell the others where the parts are, and open theirs
    shared.close()              at the end: nobody frees a part that another one reads

Ranks begin a copy with the part after their own: else all would read from the first card at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from solotune.config.run_config import RunConfig
from solotune.errors import CheckError, InputError
from solotune.hardware.peer_memory import Handle, ShareableBytes, opened
from solotune.model.layer_blocks import ALIGNMENT, BlockLayout
from solotune.runtime.world import World
from solotune.units import first_line


def part_of(num_bytes: int, number: int, count: int) -> tuple[int, int]:
    """Begin and end of the part `number` of `count` in a block; parts begin at multiples of `ALIGNMENT`."""
    begin, end = (num_bytes // ALIGNMENT * i // count * ALIGNMENT for i in (number, number + 1))
    return begin, num_bytes if number + 1 == count else end


class ShardedBlock:
    """The stored tensors of a layer, of which this process keeps one part."""

    num_bytes_on_host = 0

    def __init__(self, layer: nn.Module, device: torch.device, number: int, count: int) -> None:
        """Keep the part `number` of `count` of the layer's `FrozenLinear`s, and free the rest."""
        layout = BlockLayout(layer)
        self.num_bytes, self.number, self.count = layout.num_bytes, number, count
        begin, end = part_of(self.num_bytes, number, count)
        self.own = ShareableBytes(end - begin, device)
        for start, tensor in layout.tensors():
            some = slice(max(start, begin), min(start + tensor.numel(), end))
            if some.start < some.stop:
                part = tensor[some.start - start : some.stop - start]
                self.own.bytes[some.start - begin : some.stop - begin].copy_(part)
        layout.drop()
        self.point_to = layout.point_to
        self._parts: list[tuple[int, torch.Tensor]] = []

    @property
    def num_bytes_on_device(self) -> int:
        return self.own.bytes.numel()

    def open(self, handles: Sequence[Handle], device: torch.device) -> None:
        """Take the others' parts: the handle of each part, in order.

        Raises:
            RuntimeError: one cannot be read from here.
        """
        for step in range(self.count):
            number = (self.number + step) % self.count
            part = opened(handles[number], device) if step else self.own.bytes
            begin, end = part_of(self.num_bytes, number, self.count)
            if part.numel() != end - begin:
                raise RuntimeError(f"{part.numel()} bytes instead of {end - begin}")
            self._parts.append((begin, part))

    def copy_into(self, slot: torch.Tensor) -> None:
        """Begin to copy the block into the first bytes of `slot`, on the current stream."""
        for begin, part in self._parts:
            slot[begin : begin + part.numel()].copy_(part, non_blocking=True)

    def let_go(self) -> None:
        """Close the others' parts."""
        self._parts.clear()


class SharedBase:
    """The parts of one base on the ranks of this machine."""

    def __init__(self, world: World, device: torch.device) -> None:
        """Args:
        world: joined; see `require_ranks`.
        """
        self.world, self.device = world, device
        self._ranks = world.local_ranks
        self._blocks: Sequence[ShardedBlock] = ()

    def block(self, layer: nn.Module) -> ShardedBlock:
        """Keep this rank's part of a loaded layer."""
        return ShardedBlock(layer, self.device, self._ranks.index(self.world.rank), len(self._ranks))

    def connect(self, blocks: Sequence[ShardedBlock]) -> None:
        """Open the parts of the other ranks; they do the same.

        Raises:
            CheckError: a rank cannot read another one's memory; the same error on all of them.
        """
        self._blocks = blocks
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the parts are complete when the others get to know of them
        told: list[Handle] | str
        try:
            told = [block.own.handle() for block in blocks]
        except RuntimeError as error:
            told = first_line(error)
        found = self.world.all_gather(told)
        problem = next((f"rank {rank}: {one}" for rank, one in enumerate(found) if isinstance(one, str)), None)
        if problem is None:
            try:
                of_each_block = zip(*(found[rank] for rank in self._ranks), strict=True)
                for block, handles in zip(blocks, of_each_block, strict=True):
                    block.open(handles, self.device)
            except RuntimeError as error:
                problem = f"rank {self.world.rank} on {self.device}: {first_line(error)}"
        problems = [one for one in self.world.all_gather(problem) if one is not None]
        for block in blocks:
            block.own.close_door()
        if problems:
            raise CheckError(
                "base_sharding: a rank cannot read the memory of another one's GPU",
                seen=problems[0],
                allowed="GPUs of one machine that have peer access (`nvidia-smi topo -p2p r` shows it)",
                change="base_offload: true instead of base_sharding: the frozen layers stream from host memory",
            )

    def close(self) -> None:
        """Wait until no rank needs another one's part any more, and let go of them; the model computes no more."""
        self.world.all_gather(None)
        for block in self._blocks:
            block.let_go()
        self.world.all_gather(None)


def require_ranks(config: RunConfig, machines: Sequence[Sequence[int]]) -> None:
    """Check that `base_sharding: true` has another GPU to share the base with.

    Args:
        machines: the ranks of each machine.

    Raises:
        InputError: a rank is alone on its machine.
    """
    alone = [ranks[0] for ranks in machines if len(ranks) == 1]
    if config.base_sharding is True and alone:
        raise InputError(
            f"{config.source_of('base_sharding')}, base_sharding: a base is split over the GPUs of one machine, "
            "with a rank for each",
            seen="one rank" if len(machines) == 1 else f"rank {alone[0]} is alone on its machine",
            allowed="at least 2 ranks on each machine (in a plan: --gpu h100x2)",
            change="torchrun --nproc-per-node=N -m solotune train CONFIG (N: the number of GPUs), "
            "or base_offload: true instead of base_sharding",
        )
