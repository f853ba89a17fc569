"""Checks of this machine: `solotune doctor`, and the checks before a run.

    report = doctor()                  all checks, each with what was found and how to fix it
    require_hardware(machine, ...)     the checks that a run depends on

Checks try things instead of comparing version names: a matrix is quantised and dequantised on the device itself,
because a bitsandbytes without its native library for this CUDA imports without an error and fails at the first step.

What it does not do: use the network, or write anything.
"""

from __future__ import annotations

import os
import resource
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from solotune.errors import CheckError
from solotune.hardware import link, several_gpus
from solotune.hardware import machine as environment
from solotune.hardware.machine import BUSY_GPU, Check, Machine
from solotune.hub.download import offline_switch
from solotune.result_repr import ResultRepr, Table
from solotune.units import first_line, gib

PYTHONS = ((3, 11), (3, 13))
NEEDS = ("torch>=2.11", "transformers>=5.17,<6", "bitsandbytes>=0.49", "datasets>=4.8,<6", "safetensors>=0.7",
         "jinja2>=3.1.6")  # fmt: skip # for a source tree that is not installed; a test compares it with pyproject.toml
# Older versions let a downloaded file run code. All are older than what solotune needs; they have a check of their own
# because such a version must not be used even if everything else works.
FLOORS = {
    "transformers": ("5.3", "a config.json could load native code (CVE-2026-4372, CVE-2026-5241)"),
    "torch": ("2.6", "a checkpoint could run code in spite of weights_only (CVE-2025-32434)"),
    "jinja2": ("3.1.6", "a chat template could escape the sandbox (CVE-2024-56326, CVE-2025-27516)"),
    "pyarrow": ("14.0.1", "a Parquet or Arrow file could run code (CVE-2023-47248)"),
}
MIN_DISK_BYTES, MIN_RAM_BYTES = 20 << 30, 8 << 30
MIN_ADDRESS_SPACE = 950 << 20  # below, torch or a library beside it fails to load, or crashes; a tiny run takes it
NF4_MAX_ERROR = 0.16  # half the widest gap between two NF4 values (-1.0 and -0.696), plus rounding


@dataclass(frozen=True, repr=False)
class DoctorReport(ResultRepr):
    machine: Machine
    checks: list[Check]

    @property
    def ok(self) -> bool:
        """True if no check failed; warnings are not failures."""
        return all(check.status != "fail" for check in self.checks)

    def figures(self) -> dict[str, object]:
        counts = Counter(check.status for check in self.checks)
        return {"ok": self.ok, "failed": counts["fail"], "warnings": counts["warn"], "checks": len(self.checks)}

    def tables(self) -> list[Table]:
        rows = [(check.status, check.name, check.found, check.fix) for check in self.checks]
        return [Table("Checks", ("", "check", "found", "fix"), rows)]

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks], "machine": self.machine.to_json()}


def doctor() -> DoctorReport:
    """Run every check. Takes a few seconds, because torch and bitsandbytes are loaded and used."""
    machine = environment.probe()
    return DoctorReport(
        machine,
        [
            _check_python(machine),
            *_check_packages(machine),
            *_check_floors(),
            _check_torch(machine),
            _check_gpu(machine),
            *several_gpus.check_several(machine),
            _check_bitsandbytes(machine),
            *(
                [environment.check_triton(machine), environment.check_compiler(), _check_link()]
                if machine.has_cuda
                else []
            ),
            _check_room("memory", machine.ram.total, machine.ram.free, MIN_RAM_BYTES, machine.ram.limit_in_words),
            _check_room("disk", None, machine.disk_free_bytes, MIN_DISK_BYTES),
            _check_cache(),
            *_check_offline(),
        ],
    )


