"""A card that fails at any of 20 steps: exit 7, nothing more computed, the last checkpoint whole, no smaller batch."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import solotune
from solotune.api import train as train_verb
from solotune.errors import DeviceError
from solotune.run.run_dir import RunDirectory
from solotune.training import checkpoint, loop

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
LOST = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


class Calls(TorchDispatchMode):
    """Counts what torch is asked to compute once `failed` is set: a lost card must not be asked anything."""

    failed = False
    after = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.after += self.failed
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def ready():
    """What `prepare_run` gives, once: 20 plans and models would take a minute."""
    return {}


@pytest.mark.parametrize("step", range(1, 21))
def test_at_each_of_20_steps(step, ready, chat_config, monkeypatch, tmp_path):
    """Out of memory and a lost card in turn."""
    error = (FULL, LOST)[step % 2]
    keys = {**chat_config, "validation_size": 12, "max_steps": 20, "save_steps": 3, "eval_strategy": "no"}
    calls, rows, handles = Calls(), [], []
    prepare_run, plain = train_verb.prepare_run, loop.train_step

    def once(*args):
        if not ready:
            ready["is"] = prepare_run(*args)
        return ready["is"]

    def failing(model, micro_batches, *args, **kwargs):
        rows.append([len(batch.rows) for batch in micro_batches])
        if len(rows) == step:

            def fail(gradient):
                calls.failed = True
                raise type(error)(*error.args)

            handles.append(model.trainable[1].register_hook(fail))
        return plain(model, micro_batches, *args, **kwargs)

    monkeypatch.setattr(train_verb, "prepare_run", once)
    monkeypatch.setattr(loop, "train_step", failing)
    with calls, pytest.raises(DeviceError) as caught:
        solotune.train(keys)
    handles.pop().remove()
    ready["is"].model.zero_gradients()
    assert caught.value.exit_code == 7
    assert calls.failed and calls.after == 0
    assert rows == [[4]] * step  # the batch that the config says, and no second try with a smaller one
    run = RunDirectory.open("run")
    last = (step - 1) // 3 * 3
    newest = checkpoint.newest(run.checkpoints)
    assert (newest is None) if not last else checkpoint.load(newest).step == last
    events = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "device_failed"
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, step))
