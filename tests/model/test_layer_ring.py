"""Frozen layers that are streamed from host memory: the same numbers, and every layer with its own weights."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import FAMILIES, VOCAB, random_rows, save_model

from solotune.dataset.collate import collate
from solotune.errors import InputError
from solotune.model.layers import streamed_layers
from solotune.model.limits import offloaded_layers
from solotune.model.loading import load_model
from solotune.training.forward_backward import MicroBatchRunner, accumulate

CPU = torch.device("cpu")
DEPTH = 5
MIXTURE = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 4,
    "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_hidden_layers": DEPTH, "mlp_only_layers": [0, 3],
}  # fmt: skip
"""Layers of two sizes: dense ones, and such whose experts are no linears and stay on the device."""


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Folders of models with five layers."""

    def folder(family):
        config = FAMILIES[family]() if family in FAMILIES else transformers.Qwen3MoeConfig(**MIXTURE)
        return save_model(tmp_path_factory.mktemp(family), config, num_hidden_layers=DEPTH)

    return {family: folder(family) for family in ("llama", "neox", "mixture")}


@pytest.fixture
def loaded(deep, tiny_config):
    def load(family="llama", **keys):
        model = load_model(tiny_config(model_name_or_path=deep[family], **keys), CPU, torch.float32)
        model.module.train()
        for number, layer in enumerate(model.lora_layers.values()):
            torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(number))
        return model

    return load


def one_pass(model, seed=0):
    """Loss and gradient of a micro-batch, as training has them."""
    runner = MicroBatchRunner(model)
    model.zero_gradients()
    batch = collate(random_rows(3, seed=seed), CPU)
    runner.run(accumulate, batch, batch.total_weight)
    return runner.loss_and_correct_2.clone(), model.flat_params.grad.clone()


def losses(model):
    with torch.no_grad():
        return model.token_losses(collate(random_rows(3), CPU))[0]


@pytest.mark.parametrize("offload", [True, 3])
@pytest.mark.parametrize("checkpointing", [False, 2, True])
@pytest.mark.parametrize(("family", "precision"), [("llama", "nf4"), ("neox", "fp32")])
def test_streamed_layers_give_the_same_bits(family, precision, checkpointing, offload, loaded):
    keys = {"base_precision": precision, "gradient_checkpointing": checkpointing}
    resident, streamed = loaded(family, **keys), loaded(family, **keys, base_offload=offload)
    for seed in range(2):
        for one, other in zip(one_pass(resident, seed), one_pass(streamed, seed), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(losses(resident), losses(streamed))  # and what follows begins with the first layers again


@pytest.mark.parametrize("offload", [True, 2])
def test_layers_of_different_sizes_share_slots_of_the_largest(offload, loaded):
    keys = {"base_precision": "nf4", "base_residency": "quantized", "gradient_checkpointing": 2}
    resident, streamed = loaded("mixture", **keys), loaded("mixture", **keys, base_offload=offload)
    sizes = {block.num_bytes for block in streamed.ring._blocks}
    assert len(sizes) == 2 and streamed.ring.num_bytes_on_device == 2 * max(sizes)
    for seed in range(2):
        for one, other in zip(one_pass(resident, seed), one_pass(streamed, seed), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(losses(resident), losses(streamed))


def test_a_pass_ends_as_it_begins_whatever_ran_before(loaded):
    model = loaded(base_offload=True)
    ring = model.ring
    one_pass(model)
    assert ring._holds == [0, 1]
    losses(model)
    assert ring._holds == [0, 1]  # a pass without gradients prepares the next one
    ring.enter(3)
    assert ring._holds == [0, 3]  # a pass that broke off
    one_pass(model)
    assert ring._holds == [0, 1]


def test_the_device_holds_two_layers_and_the_host_all(loaded):
    ring = loaded(base_offload=True, base_precision="nf4").ring
    assert ring.num_bytes_on_device * DEPTH == ring.num_bytes_on_host * 2
    assert loaded(base_offload="auto").ring is None


def test_each_layer_is_copied_twice_a_pass_and_in_order(loaded, monkeypatch):
    ring = loaded(base_offload=True, gradient_checkpointing=True).ring
    copied = []
    original = ring._copy
    monkeypatch.setattr(ring, "_copy", lambda position: (copied.append(position), original(position)))
    for forward in (True, False):
        for position in range(DEPTH) if forward else reversed(range(DEPTH)):
            ring.enter(position)
            ring.leave(position, 1 if forward else -1)
    assert copied == [2, 3, 4, 2, 1, 0]  # 0 and 1 are there since the check of the head, a pass without gradients
    copied.clear()
    ring.finish_pass()
    assert copied == []


@pytest.mark.parametrize(
    ("wanted", "numbers"), [("auto", []), (False, []), (True, [0, 1, 2, 3, 4]), (2, [0, 2]), (9, [0, 1, 2, 3, 4])]
)
def test_which_layers_the_config_means(wanted, numbers):
    assert offloaded_layers(wanted, DEPTH) == numbers


@pytest.mark.parametrize("keys", [{"base_offload": True}, {"base_offload": 2}, {"base_sharding": True}])
def test_layers_that_share_a_part_are_refused(keys, tiny_config):
    precision, (key,) = tiny_config(**keys).precision, keys
    config = FAMILIES["llama"]()
    config.num_hidden_layers = DEPTH
    module = transformers.AutoModelForCausalLM.from_config(config)
    assert len(streamed_layers(module, precision)) == (DEPTH if keys[key] is True else 2)
    module.model.layers[3].mlp = module.model.layers[2].mlp
    with pytest.raises(InputError, match=f"{key}: layers of llama share parts, so they cannot be streamed alone"):
        streamed_layers(module, precision)
    assert streamed_layers(module, tiny_config().precision) == []


@pytest.mark.parametrize(("value", "seen"), [(0, "0"), (-3, "-3"), (2.5, "2.5"), ("some", "some")])
def test_a_number_of_layers_is_at_least_one(value, seen, tiny_config):
    with pytest.raises(InputError) as caught:
        tiny_config(base_offload=value)
    assert "base_offload" in str(caught.value) and seen in str(caught.value)
    assert "auto, or true or false, or a whole number, at least 1" in str(caught.value)


def test_an_unpacked_copy_and_offload_contradict_each_other(tiny_config):
    with pytest.raises(InputError, match="base_residency and base_offload"):
        tiny_config(base_precision="nf4", base_residency="dequantized", base_offload=True)
