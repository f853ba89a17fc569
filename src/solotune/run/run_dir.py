"""The run directory: the files that the stages of a run write and read.

    runs/<name>/  config.yaml  environment.json  data.json  metrics.jsonl  checkpoints/step-000050/
                  adapter/  evaluation.json  diagnosis.json  report.html  log.txt  fingerprints.json  manifest.json

Every file is written completely or not at all (`atomic_io`). So a reader sees only finished files, during the run,
after a crash or on another machine. Only `metrics.jsonl` grows: one JSON object per line; an incomplete last line is
ignored. A lock, which the kernel drops when its owner ends, keeps a second process out.

Each checkpoint records the length and the sha256 of `metrics.jsonl`. Resuming from the checkpoint cuts the file back to
that length. A file that is shorter or has another hash belongs to another run than the checkpoint. At the end of a run
`manifest.json` gets the hash of every file that has no manifest in its folder (adapter and checkpoints have one).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solotune.errors import DirectoryInUseError, InputError
from solotune.regular_files import read_bytes, read_text
from solotune.result_repr import ResultRepr
from solotune.run import atomic_io
from solotune.run.events import Event, to_line
from solotune.run.history import history_of
from solotune.run.manifest import MANIFEST, Entry, entry_at, manifest_text, read_manifest
from solotune.run.record import MAX_JSON_BYTES, METRICS, RunRecord, number_in, parse_json

if TYPE_CHECKING:
    from pandas import DataFrame

LATEST = "latest"
LOCK = ".lock"
LOCK_TRIES, MAX_LOCK_BYTES = 20, 4096
LOG, FINGERPRINTS, STACKS, REPORT = "log.txt", "fingerprints.json", "stacks.txt", "report.html"
EXPORT, EXPORT_JSON = "export", "export.json"
TRACKERS = "trackers"  # written by the trackers' own processes, also after the run: not in the manifest
UNUSED = ".unused"  # ending of a checkpoint that a resumed run skipped
MARKS = ("config.yaml", METRICS, "adapter", "checkpoints")  # a directory with any of these holds a run


def read_json(path: Path) -> Any:
    """Read a JSON file of a run.

    Raises:
        InputError: it does not exist, is not a regular file, or is not JSON.
    """
    try:
        return parse_json(read_bytes(path, MAX_JSON_BYTES))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", allowed="a file that `solotune train` wrote") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read", seen=error.strerror) from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON", seen=str(error)) from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file of a run that holds an object.

    Raises:
        InputError: as `read_json`, or it is no object.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a JSON object", seen=type(found).__name__)
    return found


class RunDirectory:
    """The folder of one run. Use `create` to start a run and `open` to read one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics = path / METRICS
        self._lock: int | None = None

    @classmethod
    def create(cls, output_dir: str | None, name: str = "run", resume: bool = False) -> RunDirectory:
        """Make the directory (or, to resume, take it over) and lock it.

        Args:
            output_dir: its path; None: a new folder runs/<name>-<date>.

        Raises:
            DirectoryInUseError: another process uses it, or it already contains a run and `resume` is false.
        """
        if not resume:
            cls.refuse_occupied(output_dir)
        run = cls(Path(os.path.expanduser(output_dir)) if output_dir else _fresh_path(name))
        atomic_io.make_folder(run.path)
        run._take_lock()
        try:
            if not resume:
                cls.refuse_occupied(output_dir)  # another process may have finished a run here in the meantime
            for folder in (run.path, run.checkpoints):
                atomic_io.sweep(folder)
        except BaseException:
            run.release()
            raise
        return run

    @staticmethod
    def refuse_occupied(output_dir: str | None) -> None:
        """Check that `output_dir` holds no run.

        Raises:
            InputError: `output_dir` is a file.
            DirectoryInUseError: it already contains a run.
        """
        path = Path(os.path.expanduser(output_dir or "."))
        if path.is_file():
            raise InputError(f"output_dir: {path} is a file", allowed="a folder, existing or not")
        held = [mark for mark in MARKS if output_dir and (path / mark).exists()]
        if held:
            raise DirectoryInUseError(
                f"{path} already contains a run",
                seen=", ".join(held),
                change="continue it with --resume, choose another output_dir, or remove the folder",
            )

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """Open an existing run for reading.

        Args:
            path: the folder, the name of one below runs/, or `latest`.

        Raises:
            InputError: the folder does not exist, or has no run in it.
        """
        run = cls(located(path))
        if not run.path.is_dir():
            known = ", ".join(str(other.path) for other in list_runs()[-3:])
            raise InputError(
                f"{path}: run not found", allowed="a run directory", change=f"newest runs: {known}" if known else None
            )
        if not (run.path / "config.yaml").is_file():
            raise InputError(
                f"{path}: not a run directory",
                seen="no config.yaml in it",
                allowed="a folder that `solotune train` wrote",
            )
        return run

    def _take_lock(self) -> None:
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        owner_line = json.dumps({"pid": os.getpid(), "host": platform.node(), "since": now}) + "\n"
        owner = None
        for _ in range(LOCK_TRIES):  # `is_locked` holds it for a moment, and the owner's name is written after locking
            self._lock = atomic_io.take_lock(self.path / LOCK, owner_line)
            if self._lock is not None:
                return
            if owner := self._owner():
                break
            time.sleep(0.05)
        raise DirectoryInUseError(
            f"{self.path} is in use by another process",
            seen=owner,
            change="wait until it ends, or choose another output_dir",
        )

    def _owner(self) -> str | None:
        """The process that holds the lock, in words; None if it is not known."""
        try:
            owner = json.loads(read_text(self.path / LOCK, MAX_LOCK_BYTES))
            if owner["host"] == platform.node() and not _is_alive(owner["pid"]):
                return None
            return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None

    def is_locked(self) -> bool:
        """Whether a process is writing this run now."""
        return atomic_io.is_locked(self.path / LOCK)

    def release(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            atomic_io.drop_lock(self.path / LOCK, self._lock)
            self._lock = None

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file; `name` is a file name such as `evaluation.json`."""
        atomic_io.write_whole(self.path / name, atomic_io.json_text(content))

    def log(self, event: Event) -> None:
        """Append the event's line to metrics.jsonl.

        Raises:
            StorageError: disk full, read-only, quota.
        """
        atomic_io.append_line(self._metrics, to_line(event))

    def metrics_offset(self) -> dict[str, Any]:
        """Make metrics.jsonl durable; its length and sha256, which the checkpoint records."""
        atomic_io.sync(self._metrics)
        return entry_at(self._metrics)._asdict()

    def metrics_mismatch(self, mark: Any) -> str | None:
        """Why metrics.jsonl cannot be cut back to the recorded length; None if it can.

        Args:
            mark: what `metrics_offset` returned, as a checkpoint recorded it.
        """
        path = self._metrics
        if not isinstance(mark, dict) or type(mark.get("bytes")) is not int or mark["bytes"] < 0:
            return f"the checkpoint does not record the length of {METRICS}"
        there = path.stat().st_size if path.is_file() else 0
        if there < mark["bytes"]:
            return f"{METRICS} has {there:,} bytes, but had {mark['bytes']:,} when the checkpoint was saved"
        if mark["bytes"] and entry_at(path, mark["bytes"]) != Entry(mark["bytes"], str(mark.get("sha256"))):
            return f"{METRICS} has changed since the checkpoint was saved, or belongs to another run"
        return None

    def truncate_metrics(self, mark: Mapping[str, Any] | None) -> None:
        """Remove the manifest and cut metrics.jsonl back to the recorded length (None: to nothing)."""
        atomic_io.remove(self.path / MANIFEST)
        atomic_io.cut_back(self._metrics, mark["bytes"] if mark else 0)

    def write_manifest(self) -> None:
        """Write manifest.json with the size and sha256 of every file, for `solotune verify`."""
        entries = {}
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            has_own = path.name != MANIFEST and (path.parent / MANIFEST).is_file() and path.parent != self.path
            # a skipped checkpoint may not match its own manifest, so its files are listed as they are
            is_listed = not has_own or path.parent.name.endswith(UNUSED)
            is_of_trackers = name.split("/")[0] == TRACKERS
            if path.is_file() and is_listed and not is_of_trackers and name not in (MANIFEST, LOCK):
                entries[name] = entry_at(path)
        atomic_io.write_whole(self.path / MANIFEST, manifest_text(entries))

    def update_manifest(self, name: str) -> None:
        """Update one file's entry in the manifest after rewriting the file; the other entries stay.

        A run without a manifest, or with a damaged one, is left as it is.
        """
        with contextlib.suppress(ValueError):
            entries = read_manifest(self.path / MANIFEST)
            atomic_io.write_whole(self.path / MANIFEST, manifest_text({**entries, name: entry_at(self.path / name)}))

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the process of another user
        pass
    return True


def _fresh_path(name: str) -> Path:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = Path("runs") / f"{name}-{stamp}"
    return path if not path.exists() else path.with_name(f"{path.name}-{os.getpid()}")


def nearest_folder(path: str | Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = Path(os.path.expanduser(path)).absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def located(path: str | Path) -> Path:
    """The folder of a run that is given by its path, its name below runs/, or as `latest`; else the path as it is."""
    given = Path(os.path.expanduser(path))
    if given.exists() or len(given.parts) != 1:
        return given
    known = list_runs()
    if str(given) == LATEST and known:
        return known[-1].path
    return next((run.path for run in known if run.path.name == str(given)), given)


def list_runs(root: str | Path = "runs") -> list[RunDirectory]:
    """The runs below a folder, oldest first."""
    found = []
    for path in Path(root).glob("*/config.yaml"):
        with contextlib.suppress(OSError):  # removed meanwhile, or no access
            found.append((path.lstat().st_mtime, path.parent))
    return [RunDirectory(folder) for _, folder in sorted(found)]


@dataclass(frozen=True, repr=False)
class RunSummary(ResultRepr):
    """One line of `solotune runs`; what a run has not reached is None."""

    name: str
    path: Path
    status: str  # finished, running or unfinished
    steps: int
    total_steps: int | None
    train_loss: float | None
    base_loss: float | None
    tuned_loss: float | None
    exact_match: float | None
    tokens_per_second: float | None
    peak_bytes: int | None

    def figures(self) -> dict[str, object]:
        return {
            "name": self.name,
            "status": self.status,
            "steps": f"{self.steps:,}" if self.total_steps is None else f"{self.steps:,}/{self.total_steps:,}",
            "base_loss": self.base_loss,
            "tuned_loss": self.tuned_loss,
            "exact_match": self.exact_match,
        }

    @property
    def history(self) -> DataFrame:
        """The run's steps and evaluations as a pandas DataFrame: see `history_of`."""
        return history_of(RunRecord.read(self.path))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def summarize_run(run: RunDirectory) -> RunSummary:
    """Summarize a run from its files; a damaged run has fewer figures."""
    record = RunRecord.read(run.path)
    last = record.steps[-1] if record.steps else None
    return RunSummary(
        name=run.path.name,
        path=run.path,
        status="finished" if record.is_finished else "running" if run.is_locked() else "unfinished",
        steps=record.last_step,
        total_steps=record.total_steps,
        train_loss=last.loss if last and math.isfinite(last.loss) else None,
        base_loss=number_in(record.evaluation, "base", "loss"),
        tuned_loss=number_in(record.evaluation, "tuned", "loss"),
        exact_match=number_in(record.evaluation, "scores", "exact_match", "tuned"),
        tokens_per_second=record.medians()["tokens_per_second"],
        peak_bytes=record.peak_bytes,
    )
