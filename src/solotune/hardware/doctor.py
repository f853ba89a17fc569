"""Is this machine fit for work? What `solotune doctor` says, and what `solotune train` asks before it begins.

    report = doctor()             checks, each with what was found and what mends it
    require_hardware(config, machine)  those that a run cannot do without

They try things instead of comparing names of versions: a matrix is quantised and expanded on the very device, because
a bitsandbytes without its native library for this CUDA imports without complaint and fails at the first step.

What it does not do: use the network, or write anything.
"""

from __future__ import annotations

import os
import resource
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from solotune.config.run_config import RunConfig
from solotune.errors import CheckError
from solotune.hardware import machine as environment
from solotune.hardware.machine import BUSY_GPU, Check, Machine
from solotune.units import first_line, gib

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
MIN_DISK_BYTES, MIN_RAM_BYTES = 20 << 30, 8 << 30
NF4_MAX_ERROR = 0.16  # half the widest gap between two NF4 values (-1.0 and -0.696), and rounding


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


def doctor() -> DoctorReport:
    """Runs every check. Takes a few seconds, for torch and bitsandbytes are really loaded and used."""
    machine = environment.probe()
    return DoctorReport(
        machine,
        [
            _check_python(machine),
            *_check_packages(machine),
            *_check_floors(),
            _check_torch(machine),
            _check_gpu(machine),
            _check_bitsandbytes(machine),
            *([environment.check_triton(machine), environment.check_compiler()] if machine.has_cuda else []),
            _check_room("memory", machine.ram_bytes, machine.ram_free_bytes, MIN_RAM_BYTES),
            _check_room("disk", None, machine.disk_free_bytes, MIN_DISK_BYTES),
            _check_cache(),
            *_check_offline(),
        ],
    )


def require_torch() -> None:
    """Raises:
    CheckError: torch cannot be imported, and without it there is nothing to do.
    """
    try:
        import torch  # noqa: F401
    except Exception as error:
        raise _torch_missing(first_line(error, with_type=True)) from error


def require_hardware(config: RunConfig, machine: Machine) -> None:
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
        said += f"; this process may have {gib(limit)} GiB of address space"
        change = f"raise that limit (ulimit -v unlimited), or {change}"
    return CheckError("torch cannot be imported", seen=said, change=change)


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
        installed = environment.installed_version(package)  # another check says what is missing
        if installed is not None and not Requirement(wanted).specifier.contains(installed, prereleases=True):
            found = f"{package} {installed} is unsafe: before {floor} {hole}"
            unsafe.append(Check(name, "fail", found, f"pip install --upgrade '{wanted}'"))
    return unsafe or [Check(name, "ok", ", ".join(floors))]


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
        free, total = (gib(number or 0) for number in (machine.gpu_free_bytes, machine.gpu_bytes))
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
        found = f"NF4 does not work on {device}: {first_line(raised, with_type=True)}"
        return Check("bitsandbytes", "fail", found, "pip install --force-reinstall --no-deps bitsandbytes")
    if not error <= NF4_MAX_ERROR:
        found = f"NF4 on {device} is off by {error:.3g} where {NF4_MAX_ERROR} is the most it can be"
        return Check("bitsandbytes", "fail", found, "pip install --force-reinstall --no-deps bitsandbytes")
    return Check("bitsandbytes", "ok", f"{machine.versions.get('bitsandbytes')}, NF4 tried on {device}")


def _check_room(name: str, total: int | None, free: int, wanted: int) -> Check:
    of_total = f" of {gib(total)}" if total else ""
    found = f"{gib(free)}{of_total} GiB free"
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
        installed = environment.installed_version(name)
        asked = f"{wanted.name}{wanted.specifier}"
        if installed is None:
            found[f"{owner} needs {asked}, which is not installed", asked] = None
        elif not wanted.specifier.contains(installed, prereleases=True):
            found[f"{owner} needs {asked}, installed is {installed}", asked] = None
        elif name not in seen:
            seen.add(name)
            todo += [(f"{wanted.name} {installed}", text) for text in _requires(name)]
    return list(found)


def _requires(package: str) -> list[str]:
    try:
        return metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []


def _nf4_error(device: str) -> float:
    """The largest error of one matrix in [-1, 1], quantised to NF4 and expanded again on the device."""
    import torch

    from solotune.hardware.bnb import functional as bnb

    weight = torch.linspace(-1, 1, 64, device=device).repeat(64, 1)  # each block of 64 has the whole range
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    return (bnb.dequantize_4bit(packed, state) - weight).abs().max().item()
