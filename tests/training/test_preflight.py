"""The largest step is the one that is tried, it says what it took, and nothing is different afterwards."""

from __future__ import annotations

import weakref
from contextlib import contextmanager

import pytest
import torch
from inline_snapshot import snapshot
from tiny import random_rows

from solotune.dataset import sampler
from solotune.dataset.collate import collate
from solotune.errors import CheckError, StorageError
from solotune.model import lora
from solotune.model.loading import load_model
from solotune.training import loop, preflight
from solotune.training.optimizer import make_optimizer
from tests.messages import stable

CPU = torch.device("cpu")
ROWS = random_rows(40)


def steps(model, config, count=3):
    torch.manual_seed(5)
    optimizer = make_optimizer(config.optimizer, [model.flat_params])
    model.module.train()
    return [loop.train_step(model, [collate(ROWS[:4], CPU)], optimizer, 1.0) for _ in range(count)]


@pytest.mark.parametrize("packing", [False, True])
def test_nothing_is_different_afterwards(packing, tiny_config, tmp_path):
    config = tiny_config(lora_dropout=0.2, packing=packing, weight_decay=0.1)
    untouched = load_model(config, CPU, torch.float32)
    tried = load_model(config, CPU, torch.float32)
    torch.manual_seed(7)
    before = {name: tensor.clone() for name, tensor in lora.state_dict(tried.lora_layers).items()}
    report = preflight.preflight(tried, ROWS, ROWS[:9], config, tmp_path)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))
    assert not tried.flat_params.grad.any()
    assert all(torch.equal(before[name], tensor) for name, tensor in lora.state_dict(tried.lora_layers).items())
    assert list(tmp_path.iterdir()) == []
    assert steps(tried, config) == steps(untouched, config)
    assert report.peak_bytes > 0 and report.step_seconds > 0
    words = report.in_words(5 << 29)
    assert words.startswith(
        f"preflight: the largest step ({report.rows} rows, {report.places} tokens with padding) needed "
    )
    assert " MiB (2.5 GiB planned) and " in words


def test_the_longest_rows_come_together(tiny_config):
    model = load_model(tiny_config(), CPU, torch.float32)
    lengths = sorted((len(row.input_ids) for row in ROWS), reverse=True)
    batch = preflight.largest_micro_batch(model, ROWS, tiny_config(per_device_train_batch_size=3).batches)
    assert sorted((len(row.input_ids) for row in batch.rows), reverse=True) == lengths[:3]
    assert batch.input_ids_BT.shape == (3, lengths[0])


def test_packs_have_the_shape_they_have_in_the_run(tiny_config):
    config = tiny_config(packing=True, torch_compile=True, per_device_train_batch_size=2)
    model = load_model(tiny_config(), CPU, torch.float32)
    batch = preflight.largest_micro_batch(model, ROWS, config.batches)
    packs, shape = sampler.pack_and_shape(config.batches, ROWS)
    assert shape is not None
    assert batch.input_ids_BT.shape == (2, 64) and len(batch.cu_seqlens_S) == shape.num_starts
    fullest = sorted((sum(len(ROWS[row].input_ids) for row in pack) for pack in packs), reverse=True)[:2]
    assert batch.num_tokens == sum(fullest)


