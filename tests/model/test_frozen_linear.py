"""The frozen linears against bitsandbytes and plain PyTorch."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit, Params4bit

from solotune.model.frozen_linear import DenseWeight, Fp8Weight, FrozenLinear, NF4Weight, round_to_fp8, stored_bytes

SHAPES = [(64, 64), (96, 128), (5, 63), (3, 100), (1, 7)]  # some whose size is no multiple of a block, or odd


def random_weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.05).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_is_bit_equal_to_bitsandbytes(shape, double_quant, dtype):
    weight = random_weight(shape, dtype)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
    theirs = bnb.dequantize_4bit(packed, state)
    ours = NF4Weight(weight, double_quant)
    assert torch.equal(ours.dense(dtype), theirs)
    assert torch.equal(ours.dense_reference(dtype), theirs)


def test_linear_equals_bitsandbytes_linear4bit_in_value_and_gradient():
    weight = random_weight((96, 128))
    theirs = Linear4bit(128, 96, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    theirs.weight = Params4bit(weight.clone(), requires_grad=False, quant_type="nf4").to("cpu")
    ours = FrozenLinear(NF4Weight(weight, double_quant=True), None)
    x = torch.randn(2, 7, 128)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = theirs(x1), ours(x2)
    dy = torch.randn_like(y1)
    y1.backward(dy)
    y2.backward(dy)
    assert torch.equal(y1, y2)
    assert torch.equal(x1.grad, x2.grad)


@pytest.mark.parametrize("with_bias", [False, True])
def test_gradient_is_that_of_the_plain_linear(with_bias):
    weight, bias = random_weight((10, 6)), torch.randn(10) if with_bias else None
    layer = FrozenLinear(DenseWeight(weight), bias)
    x = torch.randn(3, 4, 6, dtype=torch.float32)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    dy = torch.randn(3, 4, 10)
    F.linear(x1, weight, bias).backward(dy)
    layer(x2).backward(dy)
    torch.testing.assert_close(layer(x2), F.linear(x1, weight, bias), rtol=0, atol=0)
    torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-6, atol=1e-6)


def test_backward_keeps_neither_input_nor_expanded_weight():
    layer = FrozenLinear(NF4Weight(random_weight((64, 64)), True), None)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(5, 64, requires_grad=True))
    assert saved == []


def test_double_quantisation_stores_4_13_bits_a_weight():
    weight = random_weight((1024, 1024))
    bits = {
        double: 8 * stored_bytes(FrozenLinear(NF4Weight(weight, double), None)) / weight.numel()
        for double in (False, True)
    }
    assert bits[False] == pytest.approx(4.5, abs=0.01)
    assert bits[True] == pytest.approx(4.127, abs=0.015)  # the 256-entry code table is shared by few weights here


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_values_in_fp8_keep_the_nf4_rounding_and_add_fp8s_own(double_quant):
    """e4m3 has 3 bits of mantissa: a value is off by 1/16 of itself at most, or by half its smallest step."""
    weight = random_weight((96, 128))
    four_bit = NF4Weight(weight, double_quant).dense(torch.float32)
    stored = Fp8Weight(four_bit)
    smallest = four_bit.abs().amax(1, keepdim=True) / 448 * 2**-9
    assert torch.all((stored.dense(torch.float32) - four_bit).abs() <= four_bit.abs() / 16 + smallest / 2 + 1e-8)
    added = (stored.dense(torch.float32) - weight).norm() / (four_bit - weight).norm()
    assert 1 < added < 1.15  # NF4's error is some 9 % of the weight, fp8's 2.6 %
    assert stored_bytes(FrozenLinear(stored, None)) == 2 * weight.numel() + 4 * (96 + 128)


def test_scales_of_fp8_are_what_cuda_makes_of_a_division_by_448():
    """CUDA multiplies by the reciprocal, rounded to float32; a true division differs in the last bit for half of all."""
    largest = torch.tensor([[3.0], [0.1], [0.3], [7.0]])
    codes, scales = round_to_fp8(torch.cat([largest, -largest / 3], 1))
    exact = ["0x1.b6db700000000p-8", "0x1.d41d440000000p-13", "0x1.5f15f40000000p-11", "0x1.0000000000000p-6"]
    assert [scale.item().hex() for scale in scales] == exact
    assert [scale.item().hex() for scale in largest / 448][:3] != exact[:3]
    assert codes[:, 0].float().tolist() == [448.0] * 4
    assert torch.equal(Fp8Weight.forward_values(largest), codes[:, :1].float() * scales)
