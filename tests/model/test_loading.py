"""Loading: any family, tensor by tensor, the same logits as transformers; and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from inline_snapshot import snapshot
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, random_rows
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401 - AutoTokenizer: import cost paid once

from solotune.dataset.collate import collate
from solotune.errors import InputError
from solotune.model.frozen_linear import Fp8Weight, FrozenLinear
from solotune.model.loading import load_model
from solotune.model.loss import token_losses_reference
from tests.messages import stable

CPU = torch.device("cpu")


def load(config):
    return load_model(config, CPU, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_transformers_with_padding_and_mask(family, tiny_config, model_folder):
    model = load(tiny_config(family))
    model.module.eval()
    reference = AutoModelForCausalLM.from_pretrained(model_folder(family), dtype=torch.float32).eval()
    batch = collate(random_rows(5), CPU)
    lengths = torch.tensor([len(row.input_ids) for row in batch.rows])
    attention_mask = (torch.arange(batch.input_ids_BT.shape[1]) < lengths[:, None]).long()
    with torch.no_grad():
        ours, _ = model.token_losses(batch)
        logits = reference(batch.input_ids_BT, attention_mask=attention_mask).logits
        theirs = token_losses_reference(logits, batch.input_ids_BT, batch.label_mask_BT)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
    assert model.num_parameters - model.num_trainable == reference.num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_gets_a_gradient(family, tiny_config):
    model = load(tiny_config(family, gradient_checkpointing=True))
    for layer in model.lora_layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    losses, _ = model.token_losses(collate(random_rows(2), CPU))
    losses.sum().backward()
    assert model.lora_layers
    for name, layer in model.lora_layers.items():
        assert layer.lora_A.grad is not None and layer.lora_A.grad.abs().sum() > 0, name
        assert layer.lora_B.grad is not None and layer.lora_B.grad.abs().sum() > 0, name


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_checkpointing_changes_no_loss_and_no_gradient(family, tiny_config):
    results = []
    for checkpointing in (False, True):
        model = load(tiny_config(family, gradient_checkpointing=checkpointing, lora_dropout=0.3))
        torch.manual_seed(3)
        losses, _ = model.token_losses(collate(random_rows(3), CPU))
        losses.mean().backward()
        results.append((losses.detach(), [layer.lora_B.grad for layer in model.lora_layers.values()]))
    assert torch.equal(results[0][0], results[1][0])
    for plain, recomputed in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-6, atol=1e-7)


def test_nf4_base_is_that_of_transformers_with_bitsandbytes(tiny_config, model_folder):
    from transformers import BitsAndBytesConfig

    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        model_folder("llama"), quantization_config=quantised, dtype=torch.float32, device_map={"": "cpu"}
    )
    ours = load(tiny_config("llama", base_precision="nf4"))
    frozen = {n.removesuffix(".base"): m for n, m in ours.module.named_modules() if isinstance(m, FrozenLinear)}
    four_bit = {n: m for n, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"}
    assert frozen.keys() == four_bit.keys()
    from bitsandbytes.functional import dequantize_4bit

    for name, layer in four_bit.items():
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(frozen[name].storage.dense(torch.float32), weight), name


def test_a_dequantized_copy_changes_memory_and_not_one_bit_of_the_result(tiny_config):
    batch = collate(random_rows(3), CPU)
    results = []
    for residency in ("quantized", "dequantized"):
        model = load(tiny_config(base_precision="nf4", base_residency=residency))
        copies = [m for n, m in model.module.named_buffers() if n.endswith("dequantized_OI")]
        assert len(copies) == (14 if residency == "dequantized" else 0)
        losses, _ = model.token_losses(batch)
        losses.sum().backward()
        results.append([losses.detach(), *(layer.lora_B.grad for layer in model.lora_layers.values())])
    for without, with_copy in zip(*results, strict=True):
        assert torch.equal(without, with_copy)


@pytest.mark.parametrize("base", ["nf4", "fp8"])
def test_fp8_matmuls_hold_the_bases_own_values(base, tiny_config):
    """An nf4 base multiplied in fp8 is the rounded NF4 base; an fp8 base comes straight from the weights on disk."""
    multiplied = load(tiny_config(base_precision=base, matmul_precision="fp8"))
    values = load(tiny_config(base_precision={"nf4": "nf4", "fp8": "fp32"}[base])).module
    assert multiplied.choices == []  # nothing is left to expand, so no residency is chosen
    frozen = {n: m for n, m in multiplied.module.named_modules() if isinstance(m, FrozenLinear)}
    assert len(frozen) == 14
    for name, linear in frozen.items():
        expected = Fp8Weight(values.get_submodule(name).storage.dense(torch.float32))
        for key, tensor in expected.named_buffers():
            assert torch.equal(getattr(linear.storage, key).float(), tensor.float()), (name, key)


def test_losses_with_fp8_matmuls_are_near_the_nf4_bases(tiny_config):
    batch = collate(random_rows(3), CPU)
    losses = {}
    for base, matmuls in (("nf4", "auto"), ("nf4", "fp8"), ("fp32", "auto")):
        model = load(tiny_config(base_precision=base, matmul_precision=matmuls))
        model.module.eval()
        losses[base, matmuls] = model.token_losses(batch)[0].detach()
    change = (losses["nf4", "fp8"] - losses["nf4", "auto"]).abs().mean()
    assert 0 < change < 0.5 * (losses["nf4", "auto"] - losses["fp32", "auto"]).abs().mean()


def test_residency_is_chosen_with_its_reason(tiny_config):
    (choice,) = load(tiny_config(base_precision="nf4")).choices
    assert (choice.key, choice.value) == ("base_residency", "dequantized")
    assert "GiB free, and save unpacking in every pass" in choice.because


def test_only_this_instance_is_changed(tiny_config, model_folder):
    from torch import nn
    from transformers.models.llama import modeling_llama

    before = (nn.Linear.forward, modeling_llama.LlamaDecoderLayer.forward, modeling_llama.LlamaForCausalLM.forward)
    load(tiny_config("llama", gradient_checkpointing=True))
    after = (nn.Linear.forward, modeling_llama.LlamaDecoderLayer.forward, modeling_llama.LlamaForCausalLM.forward)
    assert before == after
    untouched = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    assert type(untouched.model.layers[0].self_attn.q_proj) is nn.Linear


def damaged(tmp_path, folder, change):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    change(copy)
    return copy


def edit_config(**values):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def edit_weights(edit):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


Q = "model.layers.0.self_attn.q_proj.weight"
REFUSED = {
    "no config": (
        lambda f: (f / "config.json").unlink(),
        snapshot("""\
