"""The machine: what it is, what that decides, and whether it is fit for work.

    machine = probe()                          facts, for the record of a run
    config, choices = settle(config, machine)  what the machine decides, each decision with its reason
    report = doctor()                          checks, each with what was found and what mends it

`settle` looks at its arguments alone, so a decision can be tested for any machine; `probe` gets every fact through one
of the small functions at the end of this file. `doctor` tries things instead of comparing names of versions: it
quantises and expands a matrix on the very device, because a bitsandbytes without its native library for this CUDA
imports without complaint and fails at the first step of training.

What it does not do: use the network, write anything, or record who and where you are (no user, host or path names).
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
import warnings
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from solotune.config import Choice, RunConfig
from solotune.errors import CheckError, DeviceError, InputError

RECORDED = (
    "torch", "transformers", "bitsandbytes", "peft", "datasets", "tokenizers", "safetensors", "numpy", "triton"
)  # fmt: skip
PYTHONS = ((3, 11), (3, 13))
NEEDS = ("torch>=2.11", "transformers>=5.17,<6", "bitsandbytes>=0.49", "datasets>=4.8,<6", "safetensors>=0.7",
         "jinja2>=3.1.6")  # fmt: skip # asked of a source tree that is not installed; a test holds it to pyproject.toml
# Below these a file of somebody else's can run code. They lie below what solotune needs anyway, and are told apart
# because such a version must not be used, whatever else works.
FLOORS = {
    "transformers": ("5.3", "a config.json could name native code (CVE-2026-4372, CVE-2026-5241)"),
    "torch": ("2.6", "weights_only did not keep a checkpoint from running code (CVE-2025-32434)"),
    "jinja2": ("3.1.6", "a chat template could leave the sandbox (CVE-2024-56326, CVE-2025-27516)"),
    "pyarrow": ("14.0.1", "a Parquet or Arrow file could run code (CVE-2023-47248)"),
}
BF16_CAPABILITY = (8, 0)
FP8_CAPABILITY = (8, 9)
MIN_DISK_BYTES, MIN_RAM_BYTES = 20 << 30, 8 << 30
BUSY_GPU = "end the processes that hold it (nvidia-smi lists them)"
NF4_MAX_ERROR = 0.16  # half the widest gap between two NF4 values (-1.0 and -0.696), and rounding
SLOW_BF16 = "bfloat16 matmuls on a CPU were 12 times slower than float32 (measured with AVX2), and float32 is exact"
SLOW_FP8 = "emulated on a CPU: rounded to fp8 and multiplied in float32, 1.5 to 2 times slower than a float32 base"


@dataclass(frozen=True)
class Machine:
    """Facts about this machine and process. Versions and GPU facts are None or absent where there are none."""

    os: str
    python: str
    cpu: str
    num_cpus: int  # that this process may use
    ram_bytes: int  # of the machine or of the container, whichever is less
    ram_free_bytes: int
    disk_free_bytes: int  # where the current folder is
    versions: dict[str, str]
    nvidia_gpu: str | None = None  # as the driver's own tool names it, whether or not torch can use it
    driver: str | None = None
    torch_error: str | None = None
    cuda_runtime: str | None = None  # that torch was built for
    cuda_error: str | None = None
    num_gpus: int = 0
    gpu: str | None = None
    compute_capability: tuple[int, int] | None = None
    gpu_bytes: int | None = None
    gpu_free_bytes: int | None = None

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
        """There is a GPU that torch counts but gets no context on: its memory is full, or another process has it."""
        return self.num_gpus > 0 and self.gpu is None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "has_cuda": self.has_cuda, "bf16": self.bf16, "fp8": self.fp8}


@dataclass(frozen=True)
class Check:
    """One line of `solotune doctor`."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    fix: str | None = None


@dataclass(frozen=True)
class DoctorReport:
    machine: Machine
    checks: list[Check]

    @property
    def ok(self) -> bool:
        """No check failed; a warning is no failure."""
        return all(check.status != "fail" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks], "machine": self.machine.to_json()}


