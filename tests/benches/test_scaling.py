"""bench.scaling: a checkpoint without bytes, whose weights are made while it is loaded, the same on each rank."""

from __future__ import annotations

import torch
from tiny import save_tokenizer

from bench import plan_cases, scaling
from solotune.model import loading
from solotune.model.weight_files import read_header
from solotune.model.weights import TensorMatch

TINY = plan_cases._llama(64, 128, 2, 4, 2, 512, True)


def test_a_checkpoint_has_names_and_shapes_and_takes_no_disk(tmp_path, monkeypatch):
    monkeypatch.setitem(plan_cases.MODELS, "tiny", TINY)
    save_tokenizer(tmp_path / "tokenizer")
    scaling.make_checkpoint(tmp_path / "made", "tiny", tmp_path / "tokenizer")
    path = tmp_path / "made" / "model.safetensors"
    header = read_header(path)
    assert tuple(header["model.layers.1.mlp.down_proj.weight"].shape) == (64, 128)
    assert "lm_head.weight" not in header, "it is the embedding"
    assert path.stat().st_size > 200_000 > 512 * path.stat().st_blocks
    assert (tmp_path / "made" / "tokenizer.json").is_file()

    monkeypatch.setattr(loading, "read_tensors", loading.read_tensors)
    scaling.make_weights_here()
    match = TensorMatch({name: name for name in header})
    first, again = (dict(loading.read_tensors([path], match, torch.bfloat16)) for _ in range(2))
    assert first.keys() == header.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    spread = {name: float(tensor.float().std()) for name, tensor in first.items()}
    assert 0.9 < spread["model.embed_tokens.weight"] < 1.1
    assert 0.015 < spread["model.layers.0.mlp.up_proj.weight"] < 0.025
    assert spread["model.layers.0.mlp.down_proj.weight"] < 0.001, "layers add little to the embedding"


def test_the_table_compares_cards_with_one_and_losses_with_their_noise():
    def run(speed, losses):
        planned = {"step_seconds": 1.0, "peak_gib": 5.0, "choices": []}
        return {"tokens_per_second": speed, "step_seconds": 1.1, "peak_gib": 5.1, "losses": losses, "planned": planned}

    one, both = [run(100, [2.0, 1.5]), run(102, [2.0, 1.501])], run(199, [2.0, 1.5002])
    assert scaling.row("8B", 2, one, both) == ["8B", "101", "199", "1.970", 5.1, "1.0 / 1.1", "1.0e-03", "2.0e-04"]
    assert scaling.row("70B", 2, [], both)[1:4] == ["", "199", ""], "not run on one card"
