"""Streamed layers on one GPU: the bits of a base that is there, compiled, checkpointed and recorded.

sh scripts/test -n 0 -m gpu tests/gpu/test_layer_ring.py

A model is loaded and compiled once for each precision and number of streamed layers; all tests share it. Each history
of steps begins with the same adapters.
"""

from __future__ import annotations

import gc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import VOCAB, save_model

from solotune.dataset import Example
from solotune.dataset.collate import collate
from solotune.evaluation.generation import generate
from solotune.exporters import merge_choice
from solotune.model import lora
from solotune.model.frozen_linear import DenseWeight, FrozenLinear
from solotune.model.loading import load_model
from solotune.training import nonfinite
from solotune.training.forward_backward import MicroBatchRunner, accumulate

pytestmark = pytest.mark.gpu
GPU, DTYPE = torch.device("cuda"), torch.bfloat16
DEPTH, STEPS, ROWS, LENGTH = 5, 20, 4, 24
SOME = 3  # layers 0, 1 and 3
ON_GPU = {"use_cpu": False, "bf16": True, "torch_compile": True, "lora_dropout": 0.1}
PRECISIONS = {
    "nf4": {"base_precision": "nf4", "base_residency": "quantized", "gradient_checkpointing": 2},
    "bf16": {"base_precision": "bf16", "gradient_checkpointing": False},
    "fp8": {"base_precision": "fp8", "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model of five layers."""
    return save_model(tmp_path_factory.mktemp("deep"), num_hidden_layers=DEPTH)


@pytest.fixture(scope="module")
def shared():
    """(precision, base_offload) -> its model, and histories that were computed with it."""
    yield (kept := {})
    kept.clear()
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def model_of(deep, tiny_config, shared):
    def find(precision, offload):
        if (precision, offload) not in shared:
            keys = {**ON_GPU, **PRECISIONS[precision], "model_name_or_path": deep, "base_offload": offload}
            shared[precision, offload] = SimpleNamespace(
                model=load_model(tiny_config(**keys), GPU, DTYPE), histories={}
            )
        return shared[precision, offload]

    return find


def batch_of(step):
    """Four rows of one length, other ones in each step; made each time, since a graph takes a batch's tensors over."""
    rng = np.random.default_rng(step)
    mask = np.arange(LENGTH) >= LENGTH // 2
    rows = [Example(rng.integers(3, VOCAB, LENGTH).astype(np.int32), mask, f"row {i}", []) for i in range(ROWS)]
    return collate(rows, GPU)


def begin(model):
    """The adapters with which every history begins."""
    model.module.train()
    for number, layer in enumerate(model.lora_layers.values()):
        for part, seed in ((layer.lora_A, 2 * number), (layer.lora_B, 2 * number + 1)):
            values = torch.randn(part.shape, generator=torch.Generator().manual_seed(seed))
            part.data.copy_(0.1 * values)
    model.zero_gradients()


def step_once(model, runner, step, forward_backward=accumulate):
    """Loss, hits and gradient of a step, which moves the adapters."""
    batch = batch_of(step)
    model.zero_gradients()
    runner.loss_and_correct_2.zero_()
    lora.seed_dropout(model.lora_layers, 0, step)
    torch.manual_seed(step)  # of dropout that is not compiled
    runner.run(forward_backward, batch, batch.total_weight)
    found = [runner.loss_and_correct_2.clone(), model.flat_params.grad.clone()]
    with torch.no_grad():
        model.flat_params.add_(model.flat_params.grad, alpha=-0.1)
    return found


def history_of(model, takes_graphs, steps=STEPS):
    """Losses and gradients of steps, with evaluations, a generation and a look at all weights between them."""
    begin(model)
    runner, found = MicroBatchRunner(model, takes_graphs), []
    sgd = torch.optim.SGD([model.flat_params], lr=0.1)
    for step in range(steps):
        found += step_once(model, runner, step)
        if step % 3 == 2:
            with torch.no_grad():
                found.append(model.token_losses(batch_of(steps + step))[0].clone())
        if step % 7 == 6:
            found.append(torch.tensor(generate(model, list(range(5, 15)), 6, [2])))
            assert nonfinite.nonfinite_tensors(model, sgd) == []
    assert runner.unsupported_reason is None
    assert bool(runner._graphs) == takes_graphs
    runner.release()
    return found


def kept_history(entry, takes_graphs):
    if takes_graphs not in entry.histories:
        entry.histories[takes_graphs] = history_of(entry.model, takes_graphs)
    return entry.histories[takes_graphs]


def assert_same_bits(one, other):
    assert len(one) == len(other)
    for number, (first, second) in enumerate(zip(one, other, strict=True)):
        assert torch.equal(first, second), f"number {number} of {len(one)}"


@pytest.mark.parametrize("takes_graphs", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resident_base_gives_the_same_bits_twice(precision, takes_graphs, model_of):
    entry = model_of(precision, False)
    first = kept_history(entry, takes_graphs)  # else equal bits of a streamed base would show nothing
    assert_same_bits(first, history_of(entry.model, takes_graphs))
    losses = [found[0] for found in first if found.shape == (2,)]
    assert len(losses) == STEPS and len(set(map(float, losses))) == STEPS  # steps differ: no graph shows an old batch


@pytest.mark.parametrize("takes_graphs", [False, True])
@pytest.mark.parametrize(
    ("precision", "offload"), [("nf4", True), ("nf4", SOME), ("bf16", True), ("fp8", True), ("fp8", SOME)]
)
def test_streamed_layers_give_the_same_bits(precision, offload, takes_graphs, model_of):
    streamed = kept_history(model_of(precision, offload), takes_graphs)
    assert_same_bits(kept_history(model_of(precision, False), takes_graphs), streamed)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_chat_with_a_streamed_base_answers_the_same(precision, model_of):
    prompt, answers = list(range(3, 40)), []
    for offload in (False, True):
        model = model_of(precision, offload).model
        begin(model)
        model.module.eval()
        with lora.adapters_off(model.module):
            answers.append(generate(model, prompt, 12, []))
        answers.append(generate(model, prompt, 40, []))
        with torch.no_grad():
            answers.append(model.module(input_ids=torch.tensor([prompt], device=GPU), use_cache=True).logits.tolist())
    assert answers[:3] == answers[3:] and answers[0] != answers[1][:12]


@pytest.mark.parametrize("broken", ["the loss", "layer 3"])
def test_a_recording_that_fails_falls_back_to_the_same_bits(broken, model_of):
    """Reading a value is not allowed while a graph is recorded: after all layers, or in the middle of them."""
    resident = kept_history(model_of("nf4", False), False)[:6]  # three steps
    model = model_of("nf4", True).model
    begin(model)
    runner, failed = MicroBatchRunner(model, True), []

    def read(tensor):
        if torch.cuda.is_current_stream_capturing():
            failed.append(broken)
            tensor.sum().item()

    def reading(model, batch, total_weight, loss_and_correct_2):
        accumulate(model, batch, total_weight, loss_and_correct_2)
        read(loss_and_correct_2)

    hooks = []
    if broken == "layer 3":
        hooks = [model.layers[3].register_forward_pre_hook(lambda _, args: read(args[0]))]
    found = []
    try:
        for step in range(3):
            found += step_once(model, runner, step, reading if broken == "the loss" else accumulate)
    finally:
        for hook in hooks:
            hook.remove()
    assert failed == [broken] and runner.unsupported_reason and not runner.can_record
    assert_same_bits(resident, found)
    fresh = history_of(model, True)  # and the ring records again afterwards
    assert_same_bits(kept_history(model_of("nf4", False), True), fresh)


def test_the_card_does_not_hold_the_streamed_layers(deep, tiny_config):
    keys = {**ON_GPU, "model_name_or_path": deep, "base_precision": "bf16", "torch_compile": False}
    used, host, slots, table = [], 0, 0, 0
    load_model(tiny_config(**keys), GPU, DTYPE)  # cuBLAS takes its workspaces now
    for offload in (False, True):
        gc.collect()
        before = torch.cuda.memory_allocated()
        model = load_model(tiny_config(**keys, base_offload=offload), GPU, DTYPE)
        used.append(torch.cuda.memory_allocated() - before)
        if model.ring is not None:
            host, slots = model.ring.num_bytes_on_host, model.ring.num_bytes_on_device
            embedding, head = model.module.get_input_embeddings().weight, model.module.get_output_embeddings().weight
            table = 0 if embedding is head else embedding.numel() * embedding.element_size()
            del embedding, head
        del model
    assert slots * DEPTH == host * 2
    assert used[0] - used[1] == pytest.approx(host - slots + table, rel=0.05)


def test_merged_weights_of_streamed_layers_are_computed_with_from_host_memory(deep, tiny_config):
    keys = {**ON_GPU, "model_name_or_path": deep, "base_precision": "bf16", "torch_compile": False}
    found = []
    for offload in (False, True):
        model = load_model(tiny_config(**keys, base_offload=offload), GPU, DTYPE)
        model.module.eval()
        place = torch.device("cpu") if offload else GPU
        for part in model.module.modules():
            if isinstance(part, FrozenLinear):
                seed = torch.Generator().manual_seed(sum(part.storage.shape))
                part.storage = DenseWeight((0.1 * torch.randn(part.storage.shape, generator=seed)).to(place, DTYPE))
        with torch.no_grad(), merge_choice._brought_to_device(model):
            found += [model.token_losses(batch_of(step))[0] for step in range(2)]
        on_gpu = [part.weight_OI.is_cuda for part in model.module.modules() if isinstance(part, DenseWeight)]
        assert not any(on_gpu) if offload else all(on_gpu)
    assert_same_bits(found[:2], found[2:])
