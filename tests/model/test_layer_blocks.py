"""Weights of layers move to host memory while the model is loaded: whole layers, whatever the order of the tensors."""

from __future__ import annotations

import pytest
import torch

from solotune.model import layer_blocks
from solotune.model.host_blocks import HostBlock
from solotune.model.layer_blocks import LayerBlocks
from solotune.model.loading import load_model

CPU = torch.device("cpu")


@pytest.fixture
def made(monkeypatch):
    """The layers' blocks in the order in which they are made, and how many layers were incomplete then."""
    found = []
    original = HostBlock.__init__
    monkeypatch.setattr(
        HostBlock, "__init__", lambda self, layer, device: (found.append(layer), original(self, layer, device))[1]
    )
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])  # qwen2 and gpt2 have biases
def test_each_layer_is_moved_once_and_while_tensors_are_read(family, tiny_config, made):
    model = load_model(tiny_config(family, base_offload=True, base_precision="nf4"), CPU, torch.float32)
    assert sorted(map(id, made)) == sorted(map(id, model.layers))


def test_blocks_hold_what_is_stored_and_slots_take_it_over(tiny_config, made):
    model = load_model(tiny_config(base_precision="nf4"), CPU, torch.float32)
    buffers = {name: tensor.clone() for name, tensor in model.layers[0].named_buffers() if ".base." in name}
    block = HostBlock(model.layers[0], CPU)
    assert sum(t.numel() * t.element_size() for t in buffers.values()) <= block.host.numel()
    for name, tensor in model.layers[0].named_buffers():
        if name in buffers:
            assert torch.equal(tensor, buffers[name])
            assert tensor.untyped_storage().data_ptr() == block.host.data_ptr()
    slot = torch.zeros(block.host.numel() + 512, dtype=torch.uint8)
    block.point_to(slot)
    slot[: block.host.numel()].copy_(block.host)
    assert all(torch.equal(t, buffers[n]) for n, t in model.layers[0].named_buffers() if n in buffers)


def test_tensors_in_any_order(tiny_config, monkeypatch):
    """One kind of linear after the other: weights of incomplete layers wait on the host, and none is lost."""
    config = tiny_config(base_offload=True, base_precision="nf4")
    plain = load_model(tiny_config(base_precision="nf4"), CPU, torch.float32)
    waited = []
    monkeypatch.setattr(layer_blocks, "MAX_INCOMPLETE", 1)
    original = LayerBlocks.loaded
    monkeypatch.setattr(
        LayerBlocks, "loaded", lambda self, name: (original(self, name), waited.append(len(self._incomplete)))[0]
    )
    monkeypatch.setattr("solotune.model.loading.read_tensors", by_kind())
    streamed = load_model(config, CPU, torch.float32)
    assert max(waited) == len(plain.layers)
    for position, layer in enumerate(streamed.layers):
        streamed.ring.enter(position)
        expected = dict(plain.layers[position].named_buffers())
        for name, tensor in layer.named_buffers():
            assert torch.equal(tensor, expected[name]), name


def by_kind():
    from solotune.model.weights import read_tensors

    def read(*given):
        yield from sorted(read_tensors(*given), key=lambda named: named[0].split(".")[-2])

    return read