def require_torch() -> None:
    """Check that torch can be imported, and that there is a temporary folder, for which it asks then.

    Raises:
        CheckError: it cannot, or there is none.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise CheckError(
            "there is no temporary folder that this process can write to",
            seen=first_line(error),
            change="export TMPDIR=FOLDER with one that it can, or free some space in it",
        ) from error
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < MIN_ADDRESS_SPACE:  # its libraries may crash where it runs out
        raise _torch_missing(f"with the libraries beside it, it takes about {gib(MIN_ADDRESS_SPACE)} GiB")
    try:
        import torch  # noqa: F401
    except Exception as error:
        raise _torch_missing(first_line(error, with_type=True)) from error


def require_hardware(machine: Machine, *, base_precision: str, optim: str, use_cpu: bool) -> None:
    """Check, before the weights are loaded, what would fail after loading them.

    Raises:
        CheckError: bitsandbytes is needed and does not work, or the GPU is hidden from this process.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if machine.nvidia_gpu and machine.cuda_runtime and not machine.num_gpus and hidden is not None and not use_cpu:
        raise CheckError(
            f"this machine has a GPU ({machine.nvidia_gpu}), but it is hidden from this process",
            seen=f"CUDA_VISIBLE_DEVICES={hidden!r}",
            change="unset CUDA_VISIBLE_DEVICES or set it to 0, or set use_cpu: true to train on the CPU",
        )
    if base_precision in ("nf4", "auto") or optim != "adamw_torch":
        check = _check_bitsandbytes(machine)
        if check.status == "fail":
            other = "base_precision: bf16 with optim: adamw_torch, which do not need it"
            raise CheckError(f"bitsandbytes: {check.found}", change=f"{check.fix}, or {other}")


def _torch_missing(reason: str) -> CheckError:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    change = "pip install --force-reinstall torch"
    if limit != resource.RLIM_INFINITY:
        reason += f"; this process is limited to {gib(limit)} GiB of address space"
        change = f"raise that limit (ulimit -v unlimited), or {change}"
    return CheckError("torch cannot be imported", seen=reason, change=change)


def _check_python(machine: Machine) -> Check:
    low, high = (".".join(map(str, version)) for version in PYTHONS)
    inside = PYTHONS[0] <= tuple(map(int, machine.python.split(".")[:2])) <= PYTHONS[1]
    fix = None if inside else f"create the virtual environment with Python {low} to {high}"
    return Check("python", "ok" if inside else "fail", f"{machine.python} on {machine.os}", fix)


def _check_packages(machine: Machine) -> list[Check]:
    """Compare all requirements of solotune, direct and indirect, with what is installed (as `pip check` does)."""
    try:
        conflicts = _conflicts()
    except ImportError:
        return [Check("packages", "warn", "versions not checked: packaging is not installed", "pip install packaging")]
    if not conflicts:
        found = ", ".join(f"{name} {version}" for name, version in machine.versions.items() if name != "torch")
        return [Check("packages", "ok", found)]
    # An old version that another package forbids may still work, so it is a warning. What solotune itself needs, or a
    # missing package, is a failure.
    return [
        Check(
            "packages", "fail" if is_own or "not installed" in problem else "warn", problem, f"pip install '{wanted}'"
        )
        for problem, wanted in conflicts
        for is_own in [problem.startswith("solotune needs")]
    ]


def _check_floors() -> list[Check]:
    """Look for versions with known vulnerabilities that a file could exploit."""
    name, floors = "safe versions", [f"{package}>={floor}" for package, (floor, _) in FLOORS.items()]
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return [Check(name, "warn", "not checked: packaging is not installed", "pip install packaging")]
    unsafe = []
    for wanted, (package, (floor, hole)) in zip(floors, FLOORS.items(), strict=True):
        installed = environment.installed_version(package)  # a missing package is another check's finding
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
            return Check(
                "gpu", "warn", found, "nothing to fix: this GPU has no bfloat16, so training uses float32 (slower)"
            )
        return Check("gpu", "ok", found)
    if machine.gpu_refuses:
        found = f"{machine.nvidia_gpu}, driver {machine.driver}: cannot be used: {machine.cuda_error}"
        return Check("gpu", "fail", found, BUSY_GPU)
    if machine.nvidia_gpu is None or machine.torch_error is not None:
        found = "none that torch can use; small models train in minutes on the CPU, larger ones need an NVIDIA GPU"
        return Check("gpu", "warn", found)
    if machine.cuda_runtime is None:
        found = f"{machine.nvidia_gpu} found, but torch {machine.versions.get('torch')} is built without CUDA"
        return Check("gpu", "fail", found, "pip install --force-reinstall torch (not from an index for CPU builds)")
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        found = f"{machine.nvidia_gpu} is hidden: CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r}"
        return Check("gpu", "warn", found, "unset CUDA_VISIBLE_DEVICES, or set it to 0")
    found = f"{machine.nvidia_gpu}, driver {machine.driver}: torch cannot use it: {machine.cuda_error}"
    fix = f"update the NVIDIA driver to one for CUDA {machine.cuda_runtime}, or install torch built for an older CUDA"
    return Check("gpu", "fail", found, fix)


