"""Inputs of checkpointed layers and the embedding in host memory, on one GPU: the same bits, and less memory.

sh scripts/test -n 0 -m gpu tests/gpu/test_host_activations.py
"""

from __future__ import annotations

import gc

import pytest
import torch
import transformers
from tiny import random_rows, save_model

from solotune.dataset.collate import collate
from solotune.model import lora
from solotune.model.host_embedding import move_embedding_to_host
from solotune.model.loading import load_model
from solotune.training.forward_backward import MicroBatchRunner, accumulate

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
DEPTH, PASSES = 6, 5


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model of six layers with a head of its own."""
    return save_model(tmp_path_factory.mktemp("deep"), num_hidden_layers=DEPTH, tie_word_embeddings=False)


@pytest.fixture
def trained(deep, tiny_config):
    """Losses and gradients of some micro-batches, with an evaluation between them; the memory of a pass."""

    def train(takes_graphs, **keys):
        keys = {"use_cpu": False, "bf16": True, "torch_compile": True, "gradient_checkpointing": True} | keys
        model = load_model(tiny_config(model_name_or_path=deep, **keys), GPU, torch.bfloat16)
        model.module.train()
        for number, layer in enumerate(model.lora_layers.values()):
            torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator(GPU).manual_seed(number))
        runner = MicroBatchRunner(model, takes_graphs)
        batch = collate(random_rows(4), GPU)
        found = []
        for number in range(PASSES):
            model.zero_gradients()
            runner.loss_and_correct_2.zero_()
            lora.seed_dropout(model.lora_layers, 0, number)
            runner.run(accumulate, batch, batch.total_weight)
            found += [runner.loss_and_correct_2.clone(), model.flat_params.grad.clone()]
            with torch.no_grad():
                found.append(model.token_losses(batch)[0].clone())
        assert runner.unsupported_reason is None
        assert bool(runner._graphs) == takes_graphs
        return found

    return train


@pytest.mark.parametrize("takes_graphs", [False, True])
@pytest.mark.parametrize("keys", [{}, {"base_offload": True, "base_precision": "nf4"}])
def test_inputs_in_host_memory_give_the_same_bits(keys, takes_graphs, trained):
    resident = trained(takes_graphs, **keys)
    moved = trained(takes_graphs, **keys, activation_offload=True)
    for one, other in zip(resident, moved, strict=True):
        assert torch.equal(one, other)


def test_a_pass_needs_less_memory(deep, tiny_config):
    keys = {"model_name_or_path": deep, "use_cpu": False, "bf16": True, "torch_compile": True}
    keys |= {"gradient_checkpointing": True, "lora_dropout": 0.0}
    peaks = []
    for offload in (False, True):
        model = load_model(tiny_config(**keys, activation_offload=offload), GPU, torch.bfloat16)
        model.module.train()
        batch = collate(random_rows(256, seed=1), GPU)
        runner = MicroBatchRunner(model)
        runner.run(accumulate, batch, batch.total_weight)
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        runner.run(accumulate, batch, batch.total_weight)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        held = model.offload.num_bytes_on_host if model.offload else 0
        del model, runner
    assert peaks[0] - peaks[1] >= 0.5 * held  # of five inputs that are in host memory, two are on the card at a time


def test_the_embedding_is_read_from_host_memory(deep):
    model = transformers.AutoModelForCausalLM.from_pretrained(deep, dtype=torch.bfloat16).to(GPU)
    ids = torch.randint(0, model.config.vocab_size, (4, 64), device=GPU)
    with torch.no_grad():
        before, rows = model(ids).logits, model.get_input_embeddings()(ids)
        gc.collect()
        held = torch.cuda.memory_allocated()
        size = move_embedding_to_host(model, GPU)
        gc.collect()
        assert held - torch.cuda.memory_allocated() >= size
        assert model.get_input_embeddings().weight.is_cuda
        assert torch.equal(model.get_input_embeddings()(ids), rows)
        assert torch.equal(model(ids).logits, before)
        assert torch.equal(model.get_input_embeddings().weight.cpu()[ids.cpu()], rows.cpu())
