"""`solotune doctor`: each check fails on the fault that it is for."""

from __future__ import annotations

import json
import sys
import tempfile
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from solotune.errors import CheckError
from solotune.hardware import doctor, machine
from solotune.hardware.ram import Ram

ROOT = Path(__file__).parents[2]
GIB = 1 << 30


def test_without_a_temporary_folder_it_is_not_torch_that_is_broken(monkeypatch, tmp_path):
    doctor.require_torch()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "missing")])
    with pytest.raises(CheckError, match="no temporary folder") as refused:
        doctor.require_torch()
    assert "missing" in str(refused.value) and "export TMPDIR=FOLDER" in str(refused.value)


def checks(name: str) -> list[tuple[str, str, str | None]]:
    return [(check.status, check.found, check.fix) for check in doctor.doctor().checks if check.name == name]


@pytest.fixture
def facts(monkeypatch) -> dict:
    """What torch says; a test changes it to put another machine in the place of this one."""
    found: dict = {"cuda_runtime": "12.8"}
    monkeypatch.setattr(machine, "_torch_facts", lambda: found)
    return found


H100 = {"gpu": "H100", "num_gpus": 1, "compute_capability": (9, 0), "gpu_bytes": 80 * GIB, "gpu_free_bytes": 79 * GIB}


def test_this_machine_passes():
    report = doctor.doctor()
    assert report.ok, [check for check in report.checks if check.status == "fail"]
    assert all(check.fix is None for check in report.checks if check.status == "ok")
    assert json.loads(json.dumps(report.to_json()))["checks"][0].keys() == {"name", "status", "found", "fix"}


@pytest.mark.parametrize(
    ("version", "status"), [("3.10.14", "fail"), ("3.11.0", "ok"), ("3.13.9", "ok"), ("3.14.0", "fail")]
)
def test_python_versions(version, status, monkeypatch):
    monkeypatch.setattr(machine.platform, "python_version", lambda: version)
    ((found, _, fix),) = checks("python")
    assert found == status
    assert fix == (None if status == "ok" else "create the virtual environment with Python 3.11 to 3.13")


def test_torch_that_does_not_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    ((status, found, fix),) = checks("torch")
    assert (status, fix) == ("fail", "pip install --force-reinstall torch")
    assert found.startswith("cannot be imported: ModuleNotFoundError")
    assert checks("bitsandbytes") == [("fail", "not tested, because torch cannot be imported", "fix torch first")]


def test_no_gpu_is_a_warning(facts, monkeypatch):
    monkeypatch.setattr(machine, "_nvidia_smi", lambda: (None, None))
    ((status, found, _),) = checks("gpu")
    assert status == "warn"
    assert "small models train in minutes" in found
    assert doctor.doctor().ok


def test_cpu_build_of_torch_beside_a_gpu(facts, monkeypatch):
    facts["cuda_runtime"] = None
    monkeypatch.setattr(machine, "_nvidia_smi", lambda: ("H100", "570.1"))
    ((status, found, fix),) = checks("gpu")
    assert status == "fail"
    assert found.startswith("H100 found, but torch ")
    assert found.endswith(" is built without CUDA")
    assert fix is not None
    assert fix.startswith("pip install --force-reinstall torch")
    assert not doctor.doctor().ok


