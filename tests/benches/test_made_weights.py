"""bench.made_weights: a checkpoint without bytes, whose weights are made while it is loaded, the same in each process."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny import save_tokenizer

from bench import made_weights, plan_cases
from bench.made_weights import make_checkpoint, make_weights_here
from bench.plan_cases import QWEN2
from bench.plan_runs import config_of, random_rows
from solotune.dataset.collate import collate
from solotune.hardware.machine import probe, resolve_for_machine
from solotune.model import loading
from solotune.model.weight_files import read_header
from solotune.model.weights import TensorMatch

CPU, VOCAB = torch.device("cpu"), 512
SHAPES = {
    "untied": plan_cases._llama(64, 128, 2, 4, 2, VOCAB, False),
    "tied": plan_cases._llama(64, 128, 2, 4, 2, VOCAB, True, **QWEN2),
}


@pytest.fixture
def weights_are_made(monkeypatch):
    monkeypatch.setattr(loading, "read_tensors", loading.read_tensors)
    make_weights_here()


def test_a_checkpoint_has_names_and_shapes_and_takes_no_disk(tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    make_checkpoint(tmp_path / "made", SHAPES["tied"], tmp_path / "tokenizer")
    path = tmp_path / "made" / "model.safetensors"
    header = read_header(path)
    assert tuple(header["model.layers.1.mlp.down_proj.weight"].shape) == (64, 128)
    assert "lm_head.weight" not in header, "it is the embedding"
    assert path.stat().st_size > 200_000 > 512 * path.stat().st_blocks
    assert (tmp_path / "made" / "tokenizer.json").is_file()
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert (config["eos_token_id"], config["dtype"], config["vocab_size"]) == (2, "bfloat16", VOCAB)


def test_a_folder_that_is_there_stays_and_another_process_may_be_faster(tmp_path, monkeypatch):
    write, folder = made_weights._write_sparse, tmp_path / "made"

    def slowly(part):
        monkeypatch.undo()
        make_checkpoint(folder, SHAPES["untied"])  # as another process would, meanwhile
        write(part)

    monkeypatch.setattr(made_weights, "_write_sparse", slowly)
    make_checkpoint(folder, SHAPES["untied"])
    assert read_header(folder / "model.safetensors")
    monkeypatch.setattr(made_weights, "_write_sparse", None)  # it is not called
    make_checkpoint(folder, SHAPES["untied"])
    assert [path.name for path in tmp_path.iterdir()] == ["made"], "nothing else is left"


@pytest.mark.parametrize(("name", "embedding"), [("untied", 1.0), ("tied", 0.02)])
def test_layers_add_little_to_the_embedding_which_is_small_where_it_is_the_head(
    name, embedding, tmp_path, weights_are_made
):
    make_checkpoint(tmp_path / "made", SHAPES[name])
    path = tmp_path / "made" / "model.safetensors"
    match = TensorMatch({name: name for name in read_header(path)})
    first, again = (dict(loading.read_tensors([path], match, torch.bfloat16)) for _ in range(2))
    assert first.keys() == match.names.keys()
    assert all(torch.equal(first[name], again[name]) for name in first), "on each rank, in each run"
    spread = {name: float(tensor.float().std()) for name, tensor in first.items()}
    assert spread["model.embed_tokens.weight"] == pytest.approx(embedding, rel=0.1)
    assert spread["model.layers.0.mlp.up_proj.weight"] == pytest.approx(0.02, rel=0.1)
    assert spread["model.layers.0.mlp.down_proj.weight"] == pytest.approx(0.0003 * embedding, rel=0.1)
    assert spread["model.norm.weight"] == 0.0 and bool((first["model.norm.weight"] == 1).all())


@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("name", SHAPES)
def test_a_case_is_loaded_by_the_loader_itself_and_its_loss_is_that_of_guessing(
    name, layers, tmp_path, monkeypatch, weights_are_made
):
    monkeypatch.setitem(plan_cases.MODELS, name, SHAPES[name])
    keys = ("use_cpu=true", "base_precision=fp32", "torch_compile=false", "optim=adamw_torch")
    case = plan_cases.of(name, "2x32", *keys, "gradient_checkpointing=false")
    config, _ = resolve_for_machine(config_of(case, tmp_path, layers), probe())
    losses = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = loading.load_model(config, CPU, torch.float32)
        losses.append(model.token_losses(collate(random_rows(case, 2), CPU))[0].detach())
    assert len(model.layers) == (layers or 2)
    assert losses[0].mean().item() == pytest.approx(math.log(VOCAB), abs=0.5)
    assert torch.equal(*losses), "the weights do not depend on torch's seed"
