"""The fast paths on one GPU against the plain ones, with a float32 model as the truth of both.

sh scripts/test -n 0 -m gpu tests/gpu/test_engine.py
"""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import random_rows

from solotune.dataset.collate import PaddedShape, collate, collate_packs
from solotune.model import packed_attention
from solotune.model.frozen_linear import DenseWeight, FrozenLinear
from solotune.model.loading import load_model

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
CPU = torch.device("cpu")


def losses_and_gradients(model, batch):
    model.module.train()
    for layer in model.lora_layers.values():  # the same on every device
        layer.lora_B.data.copy_(torch.linspace(-0.1, 0.1, layer.lora_B.numel()).view(layer.lora_B.shape))
    model.flat_params.grad.zero_()
    losses, _ = model.token_losses(batch)
    losses.mean().backward()
    return losses.detach().float().cpu(), model.flat_params.grad.clone().cpu()


def in_float32(model, like):
    """`like`, with the weights that `model` stores."""
    own = dict(like.module.named_parameters())
    for name, parameter in model.module.named_parameters():
        if "lora_" not in name:
            own[name].data.copy_(parameter.data)
    linears = dict(like.module.named_modules())
    for name, module in model.module.named_modules():
        if isinstance(module, FrozenLinear):
            linears[name].storage = DenseWeight(module.storage.dense(torch.float32).cpu())
    return like


def errors(result, truth):
    """Of the losses, on average, and of the whole gradient, by its length."""
    loss, gradient = ((ours - theirs) for ours, theirs in zip(result, truth, strict=True))
    return loss.abs().mean().item(), (gradient.norm() / truth[1].norm()).item()


@pytest.mark.parametrize(("family", "precision"), [("llama", "fp8"), ("llama", "nf4"), ("qwen3", "bf16")])
def test_compiled_checkpointed_packed_errs_no_more_than_plain(family, precision, tiny_config, capsys):
    rows = random_rows(11)
    packs = [rows[:4], rows[4:7], rows[7:]]
    config = tiny_config(family, base_precision=precision, use_cpu=False, bf16=True)
    plain = load_model(config, GPU, torch.bfloat16)
    fast = load_model(
        config.replaced("test", torch_compile=True, packing=True, gradient_checkpointing=1), GPU, torch.bfloat16
    )
    assert fast.uses_varlen_attention
    truth = losses_and_gradients(
        in_float32(plain, load_model(tiny_config(family), CPU, torch.float32)), collate(rows, CPU)
    )
    plain_errors = errors(losses_and_gradients(plain, collate(rows, GPU)), truth)
    shape = PaddedShape.of([range(4)] * 3, 3, 96)
    fast_errors = errors(losses_and_gradients(fast, collate_packs(packs, GPU, shape)), truth)
    with capsys.disabled():
        print(f"\n{family} {precision}: plain {plain_errors}, fast {fast_errors}")
    for ours, theirs in zip(fast_errors, plain_errors, strict=True):
        assert ours <= 1.5 * theirs + 1e-4


def test_attention_by_lengths_is_attention_of_each_row_alone():
    torch.manual_seed(0)
    batch, heads, kv_heads, length, size = 2, 8, 2, 192, 64
    q, k, v = (
        torch.randn(batch, n, length, size, device=GPU, dtype=torch.bfloat16).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )
    starts = [0, 50, 192, 192 + 1, 192 + 100, 384, 384, 384]  # a row of one token, and room that no row takes
    cu = torch.tensor(starts, device=GPU, dtype=torch.int32)
    y, _ = packed_attention.attention(
        torch.nn.Identity(), q, k, v, None, scaling=size**-0.5, cu_seq_lens_q=cu, max_length_q=192
    )
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, (q, k, v), dy)
    truth_q, truth_k, truth_v = (x.detach().double().requires_grad_() for x in (q, k, v))
    parts = []
    for start, end in itertools.pairwise(starts):
        if start < end:
            b, rows = start // length, slice(start % length, (end - 1) % length + 1)
            scores = truth_q[b, :, rows] @ truth_k[b].repeat_interleave(4, 0)[:, rows].transpose(1, 2) * size**-0.5
            causal = torch.ones(end - start, end - start, device=GPU, dtype=torch.bool).tril()
            weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
            parts.append((weights @ truth_v[b].repeat_interleave(4, 0)[:, rows]).transpose(0, 1))
    truth = torch.cat(parts).view(y.shape)
    theirs = torch.autograd.grad(truth, (truth_q, truth_k, truth_v), dy.double())
    assert (y - truth).norm() / truth.norm() < 5e-3
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() / other.norm() < 1e-2


def test_dropout_of_a_recomputed_layer_has_the_mask_of_its_forward(tiny_config):
    """With another mask in backward the gradient is that of no function; with the same one, of the loss."""
    from solotune.model import lora

    config = tiny_config("llama", use_cpu=False, torch_compile=True, lora_dropout=0.5, gradient_checkpointing=True)
    kept = load_model(config.replaced("test", gradient_checkpointing=False), GPU, torch.float32)
    recomputed = load_model(config, GPU, torch.float32)
    batch = collate(random_rows(4), GPU)
    results = []
    for model in (kept, recomputed):
        lora.seed_dropout(model.lora_layers, 1, 2, 3)
        results.append(losses_and_gradients(model, batch))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)
    lora.seed_dropout(kept.lora_layers, 1, 2, 4)
    other = losses_and_gradients(kept, batch)
    assert (other[1] - results[0][1]).abs().max() > 1e-3
