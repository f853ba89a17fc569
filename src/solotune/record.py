"""The run directory: the files in which the stages of a run meet.

    runs/<name>/  config.yaml  environment.json  data.json  metrics.jsonl  checkpoints/step-000050/
                  adapter/  evaluation.json  diagnosis.json  log.txt

Every file is written whole or not at all (temporary sibling, fsync, rename, fsync of the folder), so whoever reads the
directory, during the run, after a crash or on another machine, sees only finished files. `metrics.jsonl` alone grows:
one JSON object a line, and a torn last line is passed over. A lock that the kernel drops with its owner keeps a second
process out.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from solotune.config import RunConfig, to_yaml
from solotune.errors import DirectoryInUseError, InputError, StorageError

LOCK = ".lock"
MARKS = ("config.yaml", "metrics.jsonl", "adapter", "checkpoints")  # any of these: the directory holds a run


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns an operating system's refusal to write into an error that names the path."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: cannot be written", seen=error.strerror or str(error)) from error


def write_whole(path: Path, content: bytes | str | Iterator[str]) -> None:
    """Writes a file so that it exists complete or not at all, also across a power loss.

    Args:
        content: an iterator gives a text in pieces, which need not all be in memory.

    Raises:
        StorageError: disk full, read-only, quota.
    """
    pieces = [content] if isinstance(content, (bytes, str)) else content
    temporary = path.with_name(f".{path.name}.partial")
    with storage_errors(path):
        try:
            with open(temporary, "wb") as file:
                for piece in pieces:
                    file.write(piece.encode() if isinstance(piece, str) else piece)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes a folder's entries durable: a rename is only on disk once its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that appears under `target` only when the block ends well; an old `target` is replaced."""
    partial = target.with_name(f".{target.name}.partial")
    with storage_errors(target):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            sync_folder(partial)
            if target.exists():
                shutil.rmtree(target)
            os.replace(partial, target)
            sync_folder(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def read_json(path: Path) -> Any:
    """A JSON file of a run.

    Raises:
        InputError: it is absent or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", allowed="a file that `solotune train` wrote") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON", seen=str(error)) from None


class RunDirectory:
    """One run's folder. Use `create` to start a run and `open` to read one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    @classmethod
    def create(cls, config: RunConfig, resume: bool = False) -> RunDirectory:
        """Makes (or, to resume, takes over) the directory and locks it.

        Raises:
            DirectoryInUseError: another process holds it, or it already holds a run and this is no resume.
        """
        if not resume:
            cls.refuse_occupied(config)
        run = cls(Path(os.path.expanduser(config.output_dir)) if config.output_dir else _fresh_path(config))
        with storage_errors(run.path):
            run.path.mkdir(parents=True, exist_ok=True)
        run._take_lock()
        return run

    @staticmethod
    def refuse_occupied(config: RunConfig) -> None:
        """Raises:
        InputError: `output_dir` is a file.
        DirectoryInUseError: it already holds a run.
        """
        path = Path(os.path.expanduser(config.output_dir or "."))
        if path.is_file():
            raise InputError(f"output_dir: {path} is a file", allowed="a folder, existing or not")
        held = [mark for mark in MARKS if config.output_dir and (path / mark).exists()]
        if held:
            raise DirectoryInUseError(
                f"{path} already holds a run",
                seen=", ".join(held),
                change="--resume to continue it, another output_dir to start afresh, or remove the folder",
            )

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """An existing run, for reading.

        Raises:
            InputError: no such folder, or one without a run in it.
        """
        run = cls(Path(os.path.expanduser(path)))
        if not run.path.is_dir():
            known = ", ".join(str(other.path) for other in list_runs()[-3:])
            raise InputError(
                f"{path}: no such run", allowed="a run directory", change=f"latest: {known}" if known else None
            )
        if not (run.path / "config.yaml").is_file():
            raise InputError(
                f"{path}: not a run directory", seen="no config.yaml in it", allowed="a folder of `solotune train`"
            )
        return run

    def _take_lock(self) -> None:
        self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._lock, 32).decode(errors="replace").strip()
            os.close(self._lock)
            raise DirectoryInUseError(
                f"{self.path} is being written by another process",
                seen=f"process {owner}" if owner else None,
                change="wait for it, or choose another output_dir",
            ) from None
        os.ftruncate(self._lock, 0)
        os.write(self._lock, f"{os.getpid()}\n".encode())

    def is_locked(self) -> bool:
        """Whether a live process is writing this run."""
        try:
            handle = os.open(self.path / LOCK, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        finally:
            os.close(handle)

    def release(self) -> None:
        """Lets go of the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write_config(self, config: RunConfig) -> None:
        write_whole(self.path / "config.yaml", to_yaml(config))

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """`name` is a file name such as `evaluation.json`."""
        write_whole(self.path / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def log_metrics(self, event: str, **values: Any) -> None:
        """Appends one line to metrics.jsonl: {"event": ..., ...}."""
        line = json.dumps({"event": event, **values}, ensure_ascii=False) + "\n"
        with (
            storage_errors(self.path / "metrics.jsonl"),
            open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file,
        ):
            file.write(line)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines of metrics.jsonl; none where there is no such file."""
        path = self.path / "metrics.jsonl"
        events = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            with contextlib.suppress(json.JSONDecodeError):
                events.append(json.loads(line))
        return events

    def forget_after(self, step: int) -> None:
        """Cuts metrics.jsonl back to what happened up to `step`, before a run is resumed from there."""
        kept = [event for event in self.read_metrics() if event.get("step", 0) <= step]
        write_whole(
            self.path / "metrics.jsonl", "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in kept)
        )

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


def _fresh_path(config: RunConfig) -> Path:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = Path("runs") / f"{config.name}-{stamp}"
    return path if not path.exists() else path.with_name(f"{path.name}-{os.getpid()}")


def nearest_folder(path: str | Path) -> Path:
    """The folder that exists already, of `path` and those above it."""
    path = Path(os.path.expanduser(path)).absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def list_runs(root: str | Path = "runs") -> list[RunDirectory]:
    """The runs below a folder, oldest first."""
    found = [RunDirectory(path.parent) for path in Path(root).glob("*/config.yaml")]
    return sorted(found, key=lambda run: (run.path / "config.yaml").stat().st_mtime)


def latest_run_of(config: RunConfig) -> RunDirectory | None:
    """The newest run in `runs/` that was made from a config of this name."""
    named = [run for run in list_runs() if run.path.name.startswith(f"{config.name}-")]
    return named[-1] if named else None


@dataclass(frozen=True)
class RunSummary:
    """One line of `solotune runs`; what a run has not got to is None."""

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

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def summarised(run: RunDirectory) -> RunSummary:
    """What a run has come to, from its files."""
    events = run.read_metrics()
    steps = [event for event in events if event.get("event") == "step"]
    path = run.path / "evaluation.json"
    found = read_json(path) if path.is_file() else {}
    finished = any(event.get("event") == "end" for event in events)
    return RunSummary(
        name=run.path.name,
        path=run.path,
        status="finished" if finished else "running" if run.is_locked() else "unfinished",
        steps=steps[-1]["step"] if steps else 0,
        total_steps=steps[-1]["total_steps"] if steps else None,
        train_loss=steps[-1]["loss"] if steps else None,
        base_loss=found["base"]["loss"] if found else None,
        tuned_loss=found["tuned"]["loss"] if found else None,
        exact_match=found["scores"]["exact_match"]["tuned"] if found else None,
        tokens_per_second=usual_step(events)["tokens_per_second"],
        peak_bytes=max((step["peak_bytes"] for step in steps), default=None),
    )


def usual_step(events: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """The medians over the steps of a run; None before its first."""
    steps = [event for event in events if event.get("event") == "step"]
    return {key: _middle([step[key] for step in steps if key in step]) for key in ("step_seconds", "tokens_per_second")}


def _middle(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
