"""The machine: what is decided for it, and that each check of doctor fails on the fault it is for."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from inline_snapshot import snapshot

from solotune.config.load import load_config
from solotune.errors import DeviceError, InputError
from solotune.hardware import doctor as fitness
from solotune.hardware import machine as environment
from solotune.hardware.doctor import doctor
from solotune.hardware.machine import Machine, device_of, dtype_of, probe, resolve_for_machine
from tests.messages import stable

ROOT = Path(__file__).parents[2]
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


# --- settle


def test_a_modern_gpu_leaves_the_recipe_as_it_is(with_compiler):
    recipe = config()
    resolved, choices = resolve_for_machine(recipe, gpu((9, 0)))
    assert resolved is recipe
    assert choices == []
    assert (device_of(resolved, gpu((9, 0))), dtype_of(resolved)) == ("cuda", "bfloat16")


@pytest.mark.parametrize("on", [machine(), gpu((9, 0))])
def test_without_cuda_or_asked_for_the_cpu(on):
    resolved, choices = resolve_for_machine(config(use_cpu=on.has_cuda), on)
    assert [(choice.key, choice.value) for choice in choices] == [
        ("optim", "adamw_torch"),
        ("torch_compile", False),
        ("bf16", False),
    ]
    assert choices[0].because == "paged_adamw_8bit needs CUDA, as the 8-bit and paged optimizers do"
    assert "12 times slower than float32" in choices[2].because
    assert (resolved.optim, resolved.bf16, device_of(resolved, on), dtype_of(resolved)) == (
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
        ("bf16", False, "T4 has compute capability 7.5; bfloat16 came with 8.0")
    ]
    assert resolved.optim == "paged_adamw_8bit"


def test_without_what_the_compiler_needs_layers_stay_uncompiled():
    _, choices = resolve_for_machine(config(), gpu((9, 0), versions={}))
    assert [tuple(choice)[:2] for choice in choices] == [("torch_compile", False)]
    assert choices[0].because == "triton: not installed; torch compiles its GPU kernels with it"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"base_precision": "fp8"},
            "python, base_precision: fp8 needs a GPU that multiplies 8-bit floats\n"
            "  seen:    A100, compute capability 8.0\n"
            "  allowed: compute capability 8.9 or more: Ada (L4, 40-series), Hopper (H100) and newer\n"
            "  change:  base_precision: bf16 (as large, nearer to the original weights) or nf4 (a quarter)",
        ),
        (
            {"matmul_precision": "fp8"},
            "python, matmul_precision: fp8 needs a GPU that multiplies 8-bit floats\n"
            "  seen:    A100, compute capability 8.0\n"
            "  allowed: compute capability 8.9 or more: Ada (L4, 40-series), Hopper (H100) and newer\n"
            "  change:  matmul_precision: auto (the same memory or less, bf16)",
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
the GPU is there, but cannot be used
  seen:    AcceleratorError: CUDA error: out of memory
  change:  end the processes that hold it (nvidia-smi lists them), or use_cpu: true\
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


def test_importing_environment_loads_no_torch():
    code = "import sys, solotune.hardware.machine; assert 'torch' not in sys.modules"
    where = {**os.environ, "PYTHONPATH": str(Path(environment.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=where, check=False).returncode == 0


def test_a_containers_memory_limit_counts(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 1048576 kB\nMemAvailable: 900000 kB\nHugePages_Total: 0\n",
        "/sys/fs/cgroup/memory.max": "536870912\n",
        "/sys/fs/cgroup/memory.current": "136870912\n",
        "/sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 100000000\n",
    }
    monkeypatch.setattr(environment, "_text", lambda path: files.get(path, ""))
    assert environment.ram() == (536870912, 500_000_000)
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert environment.ram() == (1 << 30, 900000 << 10)


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


# --- doctor: every check is made to fail by the fault it is for


def checks(name: str) -> list[tuple[str, str, str | None]]:
    return [(check.status, check.found, check.fix) for check in doctor().checks if check.name == name]


@pytest.fixture
def facts(monkeypatch) -> dict:
    """What torch says; a test changes it to put another machine in the place of this one."""
    found: dict = {"cuda_runtime": "12.8"}
    monkeypatch.setattr(environment, "_torch_facts", lambda: found)
    return found


H100 = {"gpu": "H100", "num_gpus": 1, "compute_capability": (9, 0), "gpu_bytes": 80 * GIB, "gpu_free_bytes": 79 * GIB}


def test_this_machine_passes():
    report = doctor()
    assert report.ok, [check for check in report.checks if check.status == "fail"]
    assert all(check.fix is None for check in report.checks if check.status == "ok")
    assert json.loads(json.dumps(report.to_json()))["checks"][0].keys() == {"name", "status", "found", "fix"}


@pytest.mark.parametrize(
    ("version", "status"), [("3.10.14", "fail"), ("3.11.0", "ok"), ("3.13.9", "ok"), ("3.14.0", "fail")]
)
def test_python_versions(version, status, monkeypatch):
    monkeypatch.setattr(environment.platform, "python_version", lambda: version)
    ((found, _, fix),) = checks("python")
    assert found == status
    assert fix == (None if status == "ok" else "make the virtual environment with Python 3.11 to 3.13")


def test_torch_that_does_not_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    ((status, found, fix),) = checks("torch")
    assert (status, fix) == ("fail", "pip install --force-reinstall torch")
    assert found.startswith("cannot be imported: ModuleNotFoundError")
    assert checks("bitsandbytes") == [("fail", "not tried, for torch cannot be imported", "mend torch first")]


def test_no_gpu_is_a_warning(facts, monkeypatch):
    monkeypatch.setattr(environment, "_nvidia_smi", lambda: (None, None))
    ((status, found, _),) = checks("gpu")
    assert status == "warn"
    assert "small models train in minutes" in found
    assert doctor().ok


def test_cpu_build_of_torch_beside_a_gpu(facts, monkeypatch):
    facts["cuda_runtime"] = None
    monkeypatch.setattr(environment, "_nvidia_smi", lambda: ("H100", "570.1"))
    ((status, found, fix),) = checks("gpu")
    assert status == "fail"
    assert found.startswith("H100 is there, but torch ")
    assert found.endswith(" is built without CUDA")
    assert fix is not None
    assert fix.startswith("pip install --force-reinstall torch")
    assert not doctor().ok


def test_driver_that_is_too_old(facts, monkeypatch):
    facts["cuda_error"] = "RuntimeError: The NVIDIA driver on your system is too old (found version 11040)."
    monkeypatch.setattr(environment, "_nvidia_smi", lambda: ("H100", "470.1"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    ((status, found, fix),) = checks("gpu")
    assert status == "fail"
    assert found.startswith("H100, driver 470.1: torch cannot use it: RuntimeError: The NVIDIA driver")
    assert fix == "update the NVIDIA driver to one for CUDA 12.8, or install torch built for an older CUDA"


def test_hidden_gpu(facts, monkeypatch):
    monkeypatch.setattr(environment, "_nvidia_smi", lambda: ("H100", "570.1"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    fix = "unset CUDA_VISIBLE_DEVICES, or set it to 0"
    assert checks("gpu") == [("warn", "H100 is hidden: CUDA_VISIBLE_DEVICES=''", fix)]


def test_a_gpu_that_refuses_is_named_with_what_holds_it(facts, monkeypatch):
    monkeypatch.setattr(environment, "_nvidia_smi", lambda: ("H100", "570.1"))
    facts.update(num_gpus=1, cuda_error="AcceleratorError: CUDA error: out of memory")
    found = "H100, driver 570.1: it refuses: AcceleratorError: CUDA error: out of memory"
    assert checks("gpu") == [("fail", found, "end the processes that hold it (nvidia-smi lists them)")]


@pytest.mark.parametrize("asked", ["get_device_properties", "mem_get_info"])
def test_a_card_without_room_for_a_context_is_counted_and_not_used(asked, monkeypatch):
    import torch

    def full(*_):
        raise torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="H100", major=9, minor=0))
    monkeypatch.setattr(torch.cuda, asked, full)
    found = machine(**environment._torch_facts())
    assert (found.gpu_refuses, found.has_cuda) == (True, False)
    assert found.cuda_error == "AcceleratorError: CUDA error: out of memory"


def test_gpu_with_and_without_bfloat16(facts, monkeypatch):
    monkeypatch.setattr(environment, "_nvidia_smi", lambda: ("H100", "570.1"))
    facts.update(H100)
    found = "H100, 79.0 of 80.0 GiB free, compute capability 9.0, driver 570.1"
    assert checks("gpu") == [("ok", found, None)]
    facts["compute_capability"] = (7, 5)
    assert checks("gpu")[0][0] == "warn"


def test_what_triton_needs(facts, monkeypatch, tmp_path):
    facts.update(H100)
    versions = {"triton": "3.5.0"}
    monkeypatch.setattr(environment, "installed_version", versions.get)
    monkeypatch.setenv("CC", "none")
    monkeypatch.setattr(environment.shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    monkeypatch.setattr(environment.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert checks("triton") == [("ok", "3.5.0", None)]
    assert checks("compiler")[0][:2] == ("fail", "no Python.h; triton needs it")
    (tmp_path / "Python.h").touch()
    assert checks("compiler") == [("ok", "gcc, Python.h", None)]
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    assert checks("compiler")[0][:2] == ("fail", "no C compiler; triton needs one")
    versions.clear()
    assert checks("triton")[0][0] == "fail"


def test_bitsandbytes_without_its_native_library(monkeypatch):
    from bitsandbytes import functional

    def missing(*_, **__):
        raise RuntimeError("\n🚨 CUDA SETUP: native library not found\nmany more lines")

    monkeypatch.setattr(functional, "quantize_4bit", missing)
    ((status, found, fix),) = checks("bitsandbytes")
    assert status == "fail"
    assert found.endswith(": RuntimeError: 🚨 CUDA SETUP: native library not found")
    assert fix == "pip install --force-reinstall --no-deps bitsandbytes"


def test_bitsandbytes_that_computes_nonsense(monkeypatch):
    from bitsandbytes import functional

    expand = functional.dequantize_4bit
    for wrong in (0.5, float("nan")):
        monkeypatch.setattr(functional, "dequantize_4bit", lambda *a, wrong=wrong: expand(*a) + wrong)
        ((status, found, _),) = checks("bitsandbytes")
        assert status == "fail"
        assert "is off by" in found


def test_nf4_is_as_exact_as_it_can_be():
    assert 0.14 < fitness._nf4_error("cpu") <= fitness.NF4_MAX_ERROR


def installed(monkeypatch, versions: dict[str, str], requires: dict[str, list[str]]) -> None:
    monkeypatch.setattr(environment, "installed_version", versions.get)
    monkeypatch.setattr(fitness, "_requires", lambda name: requires.get(name, []))


def test_a_clash_two_levels_down_is_named(monkeypatch):
    versions = {"transformers": "5.24.0", "tokenizers": "0.24.0", "torch": "2.11.0+cu128"}
    requires = {
        "solotune": [
            "torch>=2.11",
            "transformers<6,>=5.17",
            "pytest>=9; extra == 'dev'",
            "winapi; sys_platform == 'win32'",
        ],
        "transformers": ["tokenizers<=0.23.0,>=0.22.0", "torch; extra == 'torch'"],
    }
    installed(monkeypatch, versions, requires)
    found = "transformers 5.24.0 needs tokenizers<=0.23.0,>=0.22.0, installed is 0.24.0"
    assert checks("packages") == [("warn", found, "pip install 'tokenizers<=0.23.0,>=0.22.0'")]


def test_old_and_missing_packages_each_have_a_line(monkeypatch):
    versions = dict.fromkeys(("transformers", "bitsandbytes", "datasets", "safetensors"), "5.18.0")
    installed(monkeypatch, {**versions, "torch": "2.6.0"}, {})
    assert [found for _, found, _ in checks("packages")] == [
        "solotune needs torch>=2.11, installed is 2.6.0",
        "solotune needs jinja2>=3.1.6, which is not installed",
    ]


def test_floors_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(fitness.NEEDS) <= set(project["dependencies"])
    low, high = fitness.PYTHONS
    assert project["requires-python"] == f">={low[0]}.{low[1]},<{high[0]}.{high[1] + 1}"


def test_little_memory_and_little_disk(monkeypatch):
    monkeypatch.setattr(environment, "ram", lambda: (4 * GIB, 2 * GIB))
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: SimpleNamespace(free=19 * GIB))
    assert checks("memory")[0][:2] == ("warn", "2.0 of 4.0 GiB free")
    assert checks("disk")[0][:2] == ("warn", "19.0 GiB free")


def test_cache_that_cannot_be_written(monkeypatch, tmp_path):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "new"))
    assert checks("hub cache") == [("ok", "writable", None)]
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch(0o755)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    ((status, found, fix),) = checks("hub cache")
    assert (status, fix) == ("fail", "set HF_HOME to a folder that can be")
    assert found == f"{tmp_path}/file/hub cannot be written"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert checks("hub cache")[0][0] == "ok"


def test_offline_is_said(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert checks("hub") == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert checks("hub")[0][0] == "ok"


@pytest.mark.parametrize(
    ("package", "version", "words"),
    [
        ("transformers", "5.2.9", "transformers 5.2.9 is unsafe: before 5.3 a config.json could name native code"),
        ("transformers", "4.57.1", "transformers 4.57.1 is unsafe"),
        ("torch", "2.5.1+cu124", "torch 2.5.1+cu124 is unsafe: before 2.6 weights_only did not"),
        ("jinja2", "3.1.5", "jinja2 3.1.5 is unsafe: before 3.1.6 a chat template could leave the sandbox"),
        ("pyarrow", "14.0.0", "pyarrow 14.0.0 is unsafe: before 14.0.1 a Parquet or Arrow file could run code"),
    ],
)
def test_versions_with_known_holes_fail(package, version, words, monkeypatch):
    real = environment.installed_version
    monkeypatch.setattr(environment, "installed_version", lambda name: version if name == package else real(name))
    ((status, found, fix),) = checks("safe versions")
    assert (status, found.startswith(words)) == ("fail", True), found
    assert fix == f"pip install --upgrade '{package}>={fitness.FLOORS[package][0]}'"


def test_the_floors_themselves_are_safe_and_all_that_are_below_are_named(monkeypatch):
    monkeypatch.setattr(environment, "installed_version", lambda name: fitness.FLOORS.get(name, ("99",))[0])
    assert checks("safe versions")[0][0] == "ok"
    monkeypatch.setattr(environment, "installed_version", lambda name: "0.1")
    assert [status for status, *_ in checks("safe versions")] == ["fail"] * len(fitness.FLOORS)
