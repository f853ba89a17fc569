"""Facts about this machine, and the settings that follow from them. Checks of the machine are in `doctor.py`.

    machine = probe()                                       facts, for the record of a run
    config, choices = resolve_for_machine(config, machine)  settings for this machine, each change with its reason

`resolve_for_machine` reads only its arguments, so a decision can be tested for any machine; `probe` gets each fact
from one of the small functions at the end of this file.

What it does not do: use the network, write anything, or record who and where you are (no user, host or path names).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import warnings
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from solotune.config.run_config import Choice, RunConfig
from solotune.config.settings import PrecisionSettings
from solotune.errors import DeviceError, InputError
from solotune.hardware.ram import Ram, ram
from solotune.units import first_line

RECORDED = (
    "torch", "transformers", "bitsandbytes", "peft", "datasets", "tokenizers", "safetensors", "numpy", "triton"
)  # fmt: skip
BF16_CAPABILITY = (8, 0)
FP8_CAPABILITY = (8, 9)
BUSY_GPU = "end the processes that use it (nvidia-smi lists them)"
SLOW_BF16 = "bfloat16 matmuls on a CPU were 12 times slower than float32 (measured with AVX2), and float32 is exact"
SLOW_FP8 = "emulated on a CPU: rounded to fp8 and multiplied in float32, 1.5 to 2 times slower than a float32 base"


@dataclass(frozen=True)
class Machine:
    """Facts about this machine and process. Unknown versions are absent; unknown GPU facts are None."""

    os: str
    python: str
    cpu: str
    num_cpus: int  # available to this process
    ram_bytes: int  # of the machine, or the limit of its container or job
    ram_free_bytes: int
    disk_free_bytes: int  # on the disk of the current folder
    versions: dict[str, str]
    nvidia_gpu: str | None = None  # from nvidia-smi, whether or not torch can use it
    driver: str | None = None
    torch_error: str | None = None
    cuda_runtime: str | None = None  # CUDA version that torch was built for
    cuda_error: str | None = None
    num_gpus: int = 0
    gpu: str | None = None
    compute_capability: tuple[int, int] | None = None
    gpu_bytes: int | None = None
    gpu_free_bytes: int | None = None
    ram_limited_by: str | None = None  # see `ram.Ram`

    @property
    def ram(self) -> Ram:
        return Ram(self.ram_bytes, self.ram_free_bytes, self.ram_limited_by)

    @property
    def has_cuda(self) -> bool:
        return self.gpu is not None

    @property
    def bf16(self) -> bool:
        """Whether the GPU multiplies bfloat16 matrices (Ampere, compute capability 8.0, and newer)."""
        return self.compute_capability is not None and self.compute_capability >= BF16_CAPABILITY

    @property
    def fp8(self) -> bool:
        """Whether the GPU multiplies 8-bit floats (Ada, compute capability 8.9, Hopper and newer)."""
        return self.compute_capability is not None and self.compute_capability >= FP8_CAPABILITY

    @property
    def gpu_refuses(self) -> bool:
        """Whether torch counts a GPU but gets no context on it: its memory is full, or another process holds it."""
        return self.num_gpus > 0 and self.gpu is None

    def shared_by(self, processes: int) -> Machine:
        """This machine for one of several processes that share its memory equally."""
        if processes == 1:
            return self
        return replace(self, ram_bytes=self.ram_bytes // processes, ram_free_bytes=self.ram_free_bytes // processes)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "has_cuda": self.has_cuda, "bf16": self.bf16, "fp8": self.fp8}


@dataclass(frozen=True)
class Check:
    """One line of `solotune doctor`."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    fix: str | None = None


def probe() -> Machine:
    """Collect the facts. Imports torch, and creates this process's CUDA context if there is a GPU."""
    memory = ram()
    nvidia_gpu, driver = _nvidia_smi()
    return Machine(
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        cpu=_cpu_model(),
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        ram_bytes=memory.total,
        ram_free_bytes=memory.free,
        ram_limited_by=memory.limited_by,
        disk_free_bytes=shutil.disk_usage(".").free,
        versions={name: version for name in RECORDED if (version := installed_version(name))},
        nvidia_gpu=nvidia_gpu,
        driver=driver,
        **_torch_facts(),
    )


def device_of(machine: Machine, *, use_cpu: bool) -> str:
    """`cuda` if there is a GPU and `use_cpu` is false, else `cpu`."""
    return "cuda" if machine.has_cuda and not use_cpu else "cpu"


def dtype_of(bf16: bool) -> str:
    """Name of the torch dtype that a resolved config computes in."""
    return "bfloat16" if bf16 else "float32"