<tmp>/model: no config.json, so this is not a model folder
  allowed: a Hugging Face model folder\
"""),
    ),
    "config is not JSON": (
        lambda f: (f / "config.json").write_text("{"),
        snapshot("""\
<tmp>/model/config.json, line 1: not valid JSON
  seen:    Expecting property name enclosed in double quotes\
"""),
    ),
    "unknown architecture": (
        edit_config(model_type="nonesuch"),
        snapshot("""\
<tmp>/model/config.json: transformers cannot read this config
  seen:    model_type: 'nonesuch'
  allowed: an architecture of the installed transformers; code from a model folder never runs\
"""),
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        snapshot("""\
<tmp>/model: no weights in safetensors
  seen:    no weight files
  allowed: *.safetensors; formats that can run code are not read\
"""),
    ),
    "weights cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:1000]),
        snapshot("""\
<tmp>/model/model.safetensors: not a readable safetensors file
  seen:    a header of 2,128 bytes in a file of 1,000
  change:  download the file again\
"""),
    ),
    "a tensor is missing": (
        edit_weights(lambda t: t.pop(Q)),
        snapshot("""\
<tmp>/model: the checkpoint lacks 1 tensors
  seen:    model.layers.0.self_attn.q_proj.weight
  change:  check that config.json belongs to these weights, or download the folder again\
