"""The unpacked copy of 4-bit weights: kept if asked for, or if a quarter of the free memory holds it."""

from __future__ import annotations

import pytest
import torch

from solotune.hardware.ram import Ram
from solotune.model import residency
from solotune.model.frozen_linear import NF4Weight
from solotune.model.residency import settle_residency

CPU = torch.device("cpu")
GIB = 1 << 30


@pytest.fixture
def weights():
    return torch.nn.ModuleList(NF4Weight(torch.randn(64, 128), True) for _ in range(2))


def copies(module):
    return sum(isinstance(buffer, torch.Tensor) and buffer.dtype == torch.float32 and buffer.numel() == 64 * 128
               for part in module for buffer in part._buffers.values())  # fmt: skip


@pytest.mark.parametrize(
    ("free", "kept"), [(GIB, True), (4 * 2 * 64 * 128 * 4, False), (4 * 2 * 64 * 128 * 4 + 1, True)]
)
def test_auto_takes_a_quarter_of_the_free_memory_at_most(free, kept, weights, monkeypatch):
    monkeypatch.setattr(residency, "ram", lambda: Ram(4 * GIB, free))
    (choice,) = settle_residency(weights, "auto", torch.float32, CPU)
    assert (choice.key, choice.value) == ("base_residency", "dequantized" if kept else "quantized")
    assert copies(weights) == (2 if kept else 0)


@pytest.mark.parametrize(("wanted", "number"), [("quantized", 0), ("dequantized", 2)])
def test_what_the_config_says_is_no_choice(wanted, number, weights):
    assert settle_residency(weights, wanted, torch.float32, CPU) == []
    assert copies(weights) == number
