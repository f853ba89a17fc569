"""Facts about the machine, and the settings that follow from them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from inline_snapshot import snapshot

from solotune.config.load import load_config
from solotune.errors import DeviceError, InputError
from solotune.hardware import machine as environment
from solotune.hardware.machine import Machine, device_of, dtype_of, probe, resolve_for_machine
from tests.messages import stable

GIB = 1 << 30


def machine(**changes) -> Machine:
    values = {
        "os": "Linux 6 x86_64",
        "python": "3.12.1",
        "cpu": "a CPU",
        "num_cpus": 8,
        "ram_bytes": 64 * GIB,
        "ram_free_bytes": 50 * GIB,
        "disk_free_bytes": 500 * GIB,
        "versions": {},
    }
    return Machine(**{**values, **changes})


def gpu(capability: tuple[int, int], name: str = "H100", **changes) -> Machine:
    values = {"compute_capability": capability, "gpu_bytes": 80 * GIB, "gpu_free_bytes": 79 * GIB}
    return machine(gpu=name, **{**values, "versions": {"triton": "3.6.0"}, **changes})


@pytest.fixture
def with_compiler(monkeypatch):
    """Whether this machine has a C compiler must not matter."""
    monkeypatch.setattr(environment, "check_compiler", lambda: environment.Check("compiler", "ok", "cc, Python.h"))


def config(**values):
    return load_config({"model_name_or_path": "m", "dataset": "d", **values})


# --- settings that the machine decides


def test_a_modern_gpu_leaves_the_recipe_as_it_is(with_compiler):
    recipe = config()
    resolved, choices = resolve_for_machine(recipe, gpu((9, 0)))
    assert resolved is recipe
    assert choices == []
    assert (device_of(gpu((9, 0)), use_cpu=resolved.use_cpu), dtype_of(resolved.bf16)) == ("cuda", "bfloat16")


@pytest.mark.parametrize("on", [machine(), gpu((9, 0))])
def test_without_cuda_or_asked_for_the_cpu(on):
    resolved, choices = resolve_for_machine(config(use_cpu=on.has_cuda), on)
    assert [(choice.key, choice.value) for choice in choices] == [
        ("optim", "adamw_torch"),
        ("torch_compile", False),
        ("bf16", False),
    ]
    assert choices[0].because == "paged_adamw_8bit needs CUDA, like all 8-bit and paged optimizers"
    assert "12 times slower than float32" in choices[2].because
    assert (resolved.optim, resolved.bf16, device_of(on, use_cpu=resolved.use_cpu), dtype_of(resolved.bf16)) == (
        "adamw_torch",
        False,
        "cpu",
        "float32",
    )
    assert resolved.source_of("optim") == resolved.source_of("bf16") == "machine"


def test_the_written_out_walkthrough_recipe_settles_on_a_cpu():
    """bf16 and bnb_4bit_compute_dtype must agree in a config, so both have to change at once."""
    resolved, choices = resolve_for_machine(config(bf16=True, bnb_4bit_compute_dtype="bfloat16"), machine())
    assert [choice.key for choice in choices] == ["optim", "torch_compile", "bf16", "bnb_4bit_compute_dtype"]
    assert resolved.bnb_4bit_compute_dtype == "float32"


def test_what_fits_already_is_no_choice():
    assert resolve_for_machine(config(optim="adamw_torch", bf16=False, torch_compile=False), machine())[1] == []


def test_a_gpu_without_bfloat16_keeps_its_optimizer(with_compiler):
    resolved, choices = resolve_for_machine(config(), gpu((7, 5), "T4"))
    assert [tuple(choice) for choice in choices] == [
        ("bf16", False, "T4 has compute capability 7.5; bfloat16 needs 8.0 or more")
    ]
    assert resolved.optim == "paged_adamw_8bit"


def test_without_what_the_compiler_needs_layers_stay_uncompiled():
    _, choices = resolve_for_machine(config(), gpu((9, 0), versions={}))
    assert [tuple(choice)[:2] for choice in choices] == [("torch_compile", False)]
    assert choices[0].because == "triton: not installed; torch needs it to compile GPU kernels"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"base_precision": "fp8"},
            "python, base_precision: fp8 needs a GPU that can multiply 8-bit floats\n"
            "  seen:    A100, compute capability 8.0\n"
            "  allowed: compute capability 8.9 or more: Ada (L4, 40-series), Hopper (H100) and newer\n"
            "  change:  base_precision: bf16 (same size, closer to the original weights) or nf4 (a quarter of the size)",
        ),
        (
            {"matmul_precision": "fp8"},
            "python, matmul_precision: fp8 needs a GPU that can multiply 8-bit floats\n"
            "  seen:    A100, compute capability 8.0\n"
            "  allowed: compute capability 8.9 or more: Ada (L4, 40-series), Hopper (H100) and newer\n"
            "  change:  matmul_precision: auto (bf16 matmuls, same memory or less)",
        ),
    ],
)
def test_fp8_on_a_gpu_without_it_is_refused_with_what_works(keys, said, with_compiler):
    with pytest.raises(InputError) as caught:
        resolve_for_machine(config(**keys), gpu((8, 0), "A100"))
    assert str(caught.value) == said
    for capability in ((8, 9), (9, 0), (12, 0)):
        assert resolve_for_machine(config(**keys), gpu(capability))[1] == []


@pytest.mark.parametrize("on", [machine(), gpu((8, 0))])
@pytest.mark.parametrize("keys", [{"base_precision": "fp8"}, {"matmul_precision": "fp8"}])
def test_fp8_on_a_cpu_is_emulated_and_said_to_be_slow(keys, on):
    resolved, choices = resolve_for_machine(config(**keys, use_cpu=True), on)
    (choice,) = (c for c in choices if c.key == "matmul_precision")
    assert (choice.value, resolved.multiplies_in_fp8) == ("fp8", True)
    assert "emulated on a CPU" in choice.because and "slower" in choice.because
    assert resolve_for_machine(resolved, on)[0] == resolved


def refusing() -> Machine:
    """Another process has filled the card: torch counts it, and gets no context."""
    return machine(
        num_gpus=1, nvidia_gpu="H100", driver="570.1", cuda_error="AcceleratorError: CUDA error: out of memory"
    )


def test_a_gpu_that_another_process_has_filled_is_no_reason_to_train_on_the_cpu():
    with pytest.raises(DeviceError) as caught:
        resolve_for_machine(config(), refusing())
    assert stable(caught.value) == snapshot("""\
