"""`solotune report`, as verb and as command: where the page goes, what is never overwritten, and what a manifest says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import solotune
from solotune import cli
from solotune.errors import InputError, StorageError
from solotune.run.manifest import entry_at, read_manifest
from solotune.run.run_dir import RunDirectory
from tests.messages import error_in
from tests.report_page.run_files import write_run


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