def probe() -> Machine:
    """Looks at the machine. Imports torch, and with a GPU makes this process's CUDA context."""
    ram_bytes, ram_free_bytes = ram()
    nvidia_gpu, driver = _nvidia_smi()
    return Machine(
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        cpu=_cpu_model(),
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        ram_bytes=ram_bytes,
        ram_free_bytes=ram_free_bytes,
        disk_free_bytes=shutil.disk_usage(".").free,
        versions={name: version for name in RECORDED if (version := _version(name))},
        nvidia_gpu=nvidia_gpu,
        driver=driver,
        **_torch_facts(),
    )


def device_of(config: RunConfig, machine: Machine) -> str:
    """`cuda` where there is a GPU and the config does not refuse it, else `cpu`."""
    return "cuda" if machine.has_cuda and not config.use_cpu else "cpu"


def dtype_of(config: RunConfig) -> str:
    """What a settled config computes in, by its torch name."""
    return "bfloat16" if config.bf16 else "float32"


def settle(config: RunConfig, machine: Machine) -> tuple[RunConfig, list[Choice]]:
    """The config with what this machine cannot do replaced by what it can, and each replacement with its reason.

    Raises:
        InputError: fp8 on a GPU without it; no replacement has the same numbers, so the user says which.
        DeviceError: the GPU is there and cannot be used; a run that was meant for it does not go to the CPU unasked.
    """
    if machine.gpu_refuses and not config.use_cpu:
        raise DeviceError(
            "the GPU is there, but cannot be used", seen=machine.cuda_error, change=f"{BUSY_GPU}, or use_cpu: true"
        )
    on_cpu = device_of(config, machine) == "cpu"
    choices = _settle_fp8(config, machine, on_cpu) if config.multiplies_in_fp8 else []
    if on_cpu and config.optim != "adamw_torch":
        choices.append(
            Choice("optim", "adamw_torch", f"{config.optim} needs CUDA, as the 8-bit and paged optimizers do")
        )
    if config.torch_compile and (why := _why_not_to_compile(machine, on_cpu)):
        choices.append(Choice("torch_compile", False, why))
    if config.bf16 and (on_cpu or not machine.bf16):
        capability = ".".join(map(str, machine.compute_capability or ()))
        old_gpu = f"{machine.gpu} has compute capability {capability}; bfloat16 came with 8.0"
        choices.append(Choice("bf16", False, SLOW_BF16 if on_cpu else old_gpu))
        if config.bnb_4bit_compute_dtype == "bfloat16":
            choices.append(Choice("bnb_4bit_compute_dtype", "float32", "it follows bf16"))
    if not choices:
        return config, choices
    return config.replaced("machine", **{choice.key: choice.value for choice in choices}), choices


def require_torch() -> None:
    """Raises:
    CheckError: torch cannot be imported, and without it there is nothing to do.
    """
    try:
        import torch  # noqa: F401
    except Exception as error:
        raise _torch_missing(_first_line(error)) from error


