"""What `solotune doctor` says about a machine with several GPUs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hardware.test_machine import GIB, gpu

from solotune.hardware import doctor
from solotune.hardware.several_gpus import check_several, pairs_without_peer_access

H100 = ("NVIDIA H100 80GB HBM3", 79 * GIB)


@pytest.fixture
def cards(monkeypatch) -> dict:
    """What torch says of the GPUs: their names and memory, and the pairs that reach each other."""
    found: dict = {"cards": [H100] * 4, "reach": lambda one, other: True, "nccl": True}

    def properties(number: int) -> SimpleNamespace:
        name, memory = found["cards"][number]
        return SimpleNamespace(name=name, total_memory=memory)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: found["reach"](one, other))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: found["nccl"])
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 27, 5))
    return found


def checks(count: int) -> dict[str, tuple[str, str, str | None]]:
    several = check_several(gpu((9, 0), num_gpus=count, driver="570.1"))
    return {check.name: (check.status, check.found, check.fix) for check in several}


def test_one_gpu_has_no_such_checks(cards):
    assert checks(1) == {}
    assert {"gpus", "nccl", "peer access"}.isdisjoint(check.name for check in doctor.doctor().checks)


def test_equal_gpus_that_reach_each_other(cards):
    assert checks(4) == {
        "gpus": ("ok", "4 x NVIDIA H100 80GB HBM3, 79.0 GiB", None),
        "nccl": ("ok", "2.27.5", None),
        "peer access": ("ok", "between all GPUs", None),
    }


def test_gpus_that_differ_are_listed_with_those_to_take(cards):
    cards["cards"] = [("NVIDIA L4", 22 * GIB), H100, H100]
    status, found, fix = checks(3)["gpus"]
    assert status == "warn"
    assert found.startswith("3 GPUs differ: GPU 0: NVIDIA L4, 22.0 GiB; GPU 1: NVIDIA H100")
    assert fix is not None and fix.startswith("train on equal ones: CUDA_VISIBLE_DEVICES=1,2;")
    cards["cards"] = [H100, (H100[0], 40 * GIB)]  # the same card with less memory
    assert checks(2)["gpus"][0] == "warn"


def test_a_torch_without_nccl(cards):
    cards["nccl"] = False
    status, found, fix = checks(2)["nccl"]
    assert status == "warn" and "has none, so several GPUs cannot train together" in found
    assert fix is not None and "without torchrun" in fix


def test_pairs_without_peer_access(cards):
    cards["reach"] = lambda one, other: (one < 2) == (other < 2)  # two pairs, on two sockets
    assert pairs_without_peer_access(4) == [(0, 2), (0, 3), (1, 2), (1, 3)]
    status, found, fix = checks(4)["peer access"]
    assert (status, found) == ("warn", "none between GPUs 0-2, 0-3, 1-2 and 1 more pairs (driver 570.1)")
    assert fix is not None and "base_offload" in fix
    cards["reach"] = lambda one, other: one < other  # in one direction only
    assert pairs_without_peer_access(2) == [(0, 1)]
