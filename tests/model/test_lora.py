"""The adapter: its arithmetic, its names, and its file, against PEFT."""

from __future__ import annotations

import pytest
import torch
from inline_snapshot import snapshot
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import random_rows
from transformers import AutoModelForCausalLM

from solotune.dataset.collate import collate
from solotune.errors import InputError
from solotune.model import lora
from solotune.model.adapter import Adapter
from solotune.model.loading import load_model
from solotune.run.atomic_io import Folder
from tests.messages import stable

CPU = torch.device("cpu")

# Llama-3.1-8B's linears: (out_features, in_features)
SHAPE_8B = {
    f"model.layers.{i}.{name}": shape
    for i in range(32)
    for name, shape in {
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (1024, 4096),
        "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096),
        "mlp.gate_proj": (14336, 4096),
        "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336),
    }.items()
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def load(config):
    return load_model(config, CPU, torch.float32)


def peft_config_of(config, model):
    name, revision = config.model_name_or_path, config.model_revision
    return lora.peft_config(config.lora, model.lora_layers, model.module, base=name, revision=revision)


def shake(model):
    """Adapters that do something."""
    generator = torch.Generator().manual_seed(1)
    for layer in model.lora_layers.values():
        layer.lora_B.data.normal_(0, 0.1, generator=generator)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3", "gemma2", "phi", "gpt2", "mixtral"])
@pytest.mark.parametrize("targets", ["all-linear", "attention"])
def test_saved_adapter_loads_in_peft_and_gives_the_same_logits(family, targets, tiny_config, model_folder, tmp_path):
    names = {"gpt2": ["c_attn"], "phi": ["q_proj", "dense"]}.get(family, ["q_proj", "v_proj"])
    config = tiny_config(family, lora_target_modules=targets if targets == "all-linear" else names, use_rslora=True)
    model = load(config)
    shake(model)
    peft_config = peft_config_of(config, model)
    Adapter(peft_config, lora.state_dict(model.lora_layers)).write(Folder(tmp_path))
    base = AutoModelForCausalLM.from_pretrained(model_folder(family), dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    model.module.eval()
    ids = torch.randint(3, 128, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.module(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
        with lora.adapters_off(model.module):
            off = model.module(ids).logits
    assert not torch.allclose(
        off, theirs(ids).logits, atol=1e-3
    )  # the adapter matters, so equality above means something
    lora_layers = {n for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert {name.removeprefix("base_model.model.") for name in lora_layers} == set(model.lora_layers)


def test_a_base_in_a_folder_is_named_where_any_working_directory_finds_it(tiny_config, model_folder, monkeypatch):
    model = load(config := tiny_config())
    folder = model_folder("llama")
    monkeypatch.chdir(folder.parent)
    written = peft_config_of(config.replaced("test", model_name_or_path=folder.name), model)
    assert (written["base_model_name_or_path"], written["revision"]) == (str(folder), None)


def test_an_untrained_adapter_changes_nothing_and_its_A_has_no_gradient(tiny_config):
    model = load(tiny_config())
    batch = collate(random_rows(2), CPU)
    on, _ = model.token_losses(batch)
    with lora.adapters_off(model.module):
        off, _ = model.token_losses(batch)
    assert torch.equal(on, off)
    on.sum().backward()
    assert all(layer.lora_A.grad.eq(0).all() for layer in model.lora_layers.values())


def test_initial_values_have_pefts_distribution_and_follow_the_seed(tiny_config, model_folder):
    base = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    theirs = get_peft_model(base, LoraConfig(r=64, target_modules="all-linear"))
    bound = {n: p.abs().max().item() for n, p in theirs.named_parameters() if "lora_A" in n}
    ours = load(tiny_config(lora_r=64))
    again, other = load(tiny_config(lora_r=64)), load(tiny_config(lora_r=64, seed=1))
    for name, layer in ours.lora_layers.items():
        peft_bound = bound[f"base_model.model.{name}.lora_A.default.weight"]
        assert layer.lora_A.abs().max().item() == pytest.approx(peft_bound, rel=0.02)
        assert torch.equal(layer.lora_A, again.lora_layers[name].lora_A)
        assert not torch.equal(layer.lora_A, other.lora_layers[name].lora_A)


def test_dropout_falls_on_the_adapter_path_only_and_keeps_the_mean(tiny_config):
    layer = next(iter(load(tiny_config(lora_dropout=0.5)).lora_layers.values()))
    torch.manual_seed(0)
    layer.lora_B.data.normal_()
    x = torch.ones(4000, layer.base.in_features)
    layer.eval()
    plain = layer(x) - layer.base(x)
    layer.train()
    dropped = layer(x) - layer.base(x)
    assert not torch.equal(plain, dropped)
    torch.testing.assert_close(dropped.mean(0), plain.mean(0), rtol=0.1, atol=0.1)


def test_a_target_that_matches_nothing_is_refused_with_what_there_is(tiny_config):
    with pytest.raises(InputError) as caught:
        load(tiny_config("gpt2", lora_target_modules=["q_proj", "c_fc"]))
    assert stable(caught.value) == snapshot("""\
python, lora_target_modules: q_proj matches no linear layer of this model
  seen:    q_proj, c_fc
  allowed: c_attn, c_proj, c_fc, or all-linear
  change:  lora_target_modules: [c_attn, c_proj, c_fc]\
""")


def test_a_foreign_adapter_is_refused(tiny_config):
    model, other = load(tiny_config()), load(tiny_config(lora_r=8))
    with pytest.raises(InputError) as caught:
        lora.load_state_dict(model.lora_layers, lora.state_dict(other.lora_layers), "adapter")
    assert stable(caught.value) == snapshot("""\
adapter: the adapter does not fit this model and config
  seen:    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight has shape (8, 64)
  allowed: shape (4, 64)\
""")
    tensors = lora.state_dict(model.lora_layers)
    tensors.pop(next(iter(tensors)))
    with pytest.raises(InputError) as caught:
        lora.load_state_dict(model.lora_layers, tensors, "adapter")
    assert stable(caught.value) == snapshot("""\
adapter: the adapter does not fit this model and config
  seen:    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight is missing
  allowed: 28 tensors such as base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight\
""")


def test_adapter_config_names_whole_modules_where_last_names_would_select_too_much(tiny_config):
    config = tiny_config(lora_target_modules=["layers.0.self_attn.q_proj"])
    model = load(config)
    written = peft_config_of(config, model)
    assert written["target_modules"] == ["model.layers.0.self_attn.q_proj"]


def test_the_walkthroughs_count_is_not_its_recipe():
    of = {n: s for n, s in SHAPE_8B.items() if n.rpartition(".")[2] in ATTENTION}
    assert lora.trainable_count(of, 16) == 13_631_488
    assert lora.trainable_count(SHAPE_8B, 8) == lora.trainable_count(SHAPE_8B, 16) / 2 == 20_971_520
    assert (16, ATTENTION) in lora.matching_lora_shapes(13_631_488, SHAPE_8B)
    printed = lora.matching_lora_shapes(20_971_520, SHAPE_8B)
    assert (8, [*ATTENTION, "gate_proj", "up_proj", "down_proj"]) in printed
    assert not any(r == 16 for r, _ in printed)
