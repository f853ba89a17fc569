"""Every tensor of the files is used, named as unused, or refused; what is used is what transformers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from inline_snapshot import snapshot
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from solotune.errors import InputError
from solotune.model.frozen_linear import FrozenLinear
from solotune.model.loading import load_model
from solotune.model.lora import LoraLinear
from tests.messages import stable

CPU = torch.device("cpu")
Q = "model.layers.0.self_attn.q_proj.weight"


def changed(folder: Path, to: Path, edit: Any, **config: Any) -> Path:
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    edit(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    raw = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**raw, **config}))
    return to


def weights_of(module: torch.nn.Module, names: Any) -> dict[str, torch.Tensor]:
    """The tensors of a loaded model under the names of transformers' state dict."""
    parts, found = dict(module.named_modules()), {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        part = parts[owner]
        part = part.base if isinstance(part, LoraLinear) else part
        if isinstance(part, FrozenLinear):
            dense = part.storage.dense(torch.float32)
            found[name] = part.bias_O if leaf == "bias" else dense.T if part.transposed else dense
        else:
            found[name] = getattr(part, leaf)
    return found


def same_as_transformers(config: Any, folder: Path) -> Any:
    """Load with solotune and with transformers, compare every tensor; returns solotune's model."""
    model = load_model(config, CPU, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    ours = weights_of(model.module, theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    return model


@pytest.mark.parametrize("family", ["gpt2", "neox", "mixtral", "opt", "falcon", "phi3", "gemma3", "cohere", "granite"])
def test_every_tensor_is_the_one_that_transformers_loads(family, tiny_config, model_folder):
    same_as_transformers(tiny_config(family), model_folder(family))


def rename(old: str, new: str) -> Any:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[new + name.removeprefix(old)] = tensors.pop(name)

    return edit


RENAMED = {
    "gpt2 without its prefix": ("gpt2", rename("transformer.", "")),
    "llama without its prefix": ("llama", rename("model.", "")),
    "llama with a computed table": (
        "llama", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})),
    "gpt2 with a computed mask": ("gpt2", lambda t: t.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 128, 128)})),
}  # fmt: skip


@pytest.mark.parametrize("case", RENAMED)
def test_old_names_and_computed_tables(case, tiny_config, model_folder, tmp_path):
    family, edit = RENAMED[case]
    folder = changed(model_folder(family), tmp_path / "model", edit)
    model = same_as_transformers(tiny_config(family, model_name_or_path=str(folder)), folder)
    named = [choice for choice in model.choices if choice.key == "tensors not used"]
    assert len(named) == ("computed" in case) and all(choice.value == 1 for choice in named)


def test_a_tensor_of_a_part_that_the_architecture_lacks_is_named(tiny_config, tmp_path):
    from tests.model.test_adapter_coverage import qwen3_5, saved

    folder = saved(qwen3_5, tmp_path / "model")
    model = same_as_transformers(tiny_config(model_name_or_path=str(folder)), folder)
    (choice,) = model.choices
    assert tuple(choice) == snapshot(
        (
            "tensors not used",
            33,
            "Qwen3_5ForCausalLM computes them, or has no part for them (model.visual.blocks.0.attn.proj.bias, model.visual.blocks.0.attn.proj.weight, ...)",
        )
    )


def test_auto_map_of_an_architecture_of_transformers_is_named_and_not_used(tiny_config, model_folder, tmp_path):
    code = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    folder = changed(model_folder("phi3"), tmp_path / "model", lambda _: None, auto_map=code)
    (folder / "modeling_phi3.py").write_text("raise SystemExit('executed')")
    (folder / "configuration_phi3.py").write_text("raise SystemExit('executed')")
    (choice,) = load_model(tiny_config("phi3", model_name_or_path=str(folder)), CPU, torch.float32).choices
    assert tuple(choice) == snapshot(
        ("auto_map", "not used", "transformers has Phi3ForCausalLM itself; code from a model folder never runs")
    )


REFUSED = {
    "a tensor twice": (
        lambda t: t.update({Q.removeprefix("model."): t[Q].clone()}),
        snapshot("""\
<tmp>/model/model.safetensors: two tensors for model.layers.0.self_attn.q_proj.weight
  seen:    layers.0.self_attn.q_proj.weight and model.layers.0.self_attn.q_proj.weight\
"""),
    ),
    "a tensor too many": (
        lambda t: t.update({"score.weight": torch.zeros(2, 64)}),
        snapshot("""\
<tmp>/model: the checkpoint has 1 tensors that the architecture does not have
  seen:    score.weight
  change:  check that config.json belongs to these weights, or download the folder again\
"""),
    ),
    "a layer too many": (
        lambda t: t.update({Q.replace("0", "7"): t[Q].clone()}),
        snapshot("""\
<tmp>/model: the checkpoint has 1 tensors that the architecture does not have
  seen:    model.layers.7.self_attn.q_proj.weight
  change:  check that config.json belongs to these weights, or download the folder again\
"""),
    ),
    "a tensor missing": (
        lambda t: t.pop("model.norm.weight"),
        snapshot("""\
<tmp>/model: the checkpoint lacks 1 tensors
  seen:    model.norm.weight
  change:  check that config.json belongs to these weights, or download the folder again\
"""),
    ),
    "no head, and none is tied": (
        lambda t: t.pop("lm_head.weight"),
        snapshot("""\
<tmp>/model: the checkpoint lacks 1 tensors
  seen:    lm_head.weight
  change:  check that config.json belongs to these weights, or download the folder again\
"""),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_that_do_not_fit_are_refused(case, tiny_config, model_folder, tmp_path):
    edit, message = REFUSED[case]
    folder = changed(model_folder("llama"), tmp_path / "model", edit)
    with pytest.raises(InputError) as caught:
        load_model(tiny_config(model_name_or_path=str(folder)), CPU, torch.float32)
    assert stable(caught.value) == message


@pytest.mark.parametrize("lost", ["block_sparse_moe.experts.2.w1.weight", "input_layernorm.weight"])
def test_a_mixture_that_lacks_a_tensor_is_refused(lost, tiny_config, model_folder, tmp_path):
    edit: Any = lambda t: t.pop(f"model.layers.0.{lost}")  # noqa: E731
    folder = changed(model_folder("mixtral"), tmp_path / "model", edit)
    with pytest.raises(InputError, match="lacks"):
        load_model(tiny_config("mixtral", model_name_or_path=str(folder)), CPU, torch.float32)