"""),
    ),
    "another shape": (
        edit_weights(lambda t: t.update({Q: torch.zeros(3, 64)})),
        snapshot("""\
<tmp>/model/model.safetensors: tensor model.layers.0.self_attn.q_proj.weight does not fit the architecture in config.json
  seen:    F32 (3, 64)
  allowed: floating point (64, 64)\
"""),
    ),
    "integers for floats": (
        edit_weights(lambda t: t.update({Q: t[Q].to(torch.int8)})),
        snapshot("""\
<tmp>/model/model.safetensors: tensor model.layers.0.self_attn.q_proj.weight does not fit the architecture in config.json
  seen:    I8 (64, 64)
  allowed: floating point of 16 bits or more: F32, F16, BF16, F64\
"""),
    ),
    "already quantised": (
        edit_config(quantization_config={"quant_method": "gptq"}),
        snapshot("""\
<tmp>/model/config.json: the checkpoint is already quantised
  seen:    quantization_config: gptq
  allowed: 16- or 32-bit weights, which solotune quantises itself (base_precision: nf4 is 4 bits)
  change:  use the 16-bit model that it was made from (its model card names it as base_model; often the same name without -4bit or -FP8)\
"""),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_model_folders_are_refused(case, tiny_config, model_folder, tmp_path):
    change, message = REFUSED[case]
    folder = damaged(tmp_path, model_folder("llama"), change)
    with pytest.raises(InputError) as caught:
        load(tiny_config("llama", model_name_or_path=str(folder)))
    assert stable(caught.value) == message


def test_a_pickle_is_named_and_not_read(tiny_config, model_folder, tmp_path):
    def to_bin(folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    folder = damaged(tmp_path, model_folder("llama"), to_bin)
    with pytest.raises(InputError) as caught:
        load(tiny_config("llama", model_name_or_path=str(folder)))
    assert stable(caught.value) == snapshot("""\
<tmp>/model: no weights in safetensors
  seen:    pytorch_model.bin
  allowed: *.safetensors; formats that can run code are not read\
""")


def test_rows_longer_than_the_models_positions_are_refused(tiny_config):
    with pytest.raises(InputError) as caught:
        load(tiny_config("gpt2", max_length=129))
    assert stable(caught.value) == snapshot("""\
python, max_length: larger than this model's context length
  seen:    max_length: 129
  allowed: at most 128 (max_position_embeddings in config.json)
  change:  max_length: 128\
""")


def test_no_such_folder_says_where_it_was_named(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        load(tiny_config(model_name_or_path="./nowhere/model"))
    assert stable(caught.value) == snapshot("""\
python, model_name_or_path: no such folder: ./nowhere/model
  seen:    looked in <tmp>
  change:  check the path; a hub model is named owner/name\
""")


def test_hub_id_without_connection_is_a_clear_error(tiny_config):
    with pytest.raises(InputError) as caught:
        load(tiny_config(model_name_or_path="nobody/no-such-model"))
    problem, seen, change = stable(caught.value).split("\n")
    assert (problem, change) == snapshot(
        (
            "python, model_name_or_path: nobody/no-such-model is not in the cache and cannot be downloaded",
            "  change:  unset HF_HUB_OFFLINE to download it once, or use a local folder",
        )
    )
    assert seen == "  seen:    HF_HUB_OFFLINE=1 is set, so nothing is downloaded"


def test_tensors_are_counted_while_they_are_read(tiny_config):
    seen = []
    config = tiny_config()
    load_model(config, CPU, torch.float32, progress=lambda *told: seen.append(told))
    total = len(load_file(f"{config.model_name_or_path}/model.safetensors"))
    assert seen == [(number, total, "tensors") for number in range(1, total + 1)]
