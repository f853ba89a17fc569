"""The command: its frozen help, its speed, its exit codes, and the one JSON object of `--json`."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from inline_snapshot import snapshot

import solotune
from solotune import cli, errors
from solotune.cli import commands
from solotune.hardware.doctor import Check, DoctorReport
from tests.messages import error_in

main_module = importlib.import_module("solotune.cli.main")  # `cli.main` is the function
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(solotune.__file__).parents[1]), "COLUMNS": "80"}

HELP = snapshot("""\
Usage: solotune [OPTIONS] VERB ...

  Fine-tune an LLM on one GPU, and see what was learned.

  From nothing to a tuned model:
    solotune doctor                  check this machine
    solotune init MODEL chats.jsonl  write solotune.yaml
    solotune data solotune.yaml      check the loss mask
    solotune plan solotune.yaml      memory and time
    solotune train solotune.yaml     train and compare
    solotune watch runs/RUN          show it elsewhere
    solotune diagnose runs/RUN       find out what is wrong
    solotune report runs/RUN         a page with everything
    solotune chat runs/RUN --base    chat with both models
    solotune export runs/RUN         merge, GGUF, ...
    solotune serve runs/RUN          OpenAI's API, locally

Options:
  --version   Show the version and exit.
  -h, --help  Show this message and exit.

Verbs:
  doctor    Check this machine: driver, CUDA, packages, memory, disk.
  init      Write a config for a MODEL and a DATASET, fitted to both.
  data      Show the training data: rows, split, tokens, loss mask.
  plan      Predict memory and time of a run before it starts.
  train     Train, save the adapter, compare it with the base model.
  watch     Show the progress of a RUN from another terminal.
  evaluate  Compare the model of a RUN with its base on held-out rows.
  diagnose  Find out what is wrong with a run, if anything.
  explain   Explain a fault: symptoms, why it matters, its fix.
  chat      Chat with the model of a RUN.
  report    Write a page that shows a RUN, or compares it with an OTHER.
  export    Export a RUN for other programs, and compare each file with what
            was trained.
  serve     Serve the model of a RUN with OpenAI's API.
  verify    Check that the files of a RUN are unchanged.
  runs      List the runs, oldest first.

Exit codes:
  0    done
  1    a bug of solotune
  2    bad input: config, data or model
  3    a check failed (does not fit, fault found)
  4    the run directory is in use
  5    a file has changed since the run recorded it
  6    loss, gradient or weights are NaN or infinite
  7    the GPU or device failed (for example: out of memory)
  8    a write failed (disk full, read-only, I/O error)
  9    the run hung and was stopped
  129  hung up (SIGHUP); progress is saved
  130  interrupted (Ctrl-C); progress is saved
  137  killed (SIGKILL); also a hung run that cannot exit with 9
  143  terminated (SIGTERM); progress is saved
""")


def run(*arguments: str, code: str = "", **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "solotune"]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=False, **options
    )


quieten = main_module.quieten


def raising(error: BaseException):
    def verb(*_: object, **__: object):
        raise error

    return verb


# --- help


def test_help_is_frozen():
    done = run("--help")
    assert done.stdout == HELP
    assert (done.returncode, done.stderr) == (0, "")


def test_no_arguments_show_the_help(capsys):
    assert cli.main([]) == 0
    assert capsys.readouterr().out == HELP


def test_help_answers_in_half_a_second():
    def seconds() -> float:  # of the processor: another test may have the other half of it
        before = os.times()
        run("--help")
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 0.5


def test_importing_the_package_and_building_help_loads_nothing_heavy():
    code = """