this machine has a GPU, but it cannot be used
  seen:    AcceleratorError: CUDA error: out of memory
  change:  end the processes that use it (nvidia-smi lists them), or set use_cpu: true\
""")
    assert caught.value.exit_code == 7
    assert resolve_for_machine(config(use_cpu=True), refusing())[0].optim == "adamw_torch"


def test_settling_twice_changes_nothing_more():
    resolved, _ = resolve_for_machine(config(), machine())
    assert resolve_for_machine(resolved, machine())[1] == []


# --- probe


def test_probe_of_this_machine(monkeypatch):
    for name in ("LOGNAME", "USER"):  # which a container may not have
        monkeypatch.setenv(name, "user-of-this-test")
    found = probe()
    assert found.python == platform.python_version()
    assert found.versions["torch"] == metadata.version("torch")
    assert 0 < found.ram_free_bytes <= found.ram_bytes
    assert found.num_cpus >= 1
    assert found.torch_error is None
    text = json.dumps(found.to_json())
    assert {"has_cuda", "bf16"} <= json.loads(text).keys()
    for private in (platform.node(), str(Path.home()), os.getcwd()):
        assert len(private) < 5 or private not in text  # `/`, `gpu` are in any text
    assert "user-of-this-test" not in text


@pytest.mark.parametrize(
    ("release", "given", "expected"),
    [
        ("6.1.0-generic", {}, "expandable_segments:True"),
        ("6.1.0-generic", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, "max_split_size_mb:128"),
        ("6.1.0-generic", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}, None),
        ("5.15.90-microsoft-standard-WSL2", {}, None),
    ],
)
def test_the_allocator_grows_its_segments_unless_the_user_has_set_it_up(release, given, expected, monkeypatch):
    for key in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(key, raising=False)
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(environment.platform, "release", lambda: release)
    monkeypatch.setattr(environment.platform, "system", lambda: "Linux")
    environment._let_segments_grow()
    assert environment.os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == expected
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)


def test_importing_machine_loads_no_torch():
    code = "import sys, solotune.hardware.machine; assert 'torch' not in sys.modules"
    where = {**os.environ, "PYTHONPATH": str(Path(environment.__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=where, check=False).returncode == 0


def test_nvidia_smi_of_any_quality(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for script, found in (
        ("echo 'NVIDIA H100, 80GB HBM3, 570.1'", ("NVIDIA H100, 80GB HBM3", "570.1")),
        ("echo 'failed, badly'; exit 9", (None, None)),
        ("true", (None, None)),
        ("echo no comma", (None, None)),
    ):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        assert environment._nvidia_smi() == found


@pytest.mark.parametrize("asked", ["get_device_properties", "mem_get_info"])
def test_a_card_without_room_for_a_context_is_counted_and_not_used(asked, monkeypatch):
    import torch

    def full(*_):
        raise torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="H100", major=9, minor=0))
    monkeypatch.setattr(torch.cuda, asked, full)
    found = machine(**environment._torch_facts())
    assert (found.gpu_refuses, found.has_cuda) == (True, False)
    assert found.cuda_error == "AcceleratorError: CUDA error: out of memory"
