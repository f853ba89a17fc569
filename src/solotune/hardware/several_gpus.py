"""The GPUs of a machine that has several: what `solotune doctor` checks, and what a plan for all of them asks.

Nothing is allocated on them and nothing is copied: the driver is asked.
"""

from __future__ import annotations

from itertools import combinations

from solotune.hardware.machine import Check, Machine
from solotune.units import gib


def pairs_without_peer_access(count: int) -> list[tuple[int, int]]:
    """The pairs of the first `count` GPUs that do not read each other's memory directly."""
    import torch

    def reach(one: int, other: int) -> bool:
        return torch.cuda.can_device_access_peer(one, other) and torch.cuda.can_device_access_peer(other, one)

    return [pair for pair in combinations(range(count), 2) if not reach(*pair)]


def check_several(machine: Machine) -> list[Check]:
    """The checks for a run on all GPUs of this machine; none if it has one."""
    if machine.num_gpus < 2:
        return []
    return [_check_same(machine.num_gpus), _check_nccl(), _check_peer_access(machine)]


def _check_same(count: int) -> Check:
    """The slowest card sets the pace of all, and the smallest memory is all that a plan may use."""
    import torch

    found = [torch.cuda.get_device_properties(number) for number in range(count)]
    names = [f"{one.name}, {gib(one.total_memory)} GiB" for one in found]
    most = max(names, key=names.count)
    same = [number for number, name in enumerate(names) if name == most]
    if len(same) == count:
        return Check("gpus", "ok", f"{count} x {names[0]}")
    listed = "; ".join(f"GPU {number}: {name}" for number, name in enumerate(names))
    fix = f"train on equal ones: CUDA_VISIBLE_DEVICES={','.join(map(str, same))}; ranks on different cards are refused"
    return Check("gpus", "warn", f"{count} GPUs differ: {listed}", fix)


def _check_nccl() -> Check:
    import torch
    import torch.distributed as dist

    if dist.is_available() and dist.is_nccl_available():
        return Check("nccl", "ok", ".".join(map(str, torch.cuda.nccl.version())))  # type: ignore[attr-defined]
    fix = "install torch for CUDA on Linux (https://pytorch.org); until then train on one GPU, without torchrun"
    return Check("nccl", "warn", f"torch {torch.__version__} has none, so several GPUs cannot train together", fix)


def _check_peer_access(machine: Machine) -> Check:
    missing = pairs_without_peer_access(machine.num_gpus)
    if not missing:
        return Check("peer access", "ok", "between all GPUs")
    pairs = ", ".join(f"{one}-{other}" for one, other in missing[:3])
    more = f" and {len(missing) - 3} more pairs" if len(missing) > 3 else ""
    found = f"none between GPUs {pairs}{more} (driver {machine.driver})"
    fix = "GeForce cards since the 40 series have none; on others turn off ACS and the IOMMU in the BIOS, or use a "
    fix += "virtual machine with NVLink passed through. Without it gradients go through host memory (slower), and "
    fix += "base_sharding does not work: use base_offload"
    return Check("peer access", "warn", found, fix)