import sys, solotune, solotune.cli
try: solotune.cli.main(["--help"])
except SystemExit: pass
heavy = {"torch", "transformers", "datasets", "bitsandbytes", "pydantic", "ruamel", "rich", "numpy"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = run(code=code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", list(commands.solotune.commands))
def test_each_verb_teaches_with_one_example(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.count("Example:") == 1
    assert f"\n    solotune {verb}" in text
    assert max(map(len, text.splitlines())) <= 80
    assert hasattr(solotune, verb)


def test_public_names_are_exact_and_lazy():
    assert sorted(solotune.__all__) == sorted({*commands.solotune.commands, "RunConfig", "load_config", "__version__"})
    assert all(hasattr(solotune, name) for name in solotune.__all__)
    assert set(solotune.__all__) <= set(dir(solotune))
    with pytest.raises(AttributeError, match="module 'solotune' has no attribute 'trian'"):
        solotune.trian  # noqa: B018


def test_version_is_that_of_pyproject(capsys):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert solotune.__version__ == project["version"]
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"solotune {project['version']}\n"


# --- mistakes on the command line


def test_misspelt_verb_is_exit_2_with_a_suggestion(capsys):
    assert cli.main(["trian", "a.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert error_in(err) == snapshot("""\
No such command 'trian'. Did you mean 'train'?
Usage: solotune [OPTIONS] VERB ...\
""")


def test_missing_argument_says_how_it_is_used(capsys):
    assert cli.main(["train"]) == 2
    assert error_in(capsys.readouterr().err) == snapshot("""\
Missing argument 'CONFIG'.
Usage: solotune train [OPTIONS] CONFIG [KEY=VALUE]...\
""")


def test_missing_config(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", str(tmp_path / "none.yaml")]) == 2
    assert error_in(capsys.readouterr().err) == snapshot("""\
<tmp>/none.yaml: no such config file
  seen:    looked in <tmp>
  change:  create one with: solotune init MODEL DATA\
""")


def test_unknown_key_as_json_is_one_object_on_stdout(capsys, tmp_path):
    (tmp_path / "a.yaml").write_text("model_name_or_path: m\ndataset: d\nlora_rank: 8\n")
    assert cli.main(["train", str(tmp_path / "a.yaml"), "--json"]) == 2
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert error.keys() == {"exit_code", "meaning", "problem", "seen", "allowed", "change"}
    assert error["exit_code"] == 2
    assert error["problem"] == snapshot(
        "a.yaml line 3, lora_rank: unknown key; did you mean lora_r? (Rank of the LoRA update.)"
    )
    assert error_in(err).startswith(error["problem"])


@pytest.mark.parametrize("arguments", [["trian", "--json"], ["data", "--json"], ["data", "x", "--shwo", "--json"]])
def test_usage_mistakes_are_json_too(arguments, capsys):
    assert cli.main(arguments) == 2
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2


# --- exit codes

KINDS = [
    errors.InputError,
    errors.CheckError,
    errors.DirectoryInUseError,
    errors.IntegrityError,
    errors.NonFiniteError,
    errors.DeviceError,
    errors.StorageError,
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_its_exit_code_and_no_traceback(kind, verbs, capsys):
    verbs.runs = raising(kind("the place: the problem", seen="5", change="do this"))
    assert cli.main(["runs"]) == kind.exit_code
    assert capsys.readouterr().err == snapshot("""\
error: the place: the problem
  seen:    5
  change:  do this
""")


def test_the_tree_in_the_docs_of_errors_is_the_one_that_there_is():
    named = dict(re.findall(r"[├└]── (\w+) +(128 \+ signal|\d+)", errors.__doc__ or ""))
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.SolotuneError)
    ]
    there = {kind.__name__: str(kind.exit_code) for kind in kinds if kind is not errors.SolotuneError}
    assert named == {**there, "InterruptedRunError": "128 + signal"}


def test_ctrl_c_is_130_with_a_line(verbs, capsys):
    verbs.runs = raising(KeyboardInterrupt())
    assert cli.main(["runs"]) == 130
    assert capsys.readouterr().err == snapshot("Interrupted.\n")


def test_an_interrupted_run_keeps_its_signal(verbs, capsys):
    verbs.runs = raising(errors.InterruptedRunError(15, "stopped after step 3; checkpoint saved", "runs/a"))
    assert cli.main(["runs", "--json"]) == 143
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 143


def test_an_interruption_is_not_printed_as_an_error(verbs, capsys):
    verbs.runs = raising(errors.InterruptedRunError(2, "stopped after step 3; checkpoint saved", "continue with: x"))
    assert cli.main(["runs"]) == 130
    assert capsys.readouterr().err == snapshot("Stopped after step 3; checkpoint saved. Continue with: x\n")


def test_a_bug_names_the_file_with_its_traceback(verbs, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    verbs.runs = raising(ZeroDivisionError("oops \x1b[31m"))
    assert cli.main(["runs"]) == 1
    (log,) = tmp_path.glob("solotune-crash-*.log")
    assert error_in(capsys.readouterr().err.replace(log.name, "<log>")) == snapshot("""\
this is a bug of solotune: ZeroDivisionError: oops ␛[31m
  log:     <tmp>/<log>\
""")
    assert "Traceback (most recent call last)" in log.read_text()


@pytest.mark.parametrize("known_by", ["argument", "note"])
def test_a_bug_in_a_run_goes_to_the_runs_own_log(known_by, verbs, capsys, tmp_path):
    (tmp_path / "config.yaml").touch()
    error = ZeroDivisionError("oops")
    if known_by == "note":
        error.add_note(errors.RunNote(tmp_path))
    verbs.runs = verbs.evaluate = raising(error)
    arguments = ["evaluate", str(tmp_path)] if known_by == "argument" else ["runs"]
    assert cli.main(arguments) == 1
    assert str(tmp_path / "log.txt") in capsys.readouterr().err
    assert "ZeroDivisionError: oops" in (tmp_path / "log.txt").read_text()


def test_failed_check_of_doctor_is_exit_3(verbs, capsys):
    machine = SimpleNamespace(to_json=dict)
    for status, code in (("warn", 0), ("fail", 3)):
        verbs.doctor = lambda status=status: DoctorReport(machine, [Check("gpu", status, "none", "buy one")])  # type: ignore[arg-type]
        assert cli.main(["doctor", "--json"]) == code
        assert json.loads(capsys.readouterr().out)["ok"] == (code == 0)


def test_a_reader_that_leaves_is_no_traceback():
    code = "import sys; from solotune import cli\nfrom solotune.api import runs\n"
    code += "runs.runs = lambda root: [Run() for _ in range(9999)]\n"
    code += "class Run:\n def to_json(self): return {'name': 'x' * 99}\n"
    code += "sys.exit(cli.main(['runs', '--json']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == errors.StorageError.exit_code


# --- JSON alone on stdout


def test_whatever_a_library_prints_goes_to_stderr():
    code = """
import os, sys
from solotune import cli
from solotune.api import runs
def noisy(root):
    print("python"); os.write(1, b"native\\n"); os.system("echo child")
    return []
runs.runs = noisy
sys.exit(cli.main(["runs", "--json"]))
"""
    done = run(code=code)
    assert json.loads(done.stdout) == {"runs": []}
    assert {"python", "native", "child"} <= set(done.stderr.split())


@pytest.mark.parametrize(("verdict", "code"), [("better", 0), ("inside the noise", 3), ("worse", 3)])
def test_gate_passes_only_a_better_model(verbs, capsys, verdict: str, code: int):
    verbs.evaluate = lambda run, display, overrides, **_: SimpleNamespace(to_json=dict, verdict=verdict)
    assert cli.main(["evaluate", "runs/a", "--json", "--gate"]) == code
    assert cli.main(["evaluate", "runs/a", "--json"]) == 0
    capsys.readouterr()


def test_what_json_cannot_say_is_null(verbs, capsys):
    verbs.evaluate = lambda run, display, overrides, **_: SimpleNamespace(
        to_json=lambda: {"base": {"stderr": float("inf"), "path": Path("a")}}
    )
    assert cli.main(["evaluate", "runs/a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"base": {"stderr": None, "path": "a"}}


def test_memory_that_even_python_lacks_is_no_bug(verbs, monkeypatch, capsys):
    """Under `ulimit -v` it may find no memory for its own MemoryError."""
    verbs.runs = raising(SystemError("<function f> returned NULL without setting an exception"))
    for limit, code in ((700 << 20, 3), (main_module.resource.RLIM_INFINITY, 1)):
        monkeypatch.setattr(main_module.resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert cli.main(["runs"]) == code
        assert ("ulimit -v" in capsys.readouterr().err) == (code == 3)


def test_libraries_are_silent_and_the_users_wish_counts(monkeypatch):
    bars = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    for name in (*bars, "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
        monkeypatch.setenv(name, "x")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    quieten()
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1"
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"


# --- what each verb passes on


def test_train_passes_config_overrides_and_resume(verbs, capsys, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model_name_or_path: m\ndataset: d\n")
    seen = {}

    def train(config, resume, display):
        seen.update(rate=config.learning_rate, resume=resume, every=display.logging_steps)
        display.phase("loading model")
        return SimpleNamespace(run_dir=Path("runs/a"), evaluation=None, to_json=lambda: {"run": "runs/a"})

    verbs.train = train
    assert cli.main(["train", str(path), "learning_rate=3e-5", "logging_steps=7", "--resume", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"run": "runs/a"}
    assert err == snapshot("""\
loading libraries ...
loading model ...
""")
    assert seen == {"rate": 3e-5, "resume": True, "every": 7}
    assert cli.main(["train", str(path)]) == 0
    assert capsys.readouterr().out == snapshot("""\
loading libraries ...
loading model ...

run      runs/a
adapter  runs/a/adapter (loads with PEFT)
next     solotune chat runs/a --base
export   solotune export runs/a
""")
    (tmp_path / "report.html").touch()
    verbs.train = lambda *_, **__: SimpleNamespace(run_dir=tmp_path, evaluation=None)
    assert cli.main(["train", str(path)]) == 0
    assert f"\nreport   {tmp_path}/report.html (open it in a browser)\n" in capsys.readouterr().out
