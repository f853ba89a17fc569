"""The folder of exports: one subfolder for each artifact, and export.json with what was measured.

    RUN/export/  adapter/  merged/  gguf/  ...  export.json

Each artifact appears complete or not at all, with a manifest of its files (`atomic_io.whole_folder`); nothing that is
there already is replaced. export.json is written after each artifact, so what was written before an error is recorded;
artifacts of an earlier export stay in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solotune.errors import CheckError, DirectoryInUseError, InputError
from solotune.exporters.artifact import Artifact, Compared, Export
from solotune.exporters.base_tensors import as_bytes
from solotune.model.adapter import Adapter
from solotune.run import atomic_io
from solotune.run.manifest import MANIFEST, check_folder, entry_at, read_manifest
from solotune.run.run_dir import EXPORT_JSON, LOCK, RunDirectory, nearest_folder, read_object
from solotune.training.disk_space import free_bytes
from solotune.units import format_bytes


@dataclass
class ExportFolder:
    """An export that is being written; use `opened`."""

    path: Path
    run: RunDirectory | None
    """The run whose export folder it is, if it is one."""

    def record(self, export: Export) -> None:
        """Write export.json with the artifacts so far; of a run, its manifest gets the file's hash.

        It holds no path: paths count from its folder, so it says the same wherever the folder goes.
        """
        content = export.to_json()
        artifacts = [_without_paths(one, self.path) for one in content["artifacts"]]
        content |= {"folder": ".", "artifacts": artifacts, "merge": content["merge"] or self._written().get("merge")}
        here = {one.kind for one in export.artifacts}
        earlier = [
            one for one in self.earlier() if one.get("kind") not in here and (self.path / str(one["path"])).exists()
        ]
        atomic_io.write_whole(
            self.path / EXPORT_JSON, atomic_io.json_text({**content, "artifacts": [*earlier, *content["artifacts"]]})
        )
        if self.run is not None:
            self.run.update_manifest((self.path / EXPORT_JSON).relative_to(self.run.path).as_posix())

    def earlier(self) -> list[dict[str, Any]]:
        """What export.json lists so far."""
        found = self._written().get("artifacts")
        return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []

    def check_adapter(self, sha256: str) -> None:
        """Raises:
        InputError: what is there was made of another adapter (the run was trained further since).
        """
        if (earlier := self._written().get("adapter_sha256")) not in (None, sha256):
            raise InputError(
                f"{self.path}: the exports there were made of another adapter",
                seen=f"sha256 {str(earlier)[:12]}; this one has {sha256[:12]}",
                change=f"remove them (rm -r {self.path}), or write elsewhere with --out",
            )

    def _written(self) -> dict[str, Any]:
        path = self.path / EXPORT_JSON
        return read_object(path) if path.is_file() else {}


def sha256_of(adapter: Adapter) -> str:
    """Of an adapter's tensors and scales, whatever file they are in."""
    digest = hashlib.sha256()
    for name in sorted(adapter.tensors):
        digest.update(f"{name} {adapter.tensors[name].dtype}\n".encode() + as_bytes(adapter.tensors[name]))
    for name in sorted(adapter.modules):
        digest.update(f"{name} {adapter.scaling(name)}\n".encode())
    return digest.hexdigest()


def _without_paths(artifact: dict[str, Any], root: Path) -> dict[str, Any]:
    kept = {key: value for key, value in artifact.items() if key != "next_commands"}
    return {**kept, "path": Path(artifact["path"]).relative_to(root).as_posix()}


@contextlib.contextmanager
def opened(path: Path, kinds: Sequence[str], run: RunDirectory | None) -> Iterator[ExportFolder]:
    """The export folder for writing, locked; what a killed export left half written is removed.

    Raises:
        InputError: an artifact is there already.
        DirectoryInUseError: another process exports into it.
        StorageError: it cannot be written.
    """
    refuse_existing(path, kinds)
    atomic_io.make_folder(path)
    lock = atomic_io.take_lock(path / LOCK, f"export by process {os.getpid()}\n")
    if lock is None:
        raise DirectoryInUseError(
            f"{path}: another export is writing there", change="wait for it, or give another --out"
        )
    try:
        refuse_existing(path, kinds)
        atomic_io.sweep(path)
        yield ExportFolder(path, run)
    finally:
        atomic_io.drop_lock(path / LOCK, lock)
        with contextlib.suppress(OSError):
            (path / LOCK).unlink()
            path.rmdir()  # if nothing was written


def refuse_existing(path: Path, kinds: Sequence[str]) -> None:
    """Raises:
    InputError: an artifact of one of these kinds is there already, or the folder is a file.
    """
    if path.is_file():
        raise InputError(f"--out: {path} is a file", allowed="a folder, existing or not")
    for kind in kinds:
        target = path / kind
        if os.path.lexists(target):
            raise InputError(
                f"{target} exists already",
                allowed="exports are never overwritten",
                change=f"remove it (rm -r {target}), or write elsewhere with --out",
            )


def is_intact(folder: Path) -> bool:
    """Whether a folder is as an export wrote it."""
    return folder.is_dir() and not check_folder(folder)


def artifact_of(
    kind: str, folder: Path, seconds: float, compared: Compared, next_commands: Sequence[str] = ()
) -> Artifact:
    """The artifact that a written folder is."""
    size = sum(entry.bytes for entry in read_manifest(folder / MANIFEST).values())
    sha256 = entry_at(folder / MANIFEST).sha256
    return Artifact(kind, folder, size, sha256, round(seconds, 3), **vars(compared), next_commands=list(next_commands))


def check_disk(path: Path, needed: Mapping[str, int]) -> str:
    """What the artifacts need, in words.

    Raises:
        CheckError: the disk has less room.
    """
    total, folder = sum(needed.values()), nearest_folder(path)
    parts = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in needed.items())
    if (free := free_bytes(folder)) < total:
        raise CheckError(
            "the export does not fit on the disk",
            seen=f"{format_bytes(free)} free in {folder}, {format_bytes(total)} needed: {parts}",
            change=f"free {format_bytes(total - free)}, or write to another disk with --out",
        )
    return f"writes {format_bytes(total)} ({parts}) into {path}"