def require_fit(config: RunConfig, machine: Machine) -> None:
    """What would fail only after the weights were loaded is refused before.

    Raises:
        CheckError: bitsandbytes is needed and does not work, or a GPU is there and hidden from this process.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if (
        machine.nvidia_gpu
        and machine.cuda_runtime
        and not machine.num_gpus
        and hidden is not None
        and not config.use_cpu
    ):
        raise CheckError(
            f"this machine has a GPU ({machine.nvidia_gpu}), but it is hidden from this process",
            seen=f"CUDA_VISIBLE_DEVICES={hidden!r}",
            change="unset CUDA_VISIBLE_DEVICES or set it to 0, or use_cpu: true to train on the CPU",
        )
    if config.base_precision in ("nf4", "auto") or config.optim != "adamw_torch":
        check = _check_bitsandbytes(machine)
        if check.status == "fail":
            other = "base_precision: bf16 with optim: adamw_torch, which do without it"
            raise CheckError(f"bitsandbytes: {check.found}", change=f"{check.fix}, or {other}")


def _torch_missing(said: str) -> CheckError:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    change = "pip install --force-reinstall torch"
    if limit != resource.RLIM_INFINITY:
        said += f"; this process may have {limit / 2**30:.1f} GiB of address space"
        change = f"raise that limit (ulimit -v unlimited), or {change}"
    return CheckError("torch cannot be imported", seen=said, change=change)


def _settle_fp8(config: RunConfig, machine: Machine, on_cpu: bool) -> list[Choice]:
    if on_cpu:
        return [Choice("matmul_precision", "fp8", SLOW_FP8)]
    if machine.fp8:
        return []
    key = "base_precision" if config.base_precision == "fp8" else "matmul_precision"
    fp8_base = "base_precision: bf16 (as large, nearer to the original weights) or nf4 (a quarter)"
    raise InputError(
        f"{config.source_of(key)}, {key}: fp8 needs a GPU that multiplies 8-bit floats",
        seen=f"{machine.gpu}, compute capability {'.'.join(map(str, machine.compute_capability or ()))}",
        allowed="compute capability 8.9 or more: Ada (L4, 40-series), Hopper (H100) and newer",
        change=fp8_base if key == "base_precision" else "matmul_precision: auto (the same memory or less, bf16)",
    )


def _why_not_to_compile(machine: Machine, on_cpu: bool) -> str | None:
    if on_cpu:
        return "on a CPU compiling takes longer than it saves"
    failed = [check for check in (_check_triton(machine), _check_compiler()) if check.status == "fail"]
    return f"{failed[0].name}: {failed[0].found}" if failed else None


def doctor() -> DoctorReport:
    """Runs every check. Takes a few seconds, for torch and bitsandbytes are really loaded and used."""
    machine = probe()
    return DoctorReport(
        machine,
        [
            _check_python(machine),
            *_check_packages(machine),
            *_check_floors(),
            _check_torch(machine),
            _check_gpu(machine),
            _check_bitsandbytes(machine),
            *([_check_triton(machine), _check_compiler()] if machine.has_cuda else []),
            _check_room("memory", machine.ram_bytes, machine.ram_free_bytes, MIN_RAM_BYTES),
            _check_room("disk", None, machine.disk_free_bytes, MIN_DISK_BYTES),
            _check_cache(),
            *_check_offline(),
        ],
    )


def _check_python(machine: Machine) -> Check:
    low, high = (".".join(map(str, version)) for version in PYTHONS)
    inside = PYTHONS[0] <= tuple(map(int, machine.python.split(".")[:2])) <= PYTHONS[1]
    fix = None if inside else f"make the virtual environment with Python {low} to {high}"
    return Check("python", "ok" if inside else "fail", f"{machine.python} on {machine.os}", fix)


def _check_packages(machine: Machine) -> list[Check]:
    """Every requirement of solotune, and of what it requires, against what is installed: `pip check` for our part."""
    try:
        conflicts = _conflicts()
    except ImportError:
        return [Check("packages", "warn", "versions not compared: packaging is missing", "pip install packaging")]
    if not conflicts:
        found = ", ".join(f"{name} {version}" for name, version in machine.versions.items() if name != "torch")
        return [Check("packages", "ok", found)]
    # What another package wishes for may well work all the same; what solotune needs, or what is absent, does not.
    return [
        Check("packages", "fail" if ours or "not installed" in problem else "warn", problem, f"pip install '{wanted}'")
        for problem, wanted in conflicts
        for ours in [problem.startswith("solotune needs")]
    ]


def _check_floors() -> list[Check]:
    """Versions with known holes that files could use."""
    name, floors = "safe versions", [f"{package}>={floor}" for package, (floor, _) in FLOORS.items()]
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return [Check(name, "warn", "not compared: packaging is missing", "pip install packaging")]
    unsafe = []
    for wanted, (package, (floor, hole)) in zip(floors, FLOORS.items(), strict=True):
        installed = _version(package)  # another check says what is missing
        if installed is not None and not Requirement(wanted).specifier.contains(installed, prereleases=True):
            found = f"{package} {installed} is unsafe: before {floor} {hole}"
            unsafe.append(Check(name, "fail", found, f"pip install --upgrade '{wanted}'"))
    return unsafe or [Check(name, "ok", ", ".join(floors))]


def _conflicts() -> list[tuple[str, str]]:
    """(what clashes, the requirement that would do) over the closure of solotune's requirements."""
    from packaging.requirements import Requirement

    found: dict[tuple[str, str], None] = {}
    seen: set[str] = set()
    todo = [("solotune", text) for text in _requires("solotune") or NEEDS]
    while todo:
        owner, text = todo.pop(0)
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        name = wanted.name.lower().replace("_", "-")
        installed = _version(name)
        asked = f"{wanted.name}{wanted.specifier}"
        if installed is None:
            found[f"{owner} needs {asked}, which is not installed", asked] = None
        elif not wanted.specifier.contains(installed, prereleases=True):
            found[f"{owner} needs {asked}, installed is {installed}", asked] = None
        elif name not in seen:
            seen.add(name)
            todo += [(f"{wanted.name} {installed}", text) for text in _requires(name)]
    return list(found)