def _check_link() -> Check:
    """Measure copies from host memory: with `base_offload` the frozen weights arrive over this link in every pass."""
    try:
        speed = link.host_to_device_bytes_per_second()
    except RuntimeError as error:
        return Check("link", "warn", f"not measured: {first_line(error)}", "end what else uses the GPU")
    found, lanes = f"{speed / 1e9:.1f} GB/s from host memory to the GPU", link.lanes()
    if lanes is not None:
        found += f", PCIe generation {lanes.generation} with {lanes.width} lanes"
    slot = f"use a slot with {lanes.max_width if lanes else 16} lanes, without a riser"
    busy = "end what else copies to the GPU, or run on the CPU socket that the card is at (numactl)"
    if lanes is not None and speed < link.EXPECTED * lanes.possible:
        found += f"; generation {lanes.max_generation} with {lanes.max_width} reaches {lanes.possible / 1e9:.0f}"
        fix = slot if lanes.width < lanes.max_width else busy
    elif speed < link.SLOW_BYTES_PER_SECOND:
        fix = f"{slot}, or {busy}"
    else:
        return Check("link", "ok", found)
    return Check("link", "warn", found, f"{fix}; only base_offload and activation_offload depend on it")


def _check_bitsandbytes(machine: Machine) -> Check:
    device = "cuda" if machine.has_cuda else "cpu"
    if machine.torch_error is not None:
        return Check("bitsandbytes", "fail", "not tested, because torch cannot be imported", "fix torch first")
    try:
        error = _nf4_error(device)
    except Exception as raised:  # a missing or broken native library can raise any class
        found = f"NF4 does not work on {device}: {first_line(raised, with_type=True)}"
        return Check("bitsandbytes", "fail", found, "pip install --force-reinstall --no-deps bitsandbytes")
    if not error <= NF4_MAX_ERROR:
        found = f"NF4 on {device} gives wrong numbers: error {error:.3g}, expected at most {NF4_MAX_ERROR}"
        return Check("bitsandbytes", "fail", found, "pip install --force-reinstall --no-deps bitsandbytes")
    return Check("bitsandbytes", "ok", f"{machine.versions.get('bitsandbytes')}, NF4 tested on {device}")


def _check_room(name: str, total: int | None, free: int, wanted: int, limit: str = "") -> Check:
    of_total = f" of {gib(total)}" if total else ""
    found = f"{gib(free)}{of_total} GiB free{limit}"
    if (total or free) >= wanted:
        return Check(name, "ok", found)
    fix = {
        "memory": "enough for models up to a few hundred million parameters; for larger ones free or add memory",
        "disk": f"an 8B model needs {wanted >> 30} GiB; free some space, or start in a folder on a larger disk",
    }
    return Check(name, "warn", found, fix[name])


def _check_cache() -> Check:
    """Check that the cache of huggingface_hub can be written; its place follows the rules of that library."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return Check("hub cache", "ok", "writable")
    return Check("hub cache", "fail", f"{cache} is not writable", "set HF_HOME to a writable folder")


def _check_offline() -> list[Check]:
    what = "models and datasets come from the cache or local folders only"
    return [Check("hub", "ok", f"HF_HUB_OFFLINE={value}: {what}")] if (value := offline_switch()) else []


def _conflicts() -> list[tuple[str, str]]:
    """(conflict, the requirement to install) over solotune's requirements and theirs."""
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
        requirement = f"{wanted.name}{wanted.specifier}"
        if installed is None:
            found[f"{owner} needs {requirement}, which is not installed", requirement] = None
        elif not wanted.specifier.contains(installed, prereleases=True):
            found[f"{owner} needs {requirement}, but {installed} is installed", requirement] = None
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
    """Largest error of a matrix in [-1, 1] that is quantised to NF4 and dequantised on the device."""
    import torch

    from solotune.hardware.bnb import functional as bnb

    weight = torch.linspace(-1, 1, 64, device=device).repeat(64, 1)  # each block of 64 covers the whole range
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    return (bnb.dequantize_4bit(packed, state) - weight).abs().max().item()
