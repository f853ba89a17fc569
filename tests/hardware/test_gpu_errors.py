"""A GPU that is full or lost, as a run meets it: real steps of a tiny model, with one exception put into backward."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import metrics_of

import solotune
from solotune import cli
from solotune.config.load import load_config
from solotune.errors import DeviceError, InputError, resume_command
from solotune.evaluation import scores
from solotune.hardware import gpu_errors
from solotune.hardware.gpu_errors import DeviceMemory, smaller_settings
from solotune.model.adapter import adapter_tensors
from solotune.run.run_dir import RunDirectory
from solotune.training import checkpoint, trained_run

GIB = 1 << 30
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB")
RESUME = "solotune train run/config.yaml output_dir=run --resume"
LOST = [
    torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later"),
    torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
]


NEVER = 99


def fresh(error: Exception) -> Exception:
    """One like it that has no traceback of an earlier test."""
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy


def no_room(*_):
    raise fresh(FULL)


@pytest.fixture
def keys(chat_config):
    """A run of 6 steps that saves every second one, in the working directory."""
    return {**chat_config, "eval_strategy": "no", "save_steps": 2, "num_samples": 0}


@pytest.fixture
def fail_at(monkeypatch):
    """fail_at(step, error): that step's backward raises one like it, in the middle of the layers; NEVER disarms."""
    load_base = trained_run.load_base

    def arm(step, error):
        def load(*args):
            model, calls = load_base(*args), []

            def hook(gradient):
                calls.append(gradient)
                if len(calls) == step:
                    raise fresh(error)

            model.trainable[5].register_hook(hook)
            return model

        monkeypatch.setattr(trained_run, "load_base", load)

    return arm


@pytest.fixture
def memory(monkeypatch):
    """What the card answers when it is asked who holds it."""

    def say(total, free, reserved):
        monkeypatch.setattr(gpu_errors, "gpu_memory", lambda: DeviceMemory(total, free, reserved))

    return say


def failure_of(keys, **changes):
    with pytest.raises(DeviceError) as caught:
        solotune.train({**keys, **changes})
    assert caught.value.exit_code == 7
    return str(caught.value)