def _check_torch(machine: Machine) -> Check:
    if machine.torch_error is not None:
        return Check(
            "torch", "fail", f"cannot be imported: {machine.torch_error}", "pip install --force-reinstall torch"
        )
    built = f"built for CUDA {machine.cuda_runtime}" if machine.cuda_runtime else "built without CUDA"
    return Check("torch", "ok", f"{machine.versions.get('torch')}, {built}")


def _check_gpu(machine: Machine) -> Check:
    if machine.has_cuda:
        capability = ".".join(map(str, machine.compute_capability or ()))
        free, total = (f"{(number or 0) / 2**30:.1f}" for number in (machine.gpu_free_bytes, machine.gpu_bytes))
        found = f"{machine.gpu}, {free} of {total} GiB free, compute capability {capability}, driver {machine.driver}"
        if not machine.bf16:
            return Check("gpu", "warn", found, "nothing to mend: it has no bfloat16, so training is in float32, slower")
        return Check("gpu", "ok", found)
    if machine.gpu_refuses:
        found = f"{machine.nvidia_gpu}, driver {machine.driver}: it refuses: {machine.cuda_error}"
        return Check("gpu", "fail", found, BUSY_GPU)
    if machine.nvidia_gpu is None or machine.torch_error is not None:
        found = "none that torch can use: small models train in minutes on the CPU, everything else needs an NVIDIA GPU"
        return Check("gpu", "warn", found)
    if machine.cuda_runtime is None:
        found = f"{machine.nvidia_gpu} is there, but torch {machine.versions.get('torch')} is built without CUDA"
        return Check("gpu", "fail", found, "pip install --force-reinstall torch (without an index for CPU builds)")
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        found = f"{machine.nvidia_gpu} is hidden: CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r}"
        return Check("gpu", "warn", found, "unset CUDA_VISIBLE_DEVICES, or set it to 0")
    found = f"{machine.nvidia_gpu}, driver {machine.driver}: torch cannot use it: {machine.cuda_error}"
    fix = f"update the NVIDIA driver to one for CUDA {machine.cuda_runtime}, or install torch built for an older CUDA"
    return Check("gpu", "fail", found, fix)


def _check_bitsandbytes(machine: Machine) -> Check:
    device = "cuda" if machine.has_cuda else "cpu"
    if machine.torch_error is not None:
        return Check("bitsandbytes", "fail", "not tried, for torch cannot be imported", "mend torch first")
    try:
        error = _nf4_error(device)
    except Exception as raised:  # whatever a missing or broken native library does, it is a finding
        found = f"NF4 does not work on {device}: {_first_line(raised)}"
        return Check("bitsandbytes", "fail", found, "pip install --force-reinstall --no-deps bitsandbytes")
    if not error <= NF4_MAX_ERROR:
        found = f"NF4 on {device} is off by {error:.3g} where {NF4_MAX_ERROR} is the most it can be"
        return Check("bitsandbytes", "fail", found, "pip install --force-reinstall --no-deps bitsandbytes")
    return Check("bitsandbytes", "ok", f"{machine.versions.get('bitsandbytes')}, NF4 tried on {device}")


def _check_triton(machine: Machine) -> Check:
    if version := machine.versions.get("triton"):
        return Check("triton", "ok", version)
    return Check("triton", "fail", "not installed; torch compiles its GPU kernels with it", "pip install triton")


