"""`solotune report`, as verb and as command: where the page goes, what is never overwritten, and what a manifest says."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

import solotune
from solotune import cli
from solotune.api.report import keep_result, rewrite_page
from solotune.display.progress import SilentDisplay
from solotune.errors import InputError, StorageError
from solotune.report_page import build
from solotune.report_page.verdict_section import HEADLINES
from solotune.run import atomic_io, fs_ops
from solotune.run.manifest import entry_at, read_manifest
from solotune.run.run_dir import LOCK, REPORT, RunDirectory
from tests.messages import error_in
from tests.report_page.run_files import EVALUATION, write_run


def test_the_page_of_a_run_lies_in_it_and_is_in_its_manifest(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    RunDirectory.open(run).write_manifest()
    written = solotune.report(run)
    assert written.path == run / "report.html" and written.bytes == written.path.stat().st_size > 100_000
    assert read_manifest(run / "manifest.json")["report.html"] == entry_at(written.path)
    assert solotune.report(run).path == written.path  # again, as after evaluate
    assert dict(written.figures()) == {"path": written.path, "size": f"{written.bytes / 1000:.0f} kB", "runs": "run"}


def test_a_run_that_crashed_has_no_manifest_and_gets_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    solotune.report(run)
    assert not (run / "manifest.json").exists()


def test_two_runs_are_compared_in_a_file_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    assert solotune.report(first, second).path == Path("report-a-b.html")
    assert solotune.report(first, second, out="c.html").path == Path("c.html")
    assert "a against b" in (tmp_path / "c.html").read_text(encoding="utf-8")


def test_only_a_report_is_replaced(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    page = tmp_path / "page.html"
    solotune.report(run, out=page)
    solotune.report(run, out=page)
    page.write_text("<p>mine")
    for out in (page, tmp_path, tmp_path / "no" / "page.html"):
        with pytest.raises(InputError, match="--out"):
            solotune.report(run, out=out)
    assert page.read_text() == "<p>mine"
    with pytest.raises(InputError, match="run not found"):
        solotune.report(tmp_path / "nothing")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    run.chmod(0o500)
    with pytest.raises(StorageError):
        solotune.report(run)


class Notes(SilentDisplay):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


WORSE = {**EVALUATION, "verdict": "worse"}


def test_a_new_result_is_on_the_page_of_the_run(tmp_path: Path) -> None:
    run, display = RunDirectory.open(write_run(tmp_path / "run")), Notes()
    run.write_manifest()
    keep_result(run, "evaluation.json", WORSE, display)
    assert display.notes == [f"report: {run.path / REPORT}"]
    page = (run.path / REPORT).read_text(encoding="utf-8")
    assert HEADLINES["worse"][1] in page and HEADLINES["better"][1] not in page
    entries = read_manifest(run.path / "manifest.json")
    assert all(entries[name] == entry_at(run.path / name) for name in ("evaluation.json", REPORT))


@pytest.mark.parametrize("only", ["", REPORT], ids=["the folder", "the page"])
def test_what_may_only_be_read_stays_and_a_full_disk_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: str
) -> None:
    run, display = RunDirectory.open(write_run(tmp_path / "run")), Notes()
    number, open_file = errno.EROFS, fs_ops.open_file

    def opened(path: Path, flags: int) -> int:
        if only in path.name and flags & os.O_WRONLY:
            raise OSError(number, os.strerror(number))
        return open_file(path, flags)

    monkeypatch.setattr(fs_ops, "open_file", opened)
    before = (run.path / "evaluation.json").read_text()
    keep_result(run, "evaluation.json", WORSE, display)
    (note,) = display.notes
    names = f"{REPORT} stays as it was" if only else f"evaluation.json and {REPORT} stay as they were"
    assert note.startswith(f"{names}: {run.path}/") and note.endswith(": cannot be written: Read-only file system")
    assert ((run.path / "evaluation.json").read_text() == before) == (not only)
    number = errno.ENOSPC
    with pytest.raises(StorageError):
        keep_result(run, "evaluation.json", WORSE, display)


def test_the_page_of_a_run_that_trains_is_left_to_it(tmp_path: Path) -> None:
    display, path = Notes(), write_run(tmp_path / "run")
    lock = atomic_io.take_lock(path / LOCK, "trains")
    assert lock is not None
    rewrite_page(RunDirectory.open(path), display)
    assert not (path / REPORT).exists() and display.notes == []
    rewrite_page(RunDirectory.open(path), display, is_over=True)
    atomic_io.drop_lock(path / LOCK, lock)
    assert (path / REPORT).exists()


def test_a_page_that_cannot_be_made_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build_page", lambda path: {}["sections"])
    rewrite_page(RunDirectory.open(write_run(tmp_path / "run")), display := Notes())
    assert display.notes == ["report.html was not written: KeyError: 'sections'; all other results are saved"]


def test_the_command_prints_the_file_or_one_json_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "a")
    assert cli.main(["report", "a"]) == 0
    size = f"{Path('runs/a/report.html').stat().st_size / 1000:.0f} kB"
    assert capsys.readouterr().out == f"reading the run ...\nruns/a/report.html  ({size})\n"
    assert cli.main(["report", "runs/a", "runs/a", "--out", "two.html", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"path": "two.html", "bytes": Path("two.html").stat().st_size, "runs": ["runs/a", "runs/a"]}
    assert cli.main(["report", "b"]) == 2
    assert "run not found" in error_in(capsys.readouterr().err)
