"""A model's shape and a layer's costs: counted without weights, and the same as what is really there."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny import FAMILIES, random_rows

from solotune.dataset.collate import collate
from solotune.model.frozen_linear import FrozenLinear, stored_bytes
from solotune.model.loading import load_model
from solotune.planning.curve_fit import growth_through
from solotune.planning.layer_profile import ModelShape, Polynomial
from solotune.planning.model_shape import estimated, model_shape
from solotune.planning.profile_eager import metered

CPU = torch.device("cpu")
ESTIMATED = {"mixtral"}  # which experts a token takes, only data knows


def kept_by_autograd(model, layer, rows: int, tokens: int) -> int:
    """Bytes that one layer of a real model leaves behind for backward, its input left out and its output counted."""
    found: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    outputs, inputs = [], []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        held.append(storage)
        return tensor

    held: list[object] = []
    plain = layer.forward

    def watched(*args, **kwargs):
        x = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        own.update(t.untyped_storage().data_ptr() for t in [*args, *kwargs.values()] if isinstance(t, torch.Tensor))
        for pair in kwargs.get("position_embeddings") or ():
            own.add(pair.untyped_storage().data_ptr())
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            result = plain(x, *args[1:], **{k: v for k, v in kwargs.items() if k != "hidden_states"})
        y = result if isinstance(result, torch.Tensor) else result[0]
        inputs.append(x)
        outputs.append(y)
        return result

    layer.forward = watched
    model.module.base_model(input_ids=torch.ones(rows, tokens, dtype=torch.int64), use_cache=False)
    del layer.forward
    own.add(inputs[0].untyped_storage().data_ptr())
    y = outputs[0].untyped_storage()
    found[y.data_ptr()] = y.nbytes()
    return sum(size for key, size in found.items() if key not in own)


@pytest.fixture(scope="module")
def known() -> dict[tuple[str, bool], ModelShape]:
    return {}


@pytest.fixture
def shape_of(known, tiny_config):
    """shape_of(family, is_compiled) -> its shape with dropout 0.1, looked at once for all tests of this file."""

    def shape(family: str, is_compiled: bool = False) -> ModelShape:
        if (family, is_compiled) not in known:
            config = tiny_config(family, lora_dropout=0.1, torch_compile=is_compiled)
            known[family, is_compiled] = model_shape(config)
        return known[family, is_compiled]

    return shape


def test_what_cannot_be_traced_leaves_no_traceback_on_the_screen(tiny_config):
    heard, handler = [], logging.Handler()
    handler.emit = heard.append
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(handler)
    try:
        model_shape(tiny_config("mixtral"))
    finally:
        logger.removeHandler(handler)
    assert not heard and not logger.disabled


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_shape_with_the_parameters_that_it_has(family, tiny_config, shape_of):
    shape = shape_of(family)
    model = load_model(tiny_config(family, lora_dropout=0.1), CPU, torch.float32)
    assert shape.num_trainable == model.num_trainable
    linears = [m for m in model.module.modules() if isinstance(m, FrozenLinear)]
    assert sum(linear.count for linear in shape.linears) == len(linears)
    biases = sum(linear.count * linear.out_features * linear.has_bias for linear in shape.linears)
    assert 4 * (shape.num_frozen + biases) == stored_bytes(model.module)
    rest = model.num_parameters - shape.num_frozen - biases - shape.num_trainable
    assert shape.other_parameters == rest
    assert len(shape.layers) == len(model.layers) == len(shape.layer_linears)
    for layer, counted in zip(model.layers, shape.layer_linears, strict=True):  # what is copied if it streams
        assert stored_bytes(layer) == 4 * sum(
            linear.count * (linear.weights + linear.out_features * linear.has_bias) for linear in counted
        )
    embedding, head = model.module.get_input_embeddings(), model.module.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    assert shape.embedding_parameters == (0 if is_tied else embedding.weight.numel())
    assert {layer.how for layer in shape.layers} == {"estimated" if family in ESTIMATED else "eager"}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ESTIMATED])
def test_what_a_layer_keeps_is_what_autograd_keeps(family, tiny_config, shape_of):
    shape = shape_of(family)
    model = load_model(tiny_config(family, lora_dropout=0.1), CPU, torch.float32)
    model.module.train()
    real = kept_by_autograd(model, model.layers[0], rows=2, tokens=96)
    assert shape.layers[0].kept.at(2, 96) == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        *(
            pytest.param(family, marks=pytest.mark.slow)  # gemma3: norms before and after; neox: MLP beside attention
            for family in ("gemma3", "neox", "qwen3", "gpt2", "phi", "cohere", "granite", "opt")
        ),
    ],
)
def test_compiled_layers_of_many_families_can_be_looked_at_and_keep_less(family, shape_of):
    eager, compiled = shape_of(family).layers[0], shape_of(family, is_compiled=True).layers[0]
    assert compiled.how == "compiled"
    assert 0.2 < compiled.kept.per_token / eager.kept.per_token < 0.9
    assert compiled.output == eager.output
    # matmuls are the same work however they are run
    for part in ("forward", "backward"):
        work = [sum(m.flops.per_token for m in getattr(cost, part).matmuls) for cost in (eager, compiled)]
        assert work[0] == pytest.approx(work[1], rel=0.05)


def test_a_compiled_llama_layer_keeps_matmul_outputs_attention_and_its_norms_scales(shape_of):
    """The list of design §5: x, q, k, v, attention's output and lse, the residual, gate, up, r values an adapter."""
    kept = shape_of("llama", is_compiled=True).layers[0].kept
    width, kv, mlp, heads, r = 64, 32, 96, 4, 4
    values = width + width + kv + kv + width + width + mlp + mlp + 7 * r  # y takes the place of x
    scales = heads + 2  # fp32, as all is here
    assert kept.per_token == 4 * (values + scales)


