"""Each verb shows a sign of life before it loads anything that takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from solotune.errors import program
from tests.cli.test_commands import run

# each verb ends at its first slow import; prints arguments -> [exit code or "slow import", stdout, stderr]
UP_TO_SLOW_IMPORTS = """
import contextlib, io, json, sys
class SlowImport(BaseException): pass
class Finder:
    def find_spec(self, name, *_):
        if name in ("torch", "transformers", "datasets", "bitsandbytes", "huggingface_hub"):
            raise SlowImport
sys.meta_path.insert(0, Finder())
import solotune.cli
found = {}
for line in sys.argv[1:]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = solotune.cli.main(line.split())
        except SlowImport:
            code = "slow import"
    found[line] = [code, out.getvalue(), err.getvalue()]
print(json.dumps(found))
"""
CONFIG = "model_name_or_path: m\ndataset: d.jsonl\n"
LOADING = "loading libraries ...\n"


def up_to_slow_imports(*lines: str, folder) -> dict[str, list]:
    done = run(*lines, code=UP_TO_SLOW_IMPORTS, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_first_line_comes_before_the_slow_imports(tmp_path):
    (tmp_path / "a.yaml").write_text(CONFIG)
    first = {
        **{"doctor": "checking this machine ...\n", "verify runs/a": "checking the run's files ...\n"},
        **dict.fromkeys(("init m d.jsonl", "data a.yaml", "plan a.yaml", "train a.yaml"), LOADING),
        **dict.fromkeys(("evaluate runs/a", "diagnose a.yaml"), LOADING),
    }
    found = up_to_slow_imports(*first, "chat runs/a", folder=tmp_path)
    assert found.pop("chat runs/a") == ["slow import", "", LOADING]  # stdout has only answers
    for line, text in first.items():
        code, out, err = found[line]
        assert (code, err) == ("slow import", "") and out.startswith(text), line


def test_explanations_and_lists_and_mistakes_in_a_config_need_no_slow_import(tmp_path):
    (tmp_path / "a.yaml").write_text(CONFIG + "lora_rank: 8\n")
    quick = ("explain", "explain F17", "explain S4", "runs")
    found = up_to_slow_imports(*quick, "data a.yaml", "plan a.yaml", "train a.yaml", folder=tmp_path)
    assert {line: found[line][0] for line in quick} == dict.fromkeys(quick, 0)
    assert all(found[line][1] for line in quick)
    for line in found.keys() - set(quick):
        assert found[line][0] == 2 and "did you mean lora_r?" in found[line][2]


def test_the_first_line_takes_less_than_a_second(tmp_path):
    def seconds() -> float:  # of the processor
        before = os.times()
        up_to_slow_imports("train a.yaml", folder=tmp_path)  # no such config: nothing but the first line
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert any(seconds() < 1.0 for _ in range(3))


def test_the_command_that_is_printed_works_when_it_is_pasted(tmp_path, monkeypatch):
    bin_folder = tmp_path / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(bin_folder / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program() == f"{bin_folder}/python -m solotune"  # no such command was installed
    (bin_folder / "solotune").touch(0o755)
    assert program() == f"{bin_folder}/solotune"
    monkeypatch.chdir(tmp_path)
    assert program() == ".venv/bin/solotune"
    monkeypatch.setenv("PATH", str(bin_folder))  # the environment is active
    assert program() == "solotune"


def test_threads_of_the_command_sleep_while_they_wait(tmp_path):
    """Threads that spin while they wait take the time of all others on a busy machine."""
    code = "import os, sys; from solotune.cli import main; main(); print(os.environ['OMP_WAIT_POLICY'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for given, wanted in ({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"):
        done = subprocess.run(
            [sys.executable, "-c", code, "runs", "--root", str(tmp_path)],
            env={**environment, **given}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.splitlines()[-1] == wanted
