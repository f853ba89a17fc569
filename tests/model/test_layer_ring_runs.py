"""Whole runs with a streamed base: the same losses, adapter, evaluation and samples as with a resident one."""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace

import pytest
import torch
from tiny import metrics_of, random_rows, save_model, save_tokenizer

import solotune
from solotune.dataset import load_tokenizer
from solotune.diagnosis.probes.probed_model import restore_model_state
from solotune.diagnosis.sources.live_model import load_live_model
from solotune.errors import DeviceError
from solotune.evaluation.generation import generate
from solotune.hardware import machine
from solotune.model import layers
from solotune.model.adapter import adapter_tensors
from solotune.model.layer_ring import LayerRing
from solotune.model.loading import load_model
from solotune.run.run_dir import RunDirectory
from solotune.training import loop, nonfinite
from solotune.training.trained_run import TunedRun

DEPTH = 5
CPU = torch.device("cpu")
OF_THE_MACHINE = {"time", "seconds", "tokens_per_second", "peak_bytes", "data_seconds"}


@pytest.fixture(scope="session")
def deep_model(tmp_path_factory):
    """A random Llama of five layers with a tokenizer."""
    folder = tmp_path_factory.mktemp("deep-chat-model")
    save_tokenizer(folder)
    return save_model(folder, num_hidden_layers=DEPTH)


@pytest.fixture
def keys(chat_config, monkeypatch):
    """A run of a model with two layers, which take turns in a ring of one slot."""
    monkeypatch.setattr(layers, "LayerRing", functools.partial(LayerRing, slots=1))
    settings = {"lora_dropout": 0.1, "gradient_accumulation_steps": 2, "gradient_checkpointing": 1, "max_steps": 4}
    often = {"eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    return {**chat_config, **settings, **often}


def result_of(path):
    """What a run leaves that does not depend on the clock."""
    run = RunDirectory(path)
    figures = [
        {key: value for key, value in event.items() if key not in OF_THE_MACHINE}
        for event in metrics_of(run)
        if event["event"] in ("step", "eval")
    ]
    evaluation = json.loads((run.path / "evaluation.json").read_text())
    return figures, evaluation, {name: tensor.tolist() for name, tensor in adapter_tensors(run.adapter).items()}


def drop_times(found):
    if isinstance(found, dict):
        return {key: drop_times(value) for key, value in found.items() if "second" not in key}
    return [drop_times(one) for one in found] if isinstance(found, list | tuple) else found


def test_a_streamed_run_is_the_resident_run_and_goes_on_as_either(keys, tmp_path, monkeypatch):
    resident = solotune.train({**keys, "output_dir": "resident"})
    expected = drop_times(result_of(resident.run_dir))
    assert expected[0] and expected[1]["samples"] and expected[2]
    solotune.train({**keys, "output_dir": "streamed", "base_offload": True})
    assert drop_times(result_of(tmp_path / "streamed")) == expected
    solotune.verify("streamed")
    check_reading(tmp_path / "streamed")

    with monkeypatch.context() as patch:
        lose_the_card_in_a_copy(patch, step=4)
        with pytest.raises(DeviceError) as caught:
            solotune.train({**keys, "output_dir": "stopped", "base_offload": True})
    assert str(caught.value) == (
        "the memory of the GPU has an error that ECC cannot correct; "
        "the last checkpoint is stopped/checkpoints/step-000002\n"
        "  seen:    CUDA error: uncorrectable ECC error encountered (NVIDIA H200, cuda:1)\n"
        "  change:  reset the card (nvidia-smi --gpu-reset, or restart the machine), then continue with: "
        "solotune train stopped/config.yaml output_dir=stopped --resume"
    )
    (failed,) = [event for event in metrics_of(RunDirectory(tmp_path / "stopped")) if event["event"] == "device_failed"]
    assert "NVIDIA H200, cuda:1" in failed["seen"]
    solotune.train({**keys, "output_dir": "stopped", "base_offload": 1}, resume=True)
    assert drop_times(result_of(tmp_path / "stopped")) == expected
    (resumed,) = [event for event in metrics_of(RunDirectory(tmp_path / "stopped")) if event["event"] == "resume"]
    assert resumed["exact"] is True


def lose_the_card_in_a_copy(patch, step):
    """In that step's backward the ring gets the error of a copy, as CUDA reports it: at a later call."""
    train_step, enter, steps = loop.train_step, LayerRing.enter, []

    def counted(*args):
        steps.append(args)
        return train_step(*args)

    def lost(ring, position):
        if len(steps) == step and torch._C._current_graph_task_id() != -1:
            raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nSearch for `cudaErrorECC")
        enter(ring, position)

    patch.setattr(loop, "train_step", counted)
    patch.setattr(LayerRing, "enter", lost)
    patch.setattr(torch.cuda, "is_initialized", lambda: True)
    patch.setattr(torch.cuda, "current_device", lambda: 1)
    patch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name="NVIDIA H200"))


def check_reading(path):
    """Where the base lies is chosen again where a run is read; wherever that is, it answers the same."""
    assert "base_offload: true" in (path / "config.yaml").read_text()
    run = TunedRun.open(path)
    assert run.config.base_offload == run.config.base_residency == "auto"
    model = run.load()
    assert model.ring is None and run.choices_of(model) == []  # on a CPU there is nothing to gain
    run.config = run.config.replaced("test", base_offload=True)
    streamed = run.load()
    assert streamed.ring is not None and streamed.ring.slots == 1
    (choice,) = run.choices_of(streamed)
    assert choice.value is True and "saves nothing" in choice.because
    prompt = list(range(5, 20))
    assert generate(streamed, prompt, 6, [2]) == generate(model, prompt, 6, [2])


@pytest.mark.parametrize("precision", ["nf4", "bf16"])
def test_every_layer_in_host_memory_is_looked_at_before_a_save_under_its_own_name(precision, deep_model, tiny_config):
    config = tiny_config(model_name_or_path=deep_model, base_offload=True, base_precision=precision)
    model = load_model(config, CPU, torch.float32)
    optimizer = loop.make_optimizer(config.optimizer, [model.flat_params])
    for slot in model.ring._slots:
        slot.fill_(0xFF)  # NaN: memory that nothing was copied into yet
    model.ring.forget()
    assert nonfinite.nonfinite_tensors(model, optimizer) == []
    model.ring._blocks[3].host.fill_(0xFF)
    found = nonfinite.nonfinite_tensors(model, optimizer)
    assert found and all(name.startswith("frozen model.layers.3.") for name in found)


def test_a_probe_leaves_every_streamed_layer_as_it_was(deep_model, tiny_config):
    config = tiny_config(model_name_or_path=deep_model, base_offload=True, base_precision="nf4")
    rows = random_rows(12)
    live = load_live_model(config, machine.probe(), load_tokenizer(config), rows[:8], rows[8:])

    def losses():
        return [live.loss_of(live.model, batch).item() for batch in live.batches]

    before = losses()
    live.evaluate(live.model)  # the last layers are on the device now
    with restore_model_state(live):
        live.backward(live.model, live.batches)  # and now the first
    assert losses() == before
