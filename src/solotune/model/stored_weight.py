"""A linear's weight as a run stores it, and the numbers that its forward pass then computes with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from solotune.config.settings import PrecisionSettings
from solotune.model.frozen_linear import DenseWeight, Fp8Weight, NF4Weight, Storage

STORAGE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Rows = Callable[[int, int], torch.Tensor]
"""(begin, end) -> these rows of a weight, once: the caller may overwrite them."""


def store_weight(weight_OI: torch.Tensor, precision: PrecisionSettings, dtype: torch.dtype) -> Storage:
    """A linear's weight as the run stores it; NF4 from the compute dtype, as transformers and bitsandbytes do."""
    if precision.base_precision == "nf4":
        rounded = NF4Weight(weight_OI.to(dtype), precision.double_quant)
        return Fp8Weight(rounded.dense(dtype)) if precision.multiplies_in_fp8 else rounded
    if precision.base_precision == "fp8":
        return Fp8Weight(weight_OI)
    return DenseWeight(weight_OI.to(STORAGE_DTYPES[precision.base_precision]))


def trained_rows(weight_OI: torch.Tensor, precision: PrecisionSettings, dtype: torch.dtype) -> Rows:
    """Rows of `store_weight(...).dense(torch.float32)`, made when they are asked for, so that they stay in the cache.

    A weight that is quantised row by row is not stored: `weight_OI` must not change before its rows are asked for.
    """
    if precision.base_precision == "nf4":
        four_bit = NF4Weight(weight_OI.to(dtype), precision.double_quant)
        if not precision.multiplies_in_fp8:
            return four_bit.rows(torch.float32)
        rows = four_bit.rows(dtype)
        return lambda begin, end: Fp8Weight.forward_values(rows(begin, end))
    if precision.base_precision == "fp8":
        return lambda begin, end: Fp8Weight.forward_values(weight_OI[begin:end])
    stored = weight_OI.to(STORAGE_DTYPES[precision.base_precision])
    return lambda begin, end: stored[begin:end].float()
