"""Codes and scales against bitsandbytes' plain kernel, bit by bit."""

from __future__ import annotations

import pytest
import torch

from solotune.hardware.bnb import functional as bnb
from solotune.model import nf4_codes
from solotune.model.nf4_codes import quantize_nf4

SHAPES = [(64, 64), (96, 128), (5, 63), (3, 100), (1, 7), (1, 1), (33, 65), (127, 129)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def check(weight: torch.Tensor) -> None:
    """The codes and scales are those of bitsandbytes."""
    theirs = torch.ops.bitsandbytes.quantize_4bit.default(weight, 64, "nf4", torch.uint8)
    for one, other in zip(quantize_nf4(weight), theirs, strict=True):
        assert one.shape == other.shape and torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0.02, 1e-7, 3e4])
def test_codes_are_those_of_bitsandbytes_for_every_shape_and_dtype(size: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape in SHAPES:
        check((size * torch.randn(shape)).clamp(-6e4, 6e4).to(dtype))


def test_zeros_the_smallest_numbers_and_the_largest() -> None:
    weight = torch.randn(40, 64)
    weight[:8] = 0
    weight[8:16] *= 1e-38
    weight[16:24] *= 1e-42
    weight[24] = torch.finfo(torch.float32).max
    weight[25, 1:] = 0
    weight[26] = -0.0
    weight[27] *= 2e-39  # its scale counts as 1e-38
    check(weight)
    check(weight[:27, :33].contiguous())
    check(torch.zeros(3, 21))


def test_a_number_in_the_middle_of_two_values_and_beside_it() -> None:
    values = bnb.get_4bit_type("nf4", device="cpu")
    middles = (values[:-1] + values[1:]) / 2
    beside = [torch.nextafter(middles, torch.tensor(far)) for far in (-2.0, 2.0)]
    row = torch.cat([torch.ones(1), middles, *beside, values, -torch.ones(1), torch.zeros(1)])  # 64, of scale 1
    check(row[None])
    check(row[None] * 0.37)
    check(torch.cat([row, row[:46]])[None])


@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_and_threads_change_nothing(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4_codes, "numbers_at_once", lambda: 256)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in [(50, 64), (4, 64), (31, 65), (1, 255), (1, 257)]:
            check(torch.randn(shape).bfloat16())
    finally:
        torch.set_num_threads(before)


def test_numbers_that_are_not_finite_keep_a_scale_that_is_not() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        weight = torch.ones(2, 64)
        weight[1, 5] = bad
        scales = quantize_nf4(weight)[1]
        assert scales[0] == 1 and not scales[1].isfinite()
