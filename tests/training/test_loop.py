"""The loop: schedule, order, stops before a bad update, resuming bit for bit, golden losses."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
import torch
from inline_snapshot import snapshot
from tiny import metrics_of, random_rows

from solotune.dataset import sampler
from solotune.dataset.collate import collate
from solotune.display.progress import SilentDisplay
from solotune.errors import InterruptedRunError, NonFiniteError
from solotune.model import lora
from solotune.model.loading import load_model
from solotune.run.run_dir import RunDirectory
from solotune.runtime import signals
from solotune.training import checkpoint, loop
from solotune.training.optimizer import learning_rate_at, make_optimizer
from tests.messages import stable

CPU = torch.device("cpu")


def start(config, tmp_path, name="run"):
    run = RunDirectory.create(str(tmp_path / name))
    return load_model(config, CPU, torch.float32), run


def adapter_of(model):
    return {name: tensor.clone() for name, tensor in lora.state_dict(model.lora_layers).items()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# --- schedule


def test_epochs_are_permutations_and_the_last_step_of_an_epoch_may_be_short(tiny_config):
    config = tiny_config(per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=2.0)
    schedule = sampler.BatchSampler.of(config.batches, 10)
    steps = list(schedule.steps(0))
    assert schedule.total_steps == len(steps) == 6
    assert [[len(rows) for rows in step] for step in steps[:3]] == [[2, 2], [2, 2], [2]]
    flat = [[i for step in epoch for rows in step for i in rows] for epoch in (steps[:3], steps[3:])]
    assert sorted(flat[0]) == sorted(flat[1]) == list(range(10))
    assert flat[0] != flat[1] != list(range(10))


def test_max_steps_overrides_epochs_and_runs_over_their_end(tiny_config):
    config = tiny_config(per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=7)
    schedule = sampler.BatchSampler.of(config.batches, 8)
    assert len(list(schedule.steps(0))) == 7
    assert schedule.epoch_at(7) == 3.5


def test_a_fraction_of_an_epoch_is_rounded_up_to_whole_steps(tiny_config):
    config = tiny_config(per_device_train_batch_size=2, gradient_accumulation_steps=1, num_train_epochs=0.5)
    assert sampler.BatchSampler.of(config.batches, 10).total_steps == 3


def test_resuming_continues_the_same_row_order(tiny_config):
    schedule = sampler.BatchSampler.of(tiny_config(num_train_epochs=3.0, per_device_train_batch_size=3).batches, 30)
    assert list(schedule.steps(0))[2:] == list(schedule.steps(2))


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [{}, {"warmup_ratio": 0.13}, {"warmup_steps": 5}])
def test_the_learning_rate_is_hugging_faces_step_for_step(tiny_config, name, warmup):
    from transformers import get_scheduler

    config = tiny_config(lr_scheduler_type=name, **warmup)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    num_warmup = {0: 0, 1: 3 if "warmup_ratio" in warmup else 5}[len(warmup)]  # ceil(0.13 * 20)
    theirs = get_scheduler(name, optimizer, num_warmup, 20)
    for step in range(20):
        assert learning_rate_at(config.schedule, step, 20) == pytest.approx(
            theirs.get_last_lr()[0], rel=1e-12, abs=1e-18
        )
        optimizer.step()
        theirs.step()


# --- the run


def test_a_run_learns_and_records_every_step(tiny_config, tmp_path):
    config = tiny_config(
        max_steps=12, per_device_train_batch_size=4, gradient_accumulation_steps=1, eval_steps=5, save_steps=6
    )
    model, run = start(config, tmp_path)
    rows = random_rows(16)
    score = loop.train(model, rows, rows[:6], config, run, SilentDisplay())
    events = metrics_of(run)
    steps = [e for e in events if e["event"] == "step"]
    assert [e["step"] for e in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.2
    assert [e["step"] for e in events if e["event"] == "eval"] == [5, 10, 12]
    assert [e["step"] for e in events if e["event"] == "save"] == [6, 12]
    assert score.loss == [e for e in events if e["event"] == "eval"][-1]["loss"]
    assert {p.name for p in run.checkpoints.iterdir()} == {"step-000006", "step-000012"}
    assert all(e["num_tokens"] > e["num_supervised"] > 0 and e["grad_norm"] > 0 for e in steps)


def test_old_checkpoints_are_removed(tiny_config, tmp_path):
    config = tiny_config(max_steps=5, save_steps=1, save_total_limit=2, per_device_train_batch_size=1)
    model, run = start(config, tmp_path)
    loop.train(model, random_rows(8), [], config, run, SilentDisplay())
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-000004", "step-000005"]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    ("dropout", "optim"),
    [(0.0, "adamw_torch"), (0.2, "adamw_torch"), (0.0, "paged_adamw_8bit"), (0.0, "paged_adamw_32bit")],
)
def test_resumed_is_bit_equal_to_uninterrupted(tiny_config, tmp_path, dropout, optim):
    config = tiny_config(
        max_steps=9,
        save_steps=4,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        lora_dropout=dropout,
        lora_r=64,  # bitsandbytes keeps tensors under 4,096 elements in 32 bits
        optim=optim,
    )
    rows = random_rows(20)
    model, run = start(config, tmp_path)
    loop.train(model, rows, [], config, run, SilentDisplay())
    resumed, second = start(config, tmp_path, "second")
    point = checkpoint.load(run.checkpoints / "step-000004")
    loop.train(resumed, rows, [], config, second, SilentDisplay(), resume_from=point)
    assert_equal(adapter_of(model), adapter_of(resumed))
    whole = [e["loss"] for e in metrics_of(run) if e["event"] == "step"]
    assert [e["loss"] for e in metrics_of(second) if e["event"] == "step"] == whole[4:]


def test_two_runs_of_one_seed_are_bit_equal_and_another_seed_differs(tiny_config, tmp_path):
    adapters = []
    for i, seed in enumerate((0, 0, 1)):
        config = tiny_config(max_steps=3, lora_dropout=0.1, seed=seed)
        model, run = start(config, tmp_path, f"run{i}")
        loop.train(model, random_rows(40), [], config, run, SilentDisplay())
        adapters.append(adapter_of(model))
    assert_equal(adapters[0], adapters[1])
    assert any(not torch.equal(adapters[0][k], adapters[2][k]) for k in adapters[0])


# --- what is not finite never reaches the weights


def test_a_bad_row_stops_before_the_update_and_is_named(tiny_config, tmp_path):
    config = tiny_config(max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    model, run = start(config, tmp_path)
    rows = random_rows(8)
    rows[5].input_ids[:] = 7
    with torch.no_grad():  # one word's embedding is damaged: only the row that holds it is bad
        model.module.get_input_embeddings().weight[7] = float("nan")
        for i, row in enumerate(rows):
            if i != 5:
                row.input_ids[row.input_ids == 7] = 8
    before = adapter_of(model)
    with pytest.raises(NonFiniteError) as caught:
        loop.train(model, rows, [], config, run, SilentDisplay())
    assert stable(caught.value) == snapshot(
        """\