def resolve_for_machine(config: RunConfig, machine: Machine) -> tuple[RunConfig, list[Choice]]:
    """The config with settings that work on this machine, and each changed value with its reason.

    Raises:
        InputError: fp8 on a GPU without it; every replacement gives other numbers, so the user chooses.
        DeviceError: the machine has a GPU that cannot be used; a run never moves to the CPU by itself.
    """
    if machine.gpu_refuses and not config.use_cpu:
        raise DeviceError(
            "this machine has a GPU, but it cannot be used",
            seen=machine.cuda_error,
            change=f"{BUSY_GPU}, or set use_cpu: true",
        )
    on_cpu = device_of(machine, use_cpu=config.use_cpu) == "cpu"
    choices = _settle_fp8(config.precision, machine, on_cpu) if config.multiplies_in_fp8 else []
    if on_cpu and config.optim != "adamw_torch":
        choices.append(
            Choice("optim", "adamw_torch", f"{config.optim} needs CUDA, like all 8-bit and paged optimizers")
        )
    if config.torch_compile and (reason := _no_compile_reason(machine, on_cpu)):
        choices.append(Choice("torch_compile", False, reason))
    if config.bf16 and (on_cpu or not machine.bf16):
        capability = ".".join(map(str, machine.compute_capability or ()))
        old_gpu = f"{machine.gpu} has compute capability {capability}; bfloat16 needs 8.0 or more"
        choices.append(Choice("bf16", False, SLOW_BF16 if on_cpu else old_gpu))
        if config.bnb_4bit_compute_dtype == "bfloat16":
            choices.append(Choice("bnb_4bit_compute_dtype", "float32", "bf16 is false"))
    if not choices:
        return config, choices
    return config.replaced("machine", **{choice.key: choice.value for choice in choices}), choices


def _settle_fp8(precision: PrecisionSettings, machine: Machine, on_cpu: bool) -> list[Choice]:
    if on_cpu:
        return [Choice("matmul_precision", "fp8", SLOW_FP8)]
    if machine.fp8:
        return []
    key = "base_precision" if precision.base_precision == "fp8" else "matmul_precision"
    fp8_base = "base_precision: bf16 (same size, closer to the original weights) or nf4 (a quarter of the size)"
    raise InputError(
        f"{precision.source_of(key)}, {key}: fp8 needs a GPU that can multiply 8-bit floats",
        seen=f"{machine.gpu}, compute capability {'.'.join(map(str, machine.compute_capability or ()))}",
        allowed="compute capability 8.9 or more: Ada (L4, 40-series), Hopper (H100) and newer",
        change=fp8_base if key == "base_precision" else "matmul_precision: auto (bf16 matmuls, same memory or less)",
    )


def _no_compile_reason(machine: Machine, on_cpu: bool) -> str | None:
    if on_cpu:
        return "on a CPU, compiling takes longer than it saves"
    failed = [check for check in (check_triton(machine), check_compiler()) if check.status == "fail"]
    return f"{failed[0].name}: {failed[0].found}" if failed else None


def check_triton(machine: Machine) -> Check:
    if version := machine.versions.get("triton"):
        return Check("triton", "ok", version)
    return Check("triton", "fail", "not installed; torch needs it to compile GPU kernels", "pip install triton")


def check_compiler() -> Check:
    """Check what Triton needs to build its launchers at the first step: a C compiler and Python's headers."""
    compiler = next(
        (path for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (path := shutil.which(name))), None
    )
    if compiler is None:
        return Check(
            "compiler",
            "fail",
            "no C compiler; triton needs one",
            "install one (for example: apt install gcc), or set CC",
        )
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        version = ".".join(map(str, sys.version_info[:2]))
        return Check(
            "compiler",
            "fail",
            "no Python.h; triton needs it",
            f"install Python's headers (for example: apt install python{version}-dev)",
        )
    return Check("compiler", "ok", f"{Path(compiler).name}, Python.h")


# --- raw facts: one small function each, so that tests can replace them


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _let_segments_grow() -> None:
    """Let CUDA's allocator use expandable segments, unless the user has configured it.

    Recomputed layers need buffers of many sizes; with segments of fixed size, a step of 8.7 GiB reserved 11.6 GiB
    (measured), and the card must have all of it.
    """
    is_set = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys()
    if (
        platform.system() == "Linux" and "microsoft" not in platform.release() and not is_set
    ):  # not supported by WSL's driver
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def _torch_facts() -> dict[str, Any]:
    """Facts about the GPU from torch, under the field names of `Machine`."""
    _let_segments_grow()
    try:
        import torch
    except Exception as error:  # ImportError, or OSError for a missing native library
        return {"torch_error": first_line(error, with_type=True)}
    facts: dict[str, Any] = {"cuda_runtime": torch.version.cuda}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            return facts | {"cuda_error": _cuda_error(torch) if torch.version.cuda else None}
    facts["num_gpus"] = torch.cuda.device_count()
    try:
        current = torch.cuda.current_device()  # that of this rank
        properties = torch.cuda.get_device_properties(current)
        free, total = torch.cuda.mem_get_info(current)  # creates the context, which fails on a full card
    except RuntimeError as error:
        return facts | {"cuda_error": first_line(error, with_type=True)}
    return facts | {
        "gpu": properties.name,
        "compute_capability": (properties.major, properties.minor),
        "gpu_bytes": total,
        "gpu_free_bytes": free,
    }


def _cuda_error(torch: Any) -> str:
    try:
        torch.cuda.init()
    except Exception as error:
        return first_line(error, with_type=True)
    return "torch finds no device"


def _nvidia_smi() -> tuple[str | None, str | None]:
    """(GPU name, driver version) from nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        name, driver = done.stdout.splitlines()[0].rsplit(", ", 1)
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None, None
    return name, driver


def _cpu_model() -> str:
    names = [line.partition(":")[2].strip() for line in _text("/proc/cpuinfo").splitlines() if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
