"""`solotune report`: one page that says what happened in a run, or how two runs differ."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solotune.display.observer import RunObserver
from solotune.errors import InputError, StorageError
from solotune.regular_files import open_regular
from solotune.result_repr import ResultRepr
from solotune.run import atomic_io
from solotune.run.run_dir import REPORT, RunDirectory
from solotune.units import first_line

OURS = b'content="solotune '  # in the head of every page: its generator
HEAD_BYTES = 4096


@dataclass(frozen=True, repr=False)
class Report(ResultRepr):
    """Result of `report`: the page that was written."""

    path: Path
    bytes: int
    runs: list[Path]

    @property
    def size(self) -> str:
        """The size of the page: `136 kB`."""
        return f"{self.bytes / 1000:,.0f} kB"

    def figures(self) -> dict[str, object]:
        names = ", ".join(run.name for run in self.runs)
        return {"path": self.path, "size": self.size, "runs": names}

    def to_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "bytes": self.bytes, "runs": [str(run) for run in self.runs]}


def report(run: str | Path, other: str | Path | None = None, *, out: str | Path | None = None) -> Report:
    """Write the page of a run, or one that compares two runs: a single file that needs no network.

        print(solotune.report("runs/demo").path)
        solotune.report("runs/demo", "runs/first", out="compared.html")

    Any run has a page, also one that runs, crashed or was written by another version: it says what is missing.

    Args:
        run: a run directory, the name of one below runs/, or `latest`.
        other: a second run, to compare with.
        out: the file to write; default: report.html in the run, of two runs report-RUN-OTHER.html in this folder.

    Raises:
        InputError: there is no run, or `out` is a folder or a file that is no report.
        StorageError: the page cannot be written.
    """
    opened = [RunDirectory.open(path) for path in (run, other) if path is not None]
    path = _destination(opened, out)
    from solotune.report_page.build import build_comparison, build_page

    paths = [one.path for one in opened]
    html = build_page(paths[0]) if other is None else build_comparison(*paths)
    atomic_io.write_whole(path, html)
    if path == opened[0].path / REPORT:
        opened[0].update_manifest(REPORT)
    return Report(path, len(html.encode()), paths)


def keep_result(run: RunDirectory, name: str, content: Mapping[str, Any], display: RunObserver) -> None:
    """Save a result in a run, and write the page that shows it again. A run that may only be read stays as it is, and a
    note says so: the caller has the result.

    Raises:
        StorageError: the disk is full, say.
    """
    try:
        run.write_json(name, content)
        run.update_manifest(name)
    except StorageError as error:
        if not _is_read_only(error):
            raise
        display.note(f"{name} and {REPORT} stay as they were: {error.problem}: {error.seen}")
        return
    rewrite_page(run, display)


def rewrite_page(run: RunDirectory, display: RunObserver, is_over: bool = False) -> None:
    """Write the page of a run after its files have changed, unless a process that trains it will write it at its end.

    The run is complete without it, so a page that cannot be made is a note.

    Args:
        is_over: this process has trained the run, and still holds its lock.

    Raises:
        StorageError: the disk is full, say.
    """
    if not is_over and run.is_locked():
        return
    from solotune.report_page.build import build_page

    try:
        html = build_page(run.path)
    except Exception as error:
        display.note(f"{REPORT} was not written: {first_line(error, with_type=True)}; all other results are saved")
        return
    try:
        atomic_io.write_whole(run.path / REPORT, html)
        run.update_manifest(REPORT)
    except StorageError as error:
        if not _is_read_only(error):
            raise
        display.note(f"{REPORT} stays as it was: {error.problem}: {error.seen}")
        return
    display.note(f"report: {run.path / REPORT}")


def _is_read_only(error: StorageError) -> bool:
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.EROFS, errno.EACCES, errno.EPERM)


def _destination(runs: list[RunDirectory], out: str | Path | None) -> Path:
    """The file to write."""
    if out is None and len(runs) == 1:
        return runs[0].path / REPORT
    names = "-".join(run.path.resolve().name for run in runs)
    path = Path(os.path.expanduser(out)) if out is not None else Path(f"report-{names}.html")
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "its folder does not exist"
        raise InputError(f"--out: {path}: {what}", allowed="a file in a folder that exists")
    if path.exists() and not _is_report(path):
        raise InputError(f"--out: {path} exists and is not a report of solotune", change="choose another file")
    return path


def _is_report(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return OURS in file.read(HEAD_BYTES)
    except OSError:
        return False
