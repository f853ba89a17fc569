"""The numbers that a stored weight computes with, all at once and some rows at a time."""

from __future__ import annotations

import pytest
import torch

from solotune.config.settings import PrecisionSettings
from solotune.model.frozen_linear import DenseWeight, Fp8Weight, NF4Weight
from solotune.model.stored_weight import store_weight, trained_rows

PRECISIONS = {
    "nf4": (NF4Weight, {"base_precision": "nf4", "double_quant": True}),
    "nf4, single": (NF4Weight, {"base_precision": "nf4", "double_quant": False}),
    "nf4 in fp8": (Fp8Weight, {"base_precision": "nf4", "double_quant": True, "multiplies_in_fp8": True}),
    "fp8": (Fp8Weight, {"base_precision": "fp8", "multiplies_in_fp8": True}),
    "bf16": (DenseWeight, {"base_precision": "bf16"}),
}


def precision_of(name: str) -> PrecisionSettings:
    return PrecisionSettings(
        **{
            "double_quant": True,
            "multiplies_in_fp8": False,
            "base_residency": "auto",
            "base_offload": False,
            "base_sharding": False,
            "bf16": True,
            **PRECISIONS[name][1],
        }
    )


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("shape", [(40, 128), (21, 63), (7, 50), (300, 1)], ids=str)
def test_rows_are_those_of_the_stored_weight(name: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight, dtype = (0.05 * torch.randn(shape)).bfloat16(), torch.bfloat16
    stored = store_weight(weight, precision_of(name), dtype)
    assert type(stored) is PRECISIONS[name][0]
    expected = stored.dense(torch.float32)
    rows = trained_rows(weight, precision_of(name), dtype)
    for step in (1, 3, 16, shape[0]):
        parts = [rows(at, min(at + step, shape[0])) for at in range(0, shape[0], step)]
        assert torch.equal(torch.cat(parts), expected)
