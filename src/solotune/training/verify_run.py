"""Check that every file of a run is as the run wrote it: `solotune verify`.

    finished run     manifest.json lists every file with its sha256, or the manifest.json of a folder with its sha256
    unfinished run   nothing is final: checkpoints are checked against their manifests, and metrics.jsonl against the
                     length and sha256 that each checkpoint recorded
    adapter and      names and shapes of the tensors match config.yaml, and every parameter is finite. A run that wrote
    checkpoints      a NaN has a perfect manifest, and a model's outputs can hide it (fused attention on a CPU does), so
                     the parameters themselves are checked
    exports          each folder of export/ matches its own manifest, and that the one that export.json records

log.txt may have grown since (a crash writes there), so its recorded bytes must be at its beginning. The lock file is
not checked: its content changes with its owner; nor is what trackers write into their folder, also after the run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from solotune.config.load import load_config
from solotune.config.settings import LoraSettings
from solotune.errors import InputError, SolotuneError
from solotune.model.adapter import read_tensors
from solotune.result_repr import ResultRepr, Table
from solotune.run import atomic_io
from solotune.run.manifest import (
    MANIFEST,
    NOT_LISTED,
    Problem,
    check_folder,
    differences,
    entry_at,
    read_manifest,
    unknown,
)
from solotune.run.record import RunRecord
from solotune.run.run_dir import (
    EXPORT,
    EXPORT_JSON,
    LOCK,
    LOG,
    MARKS,
    METRICS,
    TRACKERS,
    UNUSED,
    RunDirectory,
    located,
    read_object,
)
from solotune.training import checkpoint

OWN_JSON = ("environment.json", "data.json", "plan.json", "fingerprints.json", "split.json", "evaluation.json")
SHAPED = ("lora_A", "lora_B")


@dataclass(frozen=True, repr=False)
class Verification(ResultRepr):
    """The result of `solotune verify`."""

    path: Path
    finished: bool
    num_files: int
    num_bytes: int
    num_checkpoints: int
    problems: list[Problem]
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def figures(self) -> dict[str, object]:
        return {
            "run": self.path,
            "ok": self.ok,
            "finished": self.finished,
            "files": self.num_files,
            "problems": len(self.problems),
        }

    def tables(self) -> list[Table]:
        return [Table("Problems", ("file", "problem"), self.problems), Table("Notes", (), [(n,) for n in self.notes])]

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "run": str(self.path),
            "finished": self.finished,
            "files": self.num_files,
            "bytes": self.num_bytes,
            "checkpoints": self.num_checkpoints,
            "problems": [problem._asdict() for problem in self.problems],
            "notes": self.notes,
        }


def verify(path: str | Path) -> Verification:
    """Check every file of a run.

    Raises:
        InputError: there is no run at this path.
    """
    run = RunDirectory(located(path))
    if not any((run.path / mark).exists() for mark in (*MARKS, MANIFEST)):
        raise InputError(f"{path}: not a run directory", allowed="a run directory of `solotune train`")
    finished = RunRecord.read(run.path).is_finished or os.path.lexists(run.path / MANIFEST)
    problems = [*(_sealed(run) if finished else _unsealed(run)), *_tensors(run), *_exports(run)]
    unused = sorted(path.name for path in run.checkpoints.glob(f"*{UNUSED}"))
    notes = [] if finished else ["the run has not finished, so only its checkpoints can be checked"]
    if unused and not finished:
        notes.append(f"not checked, because a resumed run skipped them: {', '.join(unused)}")
    files = [file for file in run.path.rglob("*") if file.is_file() and not file.is_symlink() and file.name != LOCK]
    return Verification(
        path=run.path,
        finished=finished,
        num_files=len(files),
        num_bytes=sum(file.stat().st_size for file in files),
        num_checkpoints=len(checkpoint.list_checkpoints(run.checkpoints)),
        problems=list(dict.fromkeys(problems)),
        notes=notes,
    )


def _sealed(run: RunDirectory) -> Iterator[Problem]:
    """Check a finished run against its manifest, and folders with their own manifest against that."""
    try:
        entries = read_manifest(run.path / MANIFEST)
    except ValueError as error:
        yield Problem(MANIFEST, f"the run has finished, but its manifest cannot be used: {error}")
        yield from _unsealed(run)
        return
    if not (run.path / EXPORT).exists():  # exports may be removed to make room
        entries = {name: entry for name, entry in entries.items() if not _is_export(name)}
    yield from differences(run.path, entries, growing=(LOG,))
    folders = {name.removesuffix(f"/{MANIFEST}") for name in entries if name.endswith(f"/{MANIFEST}")}
    folders = {folder for folder in folders if not folder.endswith(UNUSED)}  # every file of these is in `entries`
    for folder in sorted(folders):
        if (run.path / folder).is_dir() and not _is_linked(run, folder):
            yield from _within(folder, check_folder(run.path / folder))
    for name in unknown(run.path, entries):
        inside = any(name.startswith(f"{folder}/") for folder in folders)
        if not inside and name != LOCK and name.split("/")[0] not in (EXPORT, TRACKERS):
            yield Problem(name, NOT_LISTED)


def _is_export(name: str) -> bool:
    return name.split("/")[0] == EXPORT


def _exports(run: RunDirectory) -> Iterator[Problem]:
    """Check each exported folder against its manifest, and that against export.json; removed ones are no problem."""
    root = run.path / EXPORT
    if root.is_symlink() or not root.is_dir():
        if os.path.lexists(root):
            yield Problem(EXPORT, "is a link, or not a folder")
        return
    recorded: dict[str, Any] = {}
    if os.path.lexists(root / EXPORT_JSON):
        try:
            artifacts = read_object(root / EXPORT_JSON).get("artifacts") or []
            recorded = {str(one["kind"]): one.get("sha256") for one in artifacts}
        except (InputError, KeyError, TypeError, AttributeError):
            yield Problem(f"{EXPORT}/{EXPORT_JSON}", "is damaged")
    for path in sorted(root.iterdir()):
        name = f"{EXPORT}/{path.name}"
        if path.name in (EXPORT_JSON, LOCK) or path.suffix in (atomic_io.PARTIAL, atomic_io.REMOVED):
            continue
        if path.is_symlink() or not path.is_dir():
            yield Problem(name, NOT_LISTED)
            continue
        problems = check_folder(path)
        yield from _within(name, problems)
        if not problems and path.name in recorded and entry_at(path / MANIFEST).sha256 != recorded[path.name]:
            yield Problem(f"{name}/{MANIFEST}", f"is not the one that {EXPORT_JSON} records")


def _unsealed(run: RunDirectory) -> Iterator[Problem]:
    """Check what can be checked of an unfinished run."""
    folders = [path for _, path in checkpoint.list_checkpoints(run.checkpoints)]
    for folder in [*folders, *([run.adapter] if run.adapter.is_dir() else [])]:
        if _is_linked(run, name := folder.relative_to(run.path).as_posix()):
            yield Problem(name, "is a link, not a folder of this run")
            continue
        yield from _within(folder.relative_to(run.path).as_posix(), check_folder(folder))
    for name in OWN_JSON:
        if os.path.lexists(run.path / name):
            try:
                read_object(run.path / name)
            except InputError as error:
                yield Problem(name, error.problem)
    for folder in folders:
        try:
            reason = run.metrics_mismatch(checkpoint.read_state(folder).get("metrics"))
        except SolotuneError:
            continue  # reported above
        if reason:
            yield Problem(METRICS, f"{folder.name} cannot be continued: {reason}")


def _is_linked(run: RunDirectory, name: str) -> bool:
    """Whether a path below the run is a link, or in a folder that is one: then it is not of this run."""
    return any((run.path / part).is_symlink() for part in (name, *PurePosixPath(name).parents[:-1]))


def _within(folder: str, problems: list[Problem]) -> Iterator[Problem]:
    return (Problem(f"{folder}/{file}", problem) for file, problem in problems)


def _tensors(run: RunDirectory) -> Iterator[Problem]:
    """Check that the tensors of adapter and checkpoints match the config and are finite."""
    try:
        config = load_config(run.path / "config.yaml")
    except SolotuneError as error:
        yield Problem("config.yaml", error.problem)
        return
    names: dict[str, tuple[int, ...]] | None = None
    for folder in [run.adapter, *(path for _, path in checkpoint.list_checkpoints(run.checkpoints))]:
        for path in sorted(folder.glob("*.safetensors")):
            where = path.relative_to(run.path).as_posix()
            if _is_linked(run, where):
                continue  # the manifests' check reports it
            try:
                tensors = read_tensors(path)
            except SolotuneError as error:
                seen = f": {error.seen}" if error.seen else ""
                yield Problem(where, f"not a readable safetensors file{seen}")
                continue
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    yield Problem(where, f"{name} has values that are not finite")
            if path.name == "adapter_model.safetensors":
                yield from (Problem(where, text) for text in _of_config(tensors, config.lora, folder))
                shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
                if names is not None and shapes != names:
                    yield Problem(where, "tensor names or shapes differ from the run's other adapters")
                names = names or shapes


def _of_config(tensors: dict[str, torch.Tensor], lora: LoraSettings, folder: Path) -> Iterator[str]:
    """Compare an adapter with the config: pairs `lora_A (r, in)`, `lora_B (out, r)`, layers, adapter_config.json."""
    layers: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.removesuffix(".weight").rpartition(".")
        if part not in SHAPED or tensor.dim() != 2:
            yield f"{name} is not a tensor of a LoRA adapter"
            continue
        layers.setdefault(layer, set()).add(part)
        if tensor.shape[SHAPED.index(part)] != lora.r:
            yield f"{name} has shape {tuple(tensor.shape)}, which is not rank {lora.r} (lora_r)"
    yield from (
        f"{layer} has only one of lora_A and lora_B" for layer, parts in layers.items() if len(parts) < len(SHAPED)
    )
    if lora.target_modules != "all-linear":
        for target in lora.target_modules:
            if not any(layer == target or layer.endswith(f".{target}") for layer in layers):
                yield f"it has no layer named {target} (lora_target_modules)"
    try:
        written = read_object(folder / "adapter_config.json")
        said = (written["r"], written["lora_alpha"], written["use_rslora"])
    except (SolotuneError, KeyError, TypeError):
        return  # the manifest check reports it
    if said != (expected := (lora.r, lora.alpha, lora.use_rslora)):
        yield f"adapter_config.json has r, alpha, rslora = {said}, config.yaml has {expected}"
