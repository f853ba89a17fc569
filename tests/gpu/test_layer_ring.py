"""Streamed layers on one GPU: the bits of a base that is there, compiled, checkpointed and recorded.

sh scripts/test -n 0 -m gpu tests/gpu/test_layer_ring.py
"""

from __future__ import annotations

import gc

import pytest
import torch
import transformers
from tiny import FAMILIES, random_rows

from solotune.dataset.collate import collate
from solotune.model import lora
from solotune.model.loading import load_model
from solotune.training.forward_backward import MicroBatchRunner, accumulate

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
DEPTH, PASSES = 7, 5


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model of seven layers."""
    folder = tmp_path_factory.mktemp("deep")
    torch.manual_seed(0)
    config = FAMILIES["llama"]()
    config.num_hidden_layers = DEPTH
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def passes(model, takes_graphs):
    """Losses and gradients of some micro-batches of one shape, with an evaluation between them."""
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


@pytest.mark.parametrize("takes_graphs", [False, True])
@pytest.mark.parametrize("offload", [True, 3])
@pytest.mark.parametrize(("precision", "checkpointing"), [("nf4", True), ("nf4", 2), ("bf16", False), ("fp8", True)])
def test_streamed_layers_give_the_same_bits(precision, checkpointing, offload, takes_graphs, deep, tiny_config):
    keys = {"model_name_or_path": deep, "base_precision": precision, "gradient_checkpointing": checkpointing}
    keys |= {"use_cpu": False, "bf16": True, "torch_compile": True, "lora_dropout": 0.1}
    keys |= {"base_residency": "quantized"} if precision == "nf4" else {}
    resident, again = (passes(load_model(tiny_config(**keys), GPU, torch.bfloat16), takes_graphs) for _ in range(2))
    for one, other in zip(resident, again, strict=True):
        assert torch.equal(one, other)  # else equal bits would show nothing
    streamed = passes(load_model(tiny_config(**keys, base_offload=offload), GPU, torch.bfloat16), takes_graphs)
    for one, other in zip(resident, streamed, strict=True):
        assert torch.equal(one, other)


def test_the_card_does_not_hold_the_streamed_layers(deep, tiny_config):
    keys = {"model_name_or_path": deep, "use_cpu": False, "bf16": True, "base_precision": "bf16"}
    used = []
    for offload in (False, True):
        gc.collect()
        before = torch.cuda.memory_allocated()
        model = load_model(tiny_config(**keys, base_offload=offload), GPU, torch.bfloat16)
        used.append(torch.cuda.memory_allocated() - before)
        host = model.ring.num_bytes_on_host if model.ring else 0
        del model
    assert used[0] - used[1] == pytest.approx(host * (DEPTH - 2) / DEPTH, rel=0.05)
