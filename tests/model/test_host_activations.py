"""Inputs of checkpointed layers in host memory: the same numbers, and little on the device."""

from __future__ import annotations

import weakref

import pytest
import torch
from tiny import random_rows, save_model

from solotune.dataset.collate import collate
from solotune.model import layers
from solotune.model.host_activations import HostActivations
from solotune.model.loading import load_model
from solotune.training.forward_backward import MicroBatchRunner, accumulate

CPU = torch.device("cpu")
DEPTH, WIDTH = 5, 64


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A folder of a model with five layers."""
    return save_model(tmp_path_factory.mktemp("deep"), num_hidden_layers=DEPTH)


@pytest.fixture
def loaded(deep, tiny_config):
    def load(**keys):
        keys = {"gradient_checkpointing": True, "activation_offload": True} | keys
        model = load_model(tiny_config(model_name_or_path=deep, **keys), CPU, torch.float32)
        model.module.train()
        for number, layer in enumerate(model.lora_layers.values()):
            torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(number))
        return model

    return load


def one_pass(model, seed=0, rows=3):
    """Loss and gradient of a micro-batch, as training has them."""
    runner = MicroBatchRunner(model)
    model.zero_gradients()
    batch = collate(random_rows(rows, seed=seed), CPU)
    runner.run(accumulate, batch, batch.total_weight)
    return runner.loss_and_correct_2.clone(), model.flat_params.grad.clone()


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("checkpointing", [3, True])
def test_inputs_in_host_memory_change_nothing(checkpointing, offload, loaded):
    keys = {"gradient_checkpointing": checkpointing, "base_offload": offload}
    plain, moved = loaded(**keys, activation_offload=False), loaded(**keys)
    for seed, rows in enumerate([2, 4, 3]):  # blocks grow, and are larger than needed
        for one, other in zip(one_pass(plain, seed, rows), one_pass(moved, seed, rows), strict=True):
            assert torch.equal(one, other)


def test_uncompiled_passes_move_them_too(loaded):
    plain, moved = loaded(activation_offload=False), loaded()
    with layers.eager_layers():
        for one, other in zip(one_pass(plain), one_pass(moved), strict=True):
            assert torch.equal(one, other)
    assert moved.offload.num_bytes_on_host


def test_each_layers_input_is_sent_once_and_comes_back_one_ahead(loaded, monkeypatch):
    model, moves = loaded(), []
    sent, fetched = HostActivations._send, HostActivations._fetch
    back = HostActivations._bring_back
    monkeypatch.setattr(
        HostActivations, "_send", lambda self, n, x: (moves.append(("to", n, tuple(x.shape))), sent(self, n, x))[1]
    )
    monkeypatch.setattr(
        HostActivations, "_fetch", lambda self, what: (moves.append(("from", what.number)), fetched(self, what))[1]
    )
    monkeypatch.setattr(
        HostActivations, "_bring_back", lambda self, what: (moves.append(("used", what.number)), back(self, what))[1]
    )
    one_pass(model)
    shape = tuple(collate(random_rows(3), CPU).input_ids_BT.shape)
    assert moves[: DEPTH - 1] == [("to", n, (*shape, WIDTH)) for n in range(DEPTH - 1)]  # not the last layer's
    used_and_fetched = [("used", 3), ("from", 3), ("from", 2), ("used", 2), ("from", 1), ("used", 1), ("from", 0)]
    assert moves[DEPTH - 1 :] == [*used_and_fetched, ("used", 0)]
    assert model.offload.num_bytes_on_host == (DEPTH - 1) * shape[0] * shape[1] * WIDTH * 4


def test_the_device_keeps_no_input(loaded, monkeypatch):
    model, alive = loaded(), []
    sent = HostActivations._send

    def send(self, number, x):
        alive.append(weakref.ref(x.untyped_storage()))
        counts.append(sum(ref() is not None for ref in alive))
        return sent(self, number, x)

    counts = []
    monkeypatch.setattr(HostActivations, "_send", send)
    one_pass(model)
    assert max(counts) <= 2


def test_a_forward_before_the_backward_of_another_is_an_error(loaded):
    model = loaded()
    first, second = (collate(random_rows(3, seed=seed), CPU) for seed in (0, 1))
    losses, _ = model.token_losses(first)
    model.token_losses(second)
    with pytest.raises(RuntimeError, match="after the forward of another"):
        losses.sum().backward()
    plain = loaded(activation_offload=False)
    for one, other in zip(one_pass(plain), one_pass(model), strict=True):  # and what follows is right again
        assert torch.equal(one, other)