step 1: the loss, the gradient or the weights are not finite; stopped before the update, so the weights are unchanged
  seen:    loss nan, gradient norm nan; frozen model.embed_tokens.weight; not finite again when run again (reproducible)
  change:  check random:6\
"""
    )
    assert caught.value.exit_code == 6
    assert_equal(before, adapter_of(model))
    assert all(not p.grad.any() for p in model.trainable)
    assert metrics_of(run)[-1]["event"] == "non_finite"


def test_an_infinite_gradient_under_a_finite_loss_stops_too(tiny_config):
    config = tiny_config(per_device_train_batch_size=2)
    model = load_model(config, CPU, torch.float32)
    optimizer = make_optimizer(config.optimizer, model.trainable)
    model.trainable[0].register_hook(lambda grad: grad * float("inf") + 1e38 * 10)
    before = adapter_of(model)
    with pytest.raises(NonFiniteError, match=r"gradient norm (nan|inf)"):
        loop.train_step(model, [collate(random_rows(2), CPU)], optimizer, 1.0)
    assert_equal(before, adapter_of(model))


# --- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_finishes_the_step_saves_and_leaves(tiny_config, tmp_path, number):
    config = tiny_config(max_steps=50, save_strategy="no", per_device_train_batch_size=2)
    model, run = start(config, tmp_path)

    class StopAtThree(SilentDisplay):
        def step(self, metrics):
            if metrics.step == 3:
                os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    with signals.handle_signals(), pytest.raises(InterruptedRunError) as caught:
        loop.train(model, random_rows(8), [], config, run, StopAtThree())
    assert caught.value.exit_code == 128 + number
    assert "stopped after step 3; checkpoint saved" in str(caught.value)
    assert "--resume" in str(caught.value)
    assert checkpoint.newest(run.checkpoints).name == "step-000003"
    assert signal.getsignal(number) == handler


class Polls:
    """Within it the n-th safe place raises a stop, as after a signal that came just before it."""

    def __init__(self, monkeypatch, number):
        self.left, self.monkeypatch = number, monkeypatch

    def __enter__(self):
        self.monkeypatch.setattr(signals, "check_stop", self)

    def __exit__(self, *_):
        self.monkeypatch.undo()

    def __call__(self):
        self.left -= 1
        if self.left == 0:
            raise signals.StopRequested(signal.SIGTERM)


@pytest.mark.parametrize("polls", [1, 2, 4, 5, 6, 7])
def test_a_stop_mid_step_leaves_its_step_out_and_resumes_bit_equal(tiny_config, tmp_path, monkeypatch, polls):
    """Three micro-batches a step, with dropout: gradients and random numbers of the half step must be gone."""
    config = tiny_config(
        max_steps=4, save_strategy="no", per_device_train_batch_size=2, gradient_accumulation_steps=3, lora_dropout=0.2
    )
    rows = random_rows(24)
    model, run = start(config, tmp_path)
    loop.train(model, rows, [], config, run, SilentDisplay())
    stopped, second = start(config, tmp_path, "second")
    with Polls(monkeypatch, polls), pytest.raises(InterruptedRunError) as caught:
        loop.train(stopped, rows, [], config, second, SilentDisplay())
    done = (polls - 1) // 3
    assert not stopped.flat_params.grad.any()
    newest = checkpoint.newest(second.checkpoints)
    if not done:
        assert newest is None and "no checkpoint saved" in str(caught.value)
        return
    assert newest.name == f"step-{done:06d}" and f"stopped after step {done}; checkpoint saved" in str(caught.value)
    loop.train(stopped, rows, [], config, second, SilentDisplay(), resume_from=checkpoint.load(newest))
    assert_equal(adapter_of(model), adapter_of(stopped))


def test_an_evaluation_that_was_stopped_is_made_when_the_run_goes_on(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(
        max_steps=4, save_strategy="no", eval_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=1,
        per_device_eval_batch_size=2,
    )  # fmt: skip
    rows = random_rows(24)
    model, run = start(config, tmp_path)
    # two micro-batches, then the second batch of the evaluation
    with Polls(monkeypatch, 4), pytest.raises(InterruptedRunError, match="stopped after step 2"):
        loop.train(model, rows, rows[:6], config, run, SilentDisplay())
    assert [e["event"] for e in metrics_of(run)] == ["step", "step", "save"]
    point = checkpoint.load(checkpoint.newest(run.checkpoints))
    loop.train(model, rows, rows[:6], config, run, SilentDisplay(), resume_from=point)
    assert [(e["event"], e["step"]) for e in metrics_of(run) if e["event"] != "save"] == [
        ("step", 1), ("step", 2), ("eval", 2), ("step", 3), ("step", 4), ("eval", 4)
    ]  # fmt: skip


# --- numerics are a contract


GOLDEN = [4.9902, 4.9832, 4.9498, 4.7919, 4.7060, 4.6149, 4.6377, 4.5582]


def test_golden_losses(tiny_config, tmp_path):
    """A seeded tiny run's losses; a refactor reproduces them, and whoever changes this list says why in the commit."""
    config = tiny_config(
        "llama", max_steps=8, per_device_train_batch_size=4, gradient_accumulation_steps=2, base_precision="nf4"
    )
    model, run = start(config, tmp_path)
    loop.train(model, random_rows(24), [], config, run, SilentDisplay())
    losses = [e["loss"] for e in metrics_of(run) if e["event"] == "step"]
    np.testing.assert_allclose(losses, GOLDEN, atol=2e-4)


# --- checkpoints


def test_a_checkpoint_holds_no_pickle_and_reads_back(tiny_config, tmp_path):
    config = tiny_config(max_steps=2, save_steps=2)
    model, run = start(config, tmp_path)
    loop.train(model, random_rows(40), [], config, run, SilentDisplay(), fingerprints={"config": {}})
    folder = checkpoint.newest(run.checkpoints)
    assert {p.name for p in folder.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "random.safetensors", "state.json",
        "manifest.json",
    }  # fmt: skip
    again = checkpoint.load(folder)
    assert again.step == 2
    assert again.state["fingerprints"] == {"config": {}}
    assert_equal(again.adapter, adapter_of(model))
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