def test_what_does_not_fit_is_a_check_that_says_no(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(per_device_train_batch_size=4)
    model = load_model(config, CPU, torch.float32)

    def full(*_, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more.")

    monkeypatch.setattr(loop, "train_step", full)
    with pytest.raises(CheckError) as caught:
        preflight.preflight(model, ROWS, ROWS[:2], config, tmp_path)
    assert stable(caught.value) == snapshot("""\
preflight: the largest step of this run does not fit in GPU memory
  seen:    4 x 24 tokens: CUDA out of memory. Tried to allocate 2.00 GiB.
  change:  per_device_train_batch_size: 2 with gradient_accumulation_steps: 16 (same rows per step) or gradient_checkpointing: true\
""")
    assert caught.value.exit_code == 3


def test_an_evaluation_that_does_not_fit_names_its_own_key(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(per_device_eval_batch_size=4)
    model = load_model(config, CPU, torch.float32)

    def full(*_, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more.")

    monkeypatch.setattr(preflight.scores, "score", full)
    with pytest.raises(CheckError) as caught:
        preflight.preflight(model, ROWS, ROWS[:2], config, tmp_path)
    tokens = max(len(row.input_ids) for row in ROWS[:2])
    assert "preflight: an evaluation of this run does not fit in GPU memory" in str(caught.value)
    assert f"2 x {tokens} tokens: " in str(caught.value)
    assert "per_device_eval_batch_size: 2" in str(caught.value)


def test_it_evaluates_beside_the_state_of_the_optimizer(tiny_config, tmp_path, monkeypatch):
    config, made, alive = tiny_config(), [], []
    make, score = preflight.make_optimizer, preflight.scores.score

    def remembered(*given):
        optimizer = make(*given)
        made.append(weakref.ref(optimizer))
        return optimizer

    def scored(*given):
        alive.extend(bool(ref() and ref().state) for ref in made)
        return score(*given)

    monkeypatch.setattr(preflight, "make_optimizer", remembered)
    monkeypatch.setattr(preflight.scores, "score", scored)
    report = preflight.preflight(load_model(config, CPU, torch.float32), ROWS, ROWS[:2], config, tmp_path)
    assert alive == [True]
    assert "; an evaluation " in (words := report.in_words(1 << 30, 3 << 30)) and "(3.0 GiB planned)" in words


def test_a_folder_that_takes_no_checkpoint_is_told_before_the_run(tiny_config, tmp_path):
    config = tiny_config()
    model = load_model(config, CPU, torch.float32)
    with pytest.raises(StorageError, match="gone"):
        preflight.preflight(model, ROWS, ROWS[:2], config, tmp_path / "gone")


def compiled_eagerly(tiny_config, monkeypatch, **keys):
    """A model whose layers are traced by the compiler and run without kernels of its own."""
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, _, **__: graph.forward)
    config = tiny_config(torch_compile=True, lora_dropout=0.2, gradient_checkpointing=1, **keys)
    model = load_model(config, CPU, torch.float32)
    for layer in model.lora_layers.values():
        torch.nn.init.normal_(layer.lora_B.data, std=0.1)
    return model, config


def test_compiled_layers_have_the_gradient_of_their_code(tiny_config, tmp_path, monkeypatch):
    model, config = compiled_eagerly(tiny_config, monkeypatch)
    report = preflight.preflight(model, ROWS, ROWS[:2], config, tmp_path)
    assert report.gradient_error is not None and report.gradient_error < 1e-4
    assert report.in_words(0).endswith("; compiled and uncompiled gradients differ by 0.0%")


def test_where_uncompiled_layers_have_no_room_they_are_not_compared(tiny_config, tmp_path, monkeypatch):
    model, config = compiled_eagerly(tiny_config, monkeypatch)

    @contextmanager
    def without_room():
        raise torch.OutOfMemoryError("CUDA out of memory.")
        yield

    monkeypatch.setattr(preflight.layers, "eager_layers", without_room)
    assert preflight.preflight(model, ROWS, ROWS[:2], config, tmp_path).gradient_error is None
    assert not model.flat_params.grad.any()


def test_a_compiler_that_loses_a_gradient_is_found(tiny_config, tmp_path, monkeypatch):
    from solotune.model import frozen_linear

    model, config = compiled_eagerly(tiny_config, monkeypatch, base_precision="fp8")
    preflight.preflight(model, ROWS, ROWS[:2], config, tmp_path)

    class WithoutGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, codes, scales, *_):
            ctx.width = x.shape[1]
            return frozen_linear.fp8_product(x, codes, scales)

        @staticmethod
        def backward(ctx, dy):
            return dy.new_zeros(dy.shape[0], ctx.width), None, None, None, None

    own = frozen_linear.fp8_matmul

    def lost_when_compiled(*args):
        return WithoutGradient.apply(*args) if torch.compiler.is_compiling() else own(*args)

    torch._dynamo.reset()
    monkeypatch.setattr(frozen_linear, "fp8_matmul", lost_when_compiled)
    with pytest.raises(CheckError, match="compiled and uncompiled gradients differ"):
        preflight.preflight(model, ROWS, ROWS[:2], config, tmp_path)