def test_driver_that_is_too_old(facts, monkeypatch):
    facts["cuda_error"] = "RuntimeError: The NVIDIA driver on your system is too old (found version 11040)."
    monkeypatch.setattr(machine, "_nvidia_smi", lambda: ("H100", "470.1"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    ((status, found, fix),) = checks("gpu")
    assert status == "fail"
    assert found.startswith("H100, driver 470.1: torch cannot use it: RuntimeError: The NVIDIA driver")
    assert fix == "update the NVIDIA driver to one for CUDA 12.8, or install torch built for an older CUDA"


def test_hidden_gpu(facts, monkeypatch):
    monkeypatch.setattr(machine, "_nvidia_smi", lambda: ("H100", "570.1"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    fix = "unset CUDA_VISIBLE_DEVICES, or set it to 0"
    assert checks("gpu") == [("warn", "H100 is hidden: CUDA_VISIBLE_DEVICES=''", fix)]


def test_a_gpu_that_refuses_is_named_with_what_holds_it(facts, monkeypatch):
    monkeypatch.setattr(machine, "_nvidia_smi", lambda: ("H100", "570.1"))
    facts.update(num_gpus=1, cuda_error="AcceleratorError: CUDA error: out of memory")
    found = "H100, driver 570.1: cannot be used: AcceleratorError: CUDA error: out of memory"
    assert checks("gpu") == [("fail", found, "end the processes that use it (nvidia-smi lists them)")]


def test_gpu_with_and_without_bfloat16(facts, monkeypatch):
    monkeypatch.setattr(machine, "_nvidia_smi", lambda: ("H100", "570.1"))
    facts.update(H100)
    found = "H100, 79.0 of 80.0 GiB free, compute capability 9.0, driver 570.1"
    assert checks("gpu") == [("ok", found, None)]
    facts["compute_capability"] = (7, 5)
    assert checks("gpu")[0][0] == "warn"


def test_what_triton_needs(facts, monkeypatch, tmp_path):
    facts.update(H100)
    versions = {"triton": "3.5.0"}
    monkeypatch.setattr(machine, "installed_version", versions.get)
    monkeypatch.setenv("CC", "none")
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert checks("triton") == [("ok", "3.5.0", None)]
    assert checks("compiler")[0][:2] == ("fail", "no Python.h; triton needs it")
    (tmp_path / "Python.h").touch()
    assert checks("compiler") == [("ok", "gcc, Python.h", None)]
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
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
        assert "gives wrong numbers" in found


def test_nf4_is_as_exact_as_it_can_be():
    assert 0.14 < doctor._nf4_error("cpu") <= doctor.NF4_MAX_ERROR


def installed(monkeypatch, versions: dict[str, str], requires: dict[str, list[str]]) -> None:
    monkeypatch.setattr(machine, "installed_version", versions.get)
    monkeypatch.setattr(doctor, "_requires", lambda name: requires.get(name, []))


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
    found = "transformers 5.24.0 needs tokenizers<=0.23.0,>=0.22.0, but 0.24.0 is installed"
    assert checks("packages") == [("warn", found, "pip install 'tokenizers<=0.23.0,>=0.22.0'")]


def test_old_and_missing_packages_each_have_a_line(monkeypatch):
    versions = dict.fromkeys(("transformers", "bitsandbytes", "datasets", "safetensors"), "5.18.0")
    installed(monkeypatch, {**versions, "torch": "2.6.0"}, {})
    assert [found for _, found, _ in checks("packages")] == [
        "solotune needs torch>=2.11, but 2.6.0 is installed",
        "solotune needs jinja2>=3.1.6, which is not installed",
    ]


def test_floors_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(doctor.NEEDS) <= set(project["dependencies"])
    low, high = doctor.PYTHONS
    assert project["requires-python"] == f">={low[0]}.{low[1]},<{high[0]}.{high[1] + 1}"


def test_little_memory_and_little_disk(monkeypatch):
    monkeypatch.setattr(machine, "ram", lambda: Ram(4 * GIB, 2 * GIB, "memory.max"))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=19 * GIB))
    assert checks("memory")[0][:2] == ("warn", "2.0 of 4.0 GiB free (memory.max of a cgroup limits it)")
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
    assert (status, fix) == ("fail", "set HF_HOME to a writable folder")
    assert found == f"{tmp_path}/file/hub is not writable"
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
        ("transformers", "5.2.9", "transformers 5.2.9 is unsafe: before 5.3 a config.json could load native code"),
        ("transformers", "4.57.1", "transformers 4.57.1 is unsafe"),
        ("torch", "2.5.1+cu124", "torch 2.5.1+cu124 is unsafe: before 2.6 a checkpoint could run code"),
        ("jinja2", "3.1.5", "jinja2 3.1.5 is unsafe: before 3.1.6 a chat template could escape the sandbox"),
        ("pyarrow", "14.0.0", "pyarrow 14.0.0 is unsafe: before 14.0.1 a Parquet or Arrow file could run code"),
    ],
)
def test_versions_with_known_holes_fail(package, version, words, monkeypatch):
    real = machine.installed_version
    monkeypatch.setattr(machine, "installed_version", lambda name: version if name == package else real(name))
    ((status, found, fix),) = checks("safe versions")
    assert (status, found.startswith(words)) == ("fail", True), found
    assert fix == f"pip install --upgrade '{package}>={doctor.FLOORS[package][0]}'"


def test_the_floors_themselves_are_safe_and_all_that_are_below_are_named(monkeypatch):
    monkeypatch.setattr(machine, "installed_version", lambda name: doctor.FLOORS.get(name, ("99",))[0])
    assert checks("safe versions")[0][0] == "ok"
    monkeypatch.setattr(machine, "installed_version", lambda name: "0.1")
    assert [status for status, *_ in checks("safe versions")] == ["fail"] * len(doctor.FLOORS)
