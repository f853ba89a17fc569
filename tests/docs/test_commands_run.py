"""Every command, config and program of README and the documentation runs.

Each page is worked through from top to bottom in a folder like its reader's: files that the page shows are written,
commands are given to the command line in this process, Python is executed. Small random models stand under the names of
the hub, so what is tested is that everything is accepted and runs, not what it answers.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest

from solotune import cli
from solotune.config.load import load_config
from solotune.diagnosis import run_diagnosis
from solotune.report_page.live import LiveServer
from tests.docs.pages import PAGES, ROOT, Block, blocks, commands

main_module = importlib.import_module("solotune.cli.main")  # `cli.main` is the function

NOT_RUN = {
    r"sh scripts/\w+( -n 0 -m gpu)?": "makes .venv, and takes minutes; tests/test_scripts.py checks the scripts",
    r"SOLOTUNE_8B=\S+ sh scripts/test -n 0 -m gpu": "needs a GPU and an 8B model",
    r"python -m venv \.venv": "makes an environment",
    r"\. \.venv/bin/activate": "changes the reader's shell",
    r"solotune train solotune\.yaml report_to=wandb": "needs an extra; tests/trackers/test_libraries_real.py trains with it",
    r"solotune evaluate runs/first --tasks .*": "needs an extra; tests/evaluation/test_standard_tasks_real.py asks tasks",
    r"srun sh .*|export MASTER_ADDR=.*": "needs Slurm",
    r"(srun )?torchrun .*|--[a-z-]+[= ].*": "needs GPUs, or several machines; tests/api/test_ranks.py starts torchrun",
    r"solotune serve .*": "waits for requests; tests/exporters/test_serve_real.py asks a server",
    r"solotune export their_adapter .*": "needs another trainer's adapter; tests/exporters/test_source.py opens one",
    r"pip (install|wheel) .*": "needs a package index; the files and extras that it names are checked",
    r"python -m bench\.\w+.*": "takes minutes, most need a GPU; tests/test_docs.py checks modules and options",
}
"""Commands that are not run here -> why."""
ALSO_3 = ("diagnose", "doctor", "export")
"""Verbs whose verdict is about this machine, or about a random model on three rows: its likeliest tokens are nearly
equally likely, so a rounding changes them."""


def is_listed(command: str) -> bool:
    return any(re.fullmatch(pattern, command) for pattern in NOT_RUN)


def check_pip(command: str, folder: Path) -> None:
    """The files and extras of a pip command exist."""
    words = shlex.split(command)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(re.findall(r"\.\[(\w+)\]", command)) <= extras.keys(), command
    if "-c" in words:
        assert (folder / words[words.index("-c") + 1]).is_file(), command


def begin_anew(words: list[str], folder: Path) -> None:
    """Remove what a command would not replace: who types it has none yet."""
    if words[0] == "init" and "-o" not in words:
        (folder / "solotune.yaml").unlink(missing_ok=True)
    if words[0] == "train" and "--resume" not in words:
        for run_dir in (word.removeprefix("output_dir=") for word in words if word.startswith("output_dir=")):
            shutil.rmtree(folder / run_dir, ignore_errors=True)


def run(command: str, comment: str, folder: Path) -> None:
    """Run a command of a page, or check that it need not be."""
    if " && " in command:
        for part in command.split(" && "):
            run(part, comment, folder)
        return
    if is_listed(command):
        if command.startswith("pip "):
            check_pip(command, folder)
        for script in re.findall(r"scripts/\w+", command):
            assert (folder / script).is_file(), command
        return
    program, *words = shlex.split(command)
    assert program == "solotune", f"no command of solotune, and not in NOT_RUN: {command}"
    said = re.search(r"exit code (\d+)", comment)
    expected = {int(said[1])} if said else {0, 3} if words[0] in ALSO_3 else {0}
    begin_anew(words, folder)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = cli.main(words)
    assert code in expected, f"{command}\nexit code {code}\n{out.getvalue()[-3000:]}"


def work_through(page: Path, folder: Path) -> int:
    """Do what a page says; returns how many blocks were run, loaded or written."""
    names: dict[str, Any] = {"__name__": page.stem}
    done = 0
    for block in blocks(page):
        done += 1
        if block.file:
            (folder / block.file).unlink(missing_ok=True)  # a link to the common one
            (folder / block.file).write_text(block.text, encoding="utf-8")
        if block.language in ("sh", "console"):
            for line, command, comment in commands(block):
                with located(page, line):
                    run(command, comment, folder)
        elif block.language == "python":
            with located(page, block.line), contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block.text, f"{page.name}:{block.line}", "exec"), names)
        elif block.language == "yaml":
            with located(page, block.line):
                load_yaml(block, folder)
        elif not block.file:
            done -= 1
    return done


def load_yaml(block: Block, folder: Path) -> None:
    path = folder / (block.file or "part.yaml")
    if not block.file:
        path.write_text(f"model_name_or_path: m\ndataset: d\n{block.text}", encoding="utf-8")
    load_config(path)


@contextlib.contextmanager
def located(page: Path, line: int):
    try:
        yield
    except BaseException as error:
        error.add_note(f"in {page.relative_to(ROOT)}, line {line}")
        raise


@pytest.fixture
def short_experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experiments of a diagnosis get a second at most."""
    examine = run_diagnosis.examine

    def examine_briefly(facts: Any, deep: bool, budget: float | None, *shown: Any) -> Any:
        return examine(facts, deep, min(budget or 1, 1), *shown)

    monkeypatch.setattr(run_diagnosis, "examine", examine_briefly)


WITH_BLOCKS = [
    page for page in PAGES if any(block.language in ("sh", "console", "python", "yaml") for block in blocks(page))
]


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_says_works(page: Path, at_work, short_experiments, in_this_process, monkeypatch):
    monkeypatch.setattr(main_module, "quieten", lambda: None)  # would silence libraries in the tests that follow
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    monkeypatch.setattr(LiveServer, "wait", lambda server: None)  # Ctrl-C at once
    assert work_through(page, at_work()) > 0


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("solotune trian solotune.yaml", "exit code 2"),
        ("solotune explain F99", "exit code 2"),
        ("solotune explain F17  # exit code 3", "exit code 0"),
        ("rm -rf /", "not in NOT_RUN"),
        ("sh scripts/gone", "scripts/gone"),
        ("pip install .[gone]", "gone"),
    ],
)
def test_a_command_that_does_not_work_is_found(command: str, problem: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("tests.docs.test_commands_run.ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text("[project.optional-dependencies]\ndocs = []\n", encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(f"```sh\n{command}\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match=problem):
        work_through(page, tmp_path)