def _check_compiler() -> Check:
    """Triton builds its launchers with a C compiler and Python's headers, at the first step of training."""
    compiler = next(
        (path for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (path := shutil.which(name))), None
    )
    if compiler is None:
        return Check("compiler", "fail", "no C compiler; triton needs one", "apt install gcc, or the like, or set CC")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        version = ".".join(map(str, sys.version_info[:2]))
        return Check(
            "compiler", "fail", "no Python.h; triton needs it", f"apt install python{version}-dev, or the like"
        )
    return Check("compiler", "ok", f"{Path(compiler).name}, Python.h")


def _check_room(name: str, total: int | None, free: int, wanted: int) -> Check:
    of_total = f" of {total / 2**30:.1f}" if total else ""
    found = f"{free / 2**30:.1f}{of_total} GiB free"
    if (total or free) >= wanted:
        return Check(name, "ok", found)
    fix = {
        "memory": "enough for models of some hundred million parameters; close other programs or use a larger machine",
        "disk": f"{wanted >> 30} GiB hold an 8B model; free some, or start in a folder on a larger disk",
    }
    return Check(name, "warn", found, fix[name])


def _check_cache() -> Check:
    """Where models and datasets of the hub are kept, by huggingface_hub's own rules."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return Check("hub cache", "ok", "writable")
    return Check("hub cache", "fail", f"{cache} cannot be written", "set HF_HOME to a folder that can be")


def _check_offline() -> list[Check]:
    words = os.environ.get("HF_HUB_OFFLINE", "")
    if words.upper() not in ("1", "ON", "YES", "TRUE"):
        return []
    return [
        Check("hub", "ok", f"HF_HUB_OFFLINE={words}: models and datasets come from the cache or from local folders")
    ]


# --- raw facts: each in one small function, so that tests can put another machine in its place


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _requires(package: str) -> list[str]:
    try:
        return metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []


def _let_segments_grow() -> None:
    """Has CUDA's allocator grow its segments, unless the user has set it up.

    Layers that recompute themselves ask for buffers of many sizes; in segments of fixed size a step of 8.7 GiB reserved
    11.6 (measured), which is what the card must have.
    """
    is_set = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys()
    if platform.system() == "Linux" and "microsoft" not in platform.release() and not is_set:  # WSL's driver cannot
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def _torch_facts() -> dict[str, Any]:
    """What torch says about the GPU, by the names of `Machine`."""
    _let_segments_grow()
    try:
        import torch
    except Exception as error:  # ImportError, and OSError for a native library that is not there
        return {"torch_error": _first_line(error)}
    facts: dict[str, Any] = {"cuda_runtime": torch.version.cuda}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            return facts | {"cuda_error": _cuda_error(torch) if torch.version.cuda else None}
    facts["num_gpus"] = torch.cuda.device_count()
    try:
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info(0)  # makes the context, for which a full card has no room
    except RuntimeError as error:
        return facts | {"cuda_error": _first_line(error)}
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
        return _first_line(error)
    return "torch finds no device"


def _nf4_error(device: str) -> float:
    """The largest error of one matrix in [-1, 1], quantised to NF4 and expanded again on the device."""
    import torch

    from solotune.bnb import functional as bnb

    weight = torch.linspace(-1, 1, 64, device=device).repeat(64, 1)  # each block of 64 has the whole range
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    return (bnb.dequantize_4bit(packed, state) - weight).abs().max().item()


def _nvidia_smi() -> tuple[str | None, str | None]:
    """(GPU name, driver version) as the driver's own tool says."""
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


def ram() -> tuple[int, int]:
    """(total, free) bytes; a container's limit counts where it is lower than the machine's memory."""
    rows = (line.split() for line in _text("/proc/meminfo").splitlines())
    kib = {row[0].rstrip(":"): int(row[1]) for row in rows if len(row) > 1}
    if "MemTotal" not in kib:  # no Linux
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total
    total, free = kib["MemTotal"] << 10, kib["MemAvailable"] << 10
    limit, used = _text("/sys/fs/cgroup/memory.max").strip(), _text("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit() and int(limit) < total:
        rows = (line.split() for line in _text("/sys/fs/cgroup/memory.stat").splitlines())
        cached = dict(row for row in rows if len(row) == 2).get("inactive_file", "0")
        return int(limit), min(free, int(limit) - int(used) + int(cached))
    return total, free


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