@pytest.mark.slow
def test_fp8_layers_are_looked_at_as_a_gpu_multiplies_them(tiny_config):
    plain = model_shape(tiny_config("llama", torch_compile=True, bf16=True, base_precision="bf16")).layers[0]
    fp8 = model_shape(tiny_config("llama", torch_compile=True, bf16=True, base_precision="fp8")).layers[0]
    assert fp8.how == "compiled"
    assert fp8.kept == plain.kept
    assert fp8.forward.other_bytes.per_token > plain.forward.other_bytes.per_token  # rounding


def test_the_meter_counts_births_and_deaths():
    with metered() as meter:
        a = torch.empty(1000)
        b = a + 1
        del a
        c = b.view(10, 100)
        assert meter.now == 4000
        assert meter.most == 8000
        del b, c
        assert meter.now == 0


def test_a_growth_goes_through_its_points():
    assert growth_through([2, 4], [10, 16]) == Polynomial(4, 3)
    found = growth_through([1, 2, 4], [6, 11, 27])
    assert [found.at(1, t) for t in (1, 2, 4)] == pytest.approx([6, 11, 27])
    assert Polynomial(5, 2, 1).at(3, 10) == 5 + 3 * 10 * (2 + 10)


def test_an_estimate_is_of_the_right_order(tiny_config):
    config = tiny_config("llama")
    model = load_model(config, CPU, torch.float32)
    guess = estimated(model.layers[0], torch.empty(1, 8, 64), is_compiled=False)
    traced = model_shape(config).layers[0]
    assert guess.how == "estimated"
    assert 0.5 < guess.kept.per_token / traced.kept.per_token < 2


def test_looking_at_a_model_leaves_nothing_behind(tiny_config):
    """A model loaded after it gives the losses that it gives without it."""
    config = tiny_config("llama")
    batch = collate(random_rows(2), CPU)
    before, _ = load_model(config, CPU, torch.float32).token_losses(batch)
    model_shape(config)
    after, _ = load_model(config, CPU, torch.float32).token_losses(batch)
    assert torch.equal(before, after)


def test_a_model_that_looks_into_its_data_is_estimated(tiny_config, monkeypatch):
    """As OPT does in some versions of transformers: a run must not stop because its plan cannot look."""
    config = tiny_config("llama")
    looked_at = model_shape(config)
    monkeypatch.setattr(
        "transformers.models.llama.modeling_llama.LlamaModel.forward",
        lambda self, input_ids, **_: input_ids.sum().item(),
    )
    shape = model_shape(config)
    assert {layer.how for layer in (*shape.layers, shape.outside)} == {"estimated"}
    assert shape.num_trainable == looked_at.num_trainable
    kept = [sum(layer.kept.at(2, 64) for layer in one.layers) for one in (shape, looked_at)]
    assert kept[0] == pytest.approx(kept[1], rel=0.5)
