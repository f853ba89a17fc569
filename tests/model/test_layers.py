"""What a layer keeps for backward, and that keeping less changes nothing."""

from __future__ import annotations

import pytest
import torch
from tiny import random_rows

from solotune.dataset.collate import PaddedShape, collate, collate_packs
from solotune.model import layers
from solotune.model.loading import load_model

CPU = torch.device("cpu")


def losses_and_gradients(model, batch=None):
    model.module.train()
    for number, layer in enumerate(model.lora_layers.values()):
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(number))
    losses, _ = model.token_losses(batch or collate(random_rows(3), CPU))
    model.flat_params.grad.zero_()
    losses.mean().backward()
    return losses.detach(), model.flat_params.grad.clone()


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one[1], other[1], rtol=1e-5, atol=1e-7)


def kept_bytes(model):
    """Of what autograd keeps between forward and backward, without parameters and buffers."""
    own = {t.data_ptr() for t in (*model.module.parameters(), *model.module.buffers(), *model.trainable)}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.token_losses(collate(random_rows(3), CPU))
    return sum(kept.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_any_number_of_layers_may_recompute_themselves(family, tiny_config):
    results, kept = [], []
    for number in (False, 1, True):
        model = load_model(tiny_config(family, gradient_checkpointing=number), CPU, torch.float32)
        results.append(losses_and_gradients(model))
        kept.append(kept_bytes(model))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])
    assert kept[0] > kept[1] > kept[2]
    assert kept[0] - kept[1] == pytest.approx(kept[1] - kept[2], rel=0.2)


@pytest.mark.parametrize(("wanted", "number"), [(True, 4), (False, 0), ("auto", 4), (3, 3), (9, 4)])
def test_how_many_layers_the_config_means(wanted, number):
    assert layers.num_checkpointed(wanted, 4) == number


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_a_long_row_goes_through_the_mlp_in_parts(family, tiny_config, monkeypatch):
    whole = load_model(tiny_config(family, gradient_checkpointing=True), CPU, torch.float32)
    monkeypatch.setattr(layers, "MLP_CHUNK_TOKENS", 10)
    in_parts = load_model(tiny_config(family, gradient_checkpointing=True), CPU, torch.float32)
    seen = []
    linear = next(m for n, m in in_parts.lora_layers.items() if ".mlp." in n)
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    assert_same(losses_and_gradients(whole), losses_and_gradients(in_parts))
    assert max(seen) <= 10


def test_compiled_layers_keep_outputs_of_matmuls_and_of_attention_alone(tiny_config, monkeypatch):
    """The cut through the graph is the compiler's; this is that it cuts where the plan of memory says."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    without_kernels = aot_autograd(
        decompositions=select_decomp_table(),
        fw_compiler=lambda graph, _: graph.forward,
        bw_compiler=lambda graph, _: graph.forward,
        partition_fn=min_cut_rematerialization_partition,
    )
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", without_kernels)
    model = load_model(
        tiny_config(torch_compile=True, lora_dropout=0.1, lora_target_modules="all-linear"), CPU, torch.float32
    )
    model.module.train()
    batch = collate(random_rows(3), CPU)
    layer, own = model.layers[0], {p.data_ptr() for p in (*model.module.parameters(), *model.module.buffers())}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in own and tensor.numel() >= batch.input_ids_BT.numel() * 16:
            kept[tensor.data_ptr()] = tensor.shape[-1] if tensor.dim() < 4 else tensor.shape[1] * tensor.shape[3]
        return tensor

    x = model.module.get_input_embeddings()(batch.input_ids_BT)
    places = torch.arange(x.shape[1])[None]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, position_embeddings=model.module.base_model.rotary_emb(x, places), attention_mask=None)
    # input, q, k, v, attention (twice: without kernels its transposition is a copy), middle of the layer, gate, up:
    # no dropped copy, no mask, no norm
    assert sorted(kept.values()) == sorted([64, 64, 32, 32, 64, 64, 64, 96, 96])


def test_packs_are_padded_to_one_shape_without_a_trace(tiny_config):
    model = load_model(tiny_config(packing=True), CPU, torch.float32)
    rows = random_rows(5)
    packs = [rows[:3], rows[3:]]
    shape = PaddedShape.of([[0, 1, 2], [3, 4]], num_packs=3, length=90)
    padded = collate_packs(packs, CPU, shape)
    assert padded.input_ids_BT.shape == (3, 90)
    assert padded.cu_seqlens_S is not None and padded.cu_seqlens_S.shape == (3 * 4 + 1,)
    lengths = [len(row.input_ids) for row in rows]
    ends = [lengths[0], lengths[0] + lengths[1], sum(lengths[:3]), 90, 90 + lengths[3], 90 + lengths[3] + lengths[4]]
    assert padded.cu_seqlens_S.tolist() == [0, *ends, 180] + [270] * 5
    assert_same(losses_and_gradients(model, collate_packs(packs, CPU)), losses_and_gradients(model, padded))
    assert padded.num_supervised == len(padded.label_positions_N)
