"""The token embedding beside a streamed base: in host memory unless it is the head too."""

from __future__ import annotations

import torch
import transformers
from tiny import FAMILIES

from solotune.model.host_embedding import move_embedding_to_host
from solotune.model.loading import load_model

CPU = torch.device("cpu")


def model_of(family, tied):
    config = FAMILIES[family]()
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def test_a_tied_table_stays_and_another_moves():
    own, shared = model_of("llama", tied=False), model_of("llama", tied=True)
    before = own.get_input_embeddings().weight.clone()
    assert move_embedding_to_host(own, CPU) == before.numel() * 4
    assert torch.equal(own.get_input_embeddings().weight, before)
    assert not own.get_input_embeddings().weight.requires_grad
    assert move_embedding_to_host(shared, CPU) == 0
    assert shared.get_input_embeddings().weight is shared.get_output_embeddings().weight


def test_it_moves_with_streamed_layers_only(tiny_config, monkeypatch):
    moved = []
    monkeypatch.setattr("solotune.model.layers.move_embedding_to_host", lambda *given: moved.append(given[1]))
    load_model(tiny_config(), CPU, torch.float32)
    assert moved == []
    load_model(tiny_config(base_offload=1), CPU, torch.float32)
    assert moved == [CPU]