def test_a_card_that_others_fill_is_said_to_be_so(keys, fail_at, memory):
    fail_at(5, FULL)
    memory(80 * GIB, GIB // 2, 12 * GIB)
    assert failure_of(keys) == (
        "out of GPU memory (while training)\n"
        "  seen:    tried to allocate 2.00 GiB; the card has 80.0 GiB: 12.0 used by this run, 67.5 by other processes "
        "and the driver (about 0.5), 0.5 free\n"
        f"  change:  end the other processes on the card (nvidia-smi lists them) and continue with: {RESUME}, or "
        "per_device_train_batch_size: 2 with gradient_accumulation_steps: 2 (same rows per step), or "
        f"gradient_checkpointing: true and continue with: {RESUME}, or base_residency: quantized"
    )


def test_a_run_that_is_too_large_by_itself_blames_nobody(keys, fail_at, memory):
    fail_at(1, FULL)
    memory(80 * GIB, GIB // 2, 79 * GIB)
    text = failure_of(keys, per_device_train_batch_size=5, gradient_accumulation_steps=2)
    assert (
        "  change:  per_device_train_batch_size: 1 with gradient_accumulation_steps: 10 (same rows per step), or"
        in text
    )
    assert "nvidia-smi" not in text


def test_without_an_answer_of_the_card_the_message_is_made_all_the_same(keys, fail_at):
    fail_at(1, FULL)
    assert "  seen:    tried to allocate 2.00 GiB\n" in failure_of(keys)


@pytest.mark.parametrize("error", [FULL, *LOST], ids=lambda error: str(error)[:30])
def test_nothing_is_half_written_and_the_run_resumes_to_the_same_end(keys, fail_at, error):
    solotune.train({**keys, "output_dir": "whole"})
    fail_at(5, error)
    failure_of(keys)
    run = RunDirectory.open("run")
    assert not run.is_locked()
    assert {path.name for path in run.checkpoints.iterdir()} == {"step-000002", "step-000004"}
    assert checkpoint.load(run.checkpoints / "step-000004").step == 4
    assert not run.adapter.exists() and not (run.path / "evaluation.json").exists()
    assert [e["event"] for e in metrics_of(run)][-1] == "device_failed"
    fail_at(NEVER, error)
    assert cli.main(RESUME.split()[1:]) == 0
    whole, resumed = (adapter_tensors(RunDirectory.open(name).adapter) for name in ("whole", "run"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("error", [one for one in LOST if "ECC" not in str(one)], ids=lambda error: str(error)[:30])
def test_a_lost_card_names_the_last_checkpoint_and_is_not_asked_anything(keys, fail_at, monkeypatch, error):
    fail_at(5, error)
    monkeypatch.setattr(gpu_errors, "gpu_memory", lambda: pytest.fail("the card was asked"))
    assert failure_of(keys) == (
        "the GPU failed, and this process cannot use it any more; the last checkpoint is run/checkpoints/step-000004\n"
        f"  seen:    {str(error).splitlines()[0]}\n"
        f"  change:  check the card (nvidia-smi; Xid errors in dmesg), then continue with: {RESUME}"
    )


def test_a_card_lost_before_the_first_checkpoint(keys, fail_at):
    fail_at(1, LOST[0])
    assert "cannot use it any more; no checkpoint was saved yet\n" in failure_of(keys)
    fail_at(NEVER, LOST[0])
    assert cli.main(RESUME.split()[1:]) == 0  # starts anew


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("CUDA error: device-side assert triggered", "got invalid input, most often an index out of range; the last"),
        ("CUDA error: no kernel image is available for execution on the device", "  change:  run: solotune doctor"),
        (
            "CUDA error: all CUDA-capable devices are busy or unavailable",
            "another process has exclusive use of the GPU",
        ),
    ],
)
def test_failures_with_a_cause_of_their_own(keys, fail_at, said, words):
    fail_at(5, torch.AcceleratorError(said))
    text = failure_of(keys)
    assert words in text
    assert (RESUME in text) == ("no kernel image" not in said)


def test_what_the_compiler_wraps_is_found(keys, fail_at, memory):
    try:
        raise RuntimeError("backend='inductor' raised") from FULL
    except RuntimeError as wrapped:
        fail_at(1, wrapped)
    memory(80 * GIB, GIB, 78 * GIB)
    assert failure_of(keys).startswith("out of GPU memory (while training)\n  seen:    tried to allocate 2.00 GiB;")


def test_the_innermost_stage_is_said_and_none_that_was_left_before(memory):
    memory(24 * GIB, GIB, 22 * GIB)
    config = load_config({"model_name_or_path": "m", "dataset": "d"})

    def problem_of(run, *args):
        with pytest.raises((torch.OutOfMemoryError, RuntimeError)) as caught:
            run(*args)
        failure = gpu_errors.device_failure(caught.value, config.memory)
        assert failure is not None
        return failure.problem

    @gpu_errors.stage("training")
    def train(evaluate):
        with gpu_errors.stage("loading the model"):
            pass
        evaluate()

    def wrapped():
        try:
            train(no_room)
        except torch.OutOfMemoryError as error:
            raise RuntimeError("backend='inductor' raised") from error

    assert problem_of(train, gpu_errors.stage("evaluating")(no_room)).endswith(" memory (while evaluating)")
    assert problem_of(train, no_room).endswith(" memory (while training)")
    assert problem_of(wrapped).endswith(" memory (while training)")
    assert problem_of(no_room).endswith(" memory")


def test_no_room_for_the_weights_leaves_no_run_behind(keys, monkeypatch, memory, tmp_path):
    monkeypatch.setattr("solotune.model.loading.store_weight", no_room)
    memory(24 * GIB, 0, 23 * GIB)
    text = failure_of(keys, base_precision="bf16")
    assert text.startswith("out of GPU memory (while loading the model)\n")
    assert text.endswith("1.0 by other processes and the driver (about 0.5), 0.0 free\n"
                         "  change:  base_offload: true (frozen layers in host memory), or base_precision: nf4")  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_no_room_while_evaluating_asks_for_fewer_rows_there(keys, monkeypatch, memory):
    memory(24 * GIB, GIB, 22 * GIB)
    monkeypatch.setattr(scores, "collate", no_room)
    text = failure_of(keys)
    assert text.startswith("out of GPU memory (while evaluating)")
    assert f"  change:  per_device_eval_batch_size: 4 and continue with: {RESUME}, or" in text


def test_the_verb_exits_with_7(keys, fail_at, capsys):
    fail_at(5, LOST[1])
    arguments = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    path = "config.yaml"
    with open(path, "w") as file:
        file.write("\n".join(a.replace("=", ": ", 1) for a in arguments))
    assert cli.main(["train", path, "--json"]) == 7
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["exit_code"], error["meaning"]) == (7, DeviceError.meaning)
    assert error["seen"] == "CUDA error: uncorrectable ECC error encountered"


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), InputError("no"), MemoryError()]
)
def test_other_errors_stay_what_they_are(keys, fail_at, error):
    fail_at(1, error)
    with pytest.raises(type(error)) as caught:
        solotune.train(keys)
    assert str(caught.value) == str(error)


def test_a_base_on_the_card_may_go_to_the_host_before_its_precision_is_lowered():
    config = load_config({"model_name_or_path": "m", "dataset": "d", "base_precision": "bf16", "base_offload": 3,
        "gradient_checkpointing": True, "per_device_train_batch_size": 1})  # fmt: skip
    again = f" and continue with: {resume_command(Path('run'))}"
    offload = f"base_offload: true (frozen layers in host memory){again}"
    assert smaller_settings(config.memory, "training", Path("run")) == [offload, "base_precision: nf4"]
    whole = config.replaced("test", base_precision="nf4", base_residency="dequantized", base_offload=False)
    assert smaller_settings(whole.memory, "evaluating", None) == [
        "per_device_eval_batch_size: 4", "base_residency: quantized"  # the copy contradicts offloading, and goes first
    ]  # fmt: skip


def test_what_is_smallest_already_is_not_advised():
    config = load_config({"model_name_or_path": "m", "dataset": "d", "gradient_checkpointing": True,
        "per_device_train_batch_size": 1, "base_residency": "quantized", "base_offload": True})  # fmt: skip
    assert smaller_settings(config.memory, "training", None) == ["max_length: 1024"]
    assert smaller_settings(config.memory, "loading the model", None) == []
    mixed = load_config({"model_name_or_path": "m", "dataset": "d", "matmul_precision": "fp8"})
    assert smaller_settings(mixed.memory, "loading the model", None) == [
        "base_precision: nf4 with matmul_precision: auto"
    ]
