"""What compiled layers use: dropout from a seed, matmuls that keep nothing, fp8."""

from __future__ import annotations

import pytest
import torch

from solotune.model import lora
from solotune.model.frozen_linear import DenseWeight, Fp8Weight, FrozenLinear, NF4Weight

SEED = lora.hashed(torch.tensor([7, 8], dtype=torch.int32))


def test_seeded_dropout_zeroes_its_share_and_keeps_the_mean():
    x = torch.ones(1000, 256)
    for p in (0.05, 0.5, 0.9):
        y = lora.seeded_dropout(x, p, SEED)
        assert (y == 0).float().mean().item() == pytest.approx(p, abs=0.005)
        assert y.mean().item() == pytest.approx(1, abs=0.02)


def test_seeded_dropout_repeats_with_its_seed_and_is_independent_of_another():
    x = torch.ones(1000, 256)
    first, again = lora.seeded_dropout(x, 0.5, SEED), lora.seeded_dropout(x, 0.5, SEED)
    other = lora.seeded_dropout(x, 0.5, lora.hashed(SEED))
    assert torch.equal(first, again)
    both = ((first == 0) & (other == 0)).float().mean().item()
    assert both == pytest.approx(0.25, abs=0.005)
    neighbours = ((first[:, 1:] == 0) & (first[:, :-1] == 0)).float().mean().item()
    assert neighbours == pytest.approx(0.25, abs=0.005)


def test_seeded_dropout_has_the_gradient_of_its_mask():
    x = torch.randn(5, 8, requires_grad=True)
    y = lora.seeded_dropout(x, 0.5, SEED)
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(y == 0, 0.0, 2.0))


def test_the_traced_matmul_equals_the_eager_one_and_keeps_only_what_is_stored():
    layer = FrozenLinear(NF4Weight(torch.randn(96, 128), double_quant=True), None)
    x1, x2 = (torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x1)
    y.square().sum().backward()
    layer(x2).square().sum().backward()
    assert torch.equal(x1.grad, x2.grad)
    assert max((t.numel() for t in kept), default=0) < 96 * 128  # neither the expanded weight nor a copy of it


@pytest.mark.parametrize("rows", [1, 7])
def test_fp8_errs_by_its_rounding_alone_forward_and_backward(rows):
    torch.manual_seed(0)
    weight = torch.randn(48, 64) * 0.05
    layer = FrozenLinear(Fp8Weight(weight), torch.randn(48))
    x = torch.randn(rows, 64, requires_grad=True)
    dy = torch.randn(rows, 48)
    y = layer(x)
    y.backward(dy)
    truth = x.detach() @ weight.T + layer.bias_O
    # e4m3 has 3 bits of mantissa: errors up to 2**-4 each, which average out over a sum
    assert ((y - truth).norm() / truth.norm()).item() < 0.05
    assert ((x.grad - dy @ weight).norm() / (dy @ weight).norm()).item() < 0.05
    torch.testing.assert_close(layer.storage.dense(torch.float32), weight, rtol=2**-4, atol=1e-3)


@pytest.mark.parametrize(
    "kind", [Fp8Weight, lambda w: NF4Weight(w, double_quant=True), lambda w: DenseWeight(w.half())]
)
def test_a_compiled_linear_has_its_gradient(kind):
    """torch 2.11 compiled one of fp8 to a gradient of zeros."""
    torch.manual_seed(0)
    layer = FrozenLinear(kind(torch.randn(48, 64) * 0.05), None)
    x = torch.randn(7, 64)
    dy = torch.randn(7, 48)
    gradients = []
    for forward in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(forward(leaf), leaf, dy)[0])
    assert gradients[0].norm() > 1
    torch.testing.assert_close(gradients[1], gradients[0])
