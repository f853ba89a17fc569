"""What vLLM's loaders require of a folder, and the line that serves it."""

import json
import shlex
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tiny import save_tokenizer

from solotune.errors import InputError
from solotune.exporters.vllm import check_vllm, serve_line

PLAIN = {
    "peft_type": "LORA", "r": 12, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none", "use_dora": False,
    "modules_to_save": None, "rank_pattern": {},
}  # fmt: skip
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def merged(model_folder, tmp_path):
    folder = shutil.copytree(model_folder("llama"), tmp_path / "merged")
    save_tokenizer(folder)
    return folder


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({f"{LAYER}.lora_A.weight": torch.zeros(12, 4), f"{LAYER}.lora_B.weight": torch.zeros(4, 12)}, folder / "adapter_model.safetensors")  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN))
    return folder


def change(folder, name, **keys):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def test_a_merged_model_and_its_line(merged):
    assert check_vllm(merged) == []
    assert serve_line(merged, "demo") == f"vllm serve {merged} --served-model-name demo"


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"architectures": ["NovelForCausalLM"]}, "which is not in vLLM's list"),
        ({"architectures": None}, "architectures is missing"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "read it as a quantised model"),
        ({"dtype": "float64", "torch_dtype": None}, "dtype is float64"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "--trust-remote-code"),
    ],
)
def test_config_keys_that_it_refuses(merged, keys, problem):
    change(merged, "config.json", **keys)
    (found,) = check_vllm(merged)
    assert problem in found


def test_files_that_are_missing_or_odd(merged):
    (merged / "tokenizer.json").unlink()
    (merged / "generation_config.json").unlink()
    save_file({"model.norm.weight": torch.zeros(4, dtype=torch.int8)}, merged / "model.safetensors")
    assert check_vllm(merged) == [
        "model.safetensors: model.norm.weight is stored as I8; allowed are BF16, F16, F32",
        "no tokenizer (tokenizer.json or tokenizer.model)",
        "generation_config.json: missing; vLLM stops at the eos token of config.json alone",
    ]
    (merged / "model.safetensors").unlink()
    assert check_vllm(merged)[0].startswith("no model.safetensors")


def test_shards_and_their_index(merged):
    save_file({"a": torch.zeros(1), "q.base_layer.weight": torch.zeros(1)}, merged / "one.safetensors")
    index = merged / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert check_vllm(merged) == [
        "two.safetensors: named in the index, but missing",
        "model.safetensors.index.json: b is only in the index or only in a file",
        "q.base_layer.weight: not a tensor of the merged model",
    ]
    index.write_text(json.dumps({"weight_map": {"a": "../merged/one.safetensors"}}))
    assert "refers to a file outside the folder" in check_vllm(merged)[0]


def test_an_adapter_and_its_line(adapter):
    assert check_vllm(adapter, {"architectures": ["LlamaForCausalLM"]}) == []
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "chat_template.jinja").write_text("x")
    (adapter / "generation_config.json").write_text("{}")
    words = shlex.split(serve_line(adapter, "demo", base="org/name", revision="main"))
    assert words[:6] == ["vllm", "serve", "org/name", "--revision", "main", "--enable-lora"]
    options = dict(zip(words[6::2], words[7::2], strict=True))
    assert options == {
        "--lora-modules": f"demo={adapter}",
        "--max-lora-rank": "16",  # the next that vLLM has above 12
        "--tokenizer": str(adapter),
        "--chat-template": f"{adapter}/chat_template.jinja",
        "--generation-config": str(adapter),
    }


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"r": 600}, "rank 600; vLLM serves 1 to 512"),
        ({"lora_alpha": None}, "lora_alpha missing"),
        ({"peft_type": "LOHA"}, "peft_type is LOHA"),
        ({"bias": "all"}, "bias is all"),
        ({"use_dora": True}, "use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern; vLLM scales all layers by r and lora_alpha"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ],
)
def test_adapters_that_it_refuses_or_would_scale_wrongly(adapter, keys, problem):
    change(adapter, "adapter_config.json", **keys)
    (found,) = check_vllm(adapter)
    assert problem in found


def test_a_base_that_it_serves_without_adapters_only(adapter):
    (found,) = check_vllm(adapter, {"architectures": ["GPT2LMHeadModel"]})
    assert found == "vLLM serves GPT2LMHeadModel without adapters only, so serve the merged model"


def test_adapters_on_the_head_and_foreign_tensors(adapter):
    name = "base_model.model.lm_head.lora_A.weight"
    save_file({name: torch.zeros(2, 2), "extra": torch.zeros(2, 2)}, adapter / "adapter_model.safetensors")
    assert check_vllm(adapter) == [
        "adapter_model.safetensors: extra is not a LoRA matrix of PEFT",
        "adapter_model.safetensors: adapters on lm_head, which most of vLLM's models lack; serve the merged model",
    ]


def test_no_line_for_a_rank_that_it_does_not_serve(adapter):
    change(adapter, "adapter_config.json", r=513)
    with pytest.raises(InputError, match="cannot serve an adapter of this rank"):
        serve_line(adapter, "demo", base="org/name")
