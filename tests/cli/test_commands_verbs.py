"""The verbs `data`, `chat`, `init`, `runs` and `evaluate` on the command line."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from inline_snapshot import snapshot

import solotune
from solotune import cli
from solotune.api.data import DataPreview
from solotune.dataset import DataReport
from tests.cli.test_commands import run
from tests.messages import error_in, stable

DATA_HELP = snapshot("""\
Usage: solotune data [OPTIONS] CONFIG [KEY=VALUE]...

  Show the training data: rows, split, tokens, loss mask.

  Rows are shown as the model sees them, with its chat template; tokens that
  are trained on are marked. Problems in the data are shown with their fix. If
  one of them is an error, the exit code is 3.

  Example:
    solotune data solotune.yaml --show 3 max_length=1024

Options:
  --show INTEGER RANGE  Number of rows to show.  [default: 1; x>=0]
  --ids                 Show each token of these rows with its id.
  --json                Print one JSON object on stdout and everything else on
                        stderr.
  -h, --help            Show this message and exit.
""")


def test_help_of_data_is_frozen():
    assert run("data", "--help").stdout == DATA_HELP


def test_data_shows_each_token_with_its_id_when_asked(verbs, capsys):
    report = DataReport("text", num_read=1, num_train=1, num_tokens=2, num_supervised=1)
    row = SimpleNamespace(
        where="a.jsonl:1", pieces=[("hi", False, [7]), (" you", True, [12])], tokens=["hi", " you"], weights=[]
    )
    preview = DataPreview(report, [row])  # type: ignore[list-item]
    verbs.data = lambda *_, **__: preview
    assert cli.main(["data", "a.yaml"]) == 0
    assert "hi⟦ you⟧" in capsys.readouterr().out
    assert cli.main(["data", "a.yaml", "--ids"]) == 0
    out = capsys.readouterr().out
    assert " 7 hi" in out and "12 ⟦␣you⟧" in out


def test_data_shows_as_many_rows_as_asked(verbs):
    seen = []
    report = DataReport("text", findings=[])

    def data(config, overrides, show, display):
        seen.append((config, overrides, show))
        return DataPreview(report, [])

    verbs.data = data
    assert cli.main(["data", "a.yaml", "--show", "3", "max_length=64", "--json"]) == 0
    assert seen == [("a.yaml", ("max_length=64",), 3)]
    assert cli.main(["data", "a.yaml", "--show", "-1"]) == 2
    for severity, code in (("warning", 0), ("error", 3)):
        report.findings = [{"severity": severity, "code": "F08"}]
        assert cli.main(["data", "a.yaml", "--json"]) == code


class Session:
    model_name = "m + a"
    prompt_format = "chat"
    system = trained_system = None

    def __init__(self) -> None:
        self.history: list[str] = []

    def reset(self, system=None) -> None:
        self.history = []

    def reply(self, text, base=False, on_text=None) -> str:
        answer = f"{'base' if base else 'tuned'} hears {text!r} after {len(self.history)}"
        if not base:
            self.history.append(text)
        for word in answer.split(" ") if on_text else []:
            on_text(f"{word} ")
        return answer


@pytest.fixture
def piped(verbs, monkeypatch):
    import io

    verbs.chat = lambda run, system, display: Session()
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n/reset\nthree\n"))


@pytest.mark.usefixtures("piped")
def test_chat_answers_each_line_of_a_pipe_base_first(capsys):
    assert cli.main(["chat", "runs/a", "--base"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "base   base hears 'one' after 0 ",
        "tuned  tuned hears 'one' after 0 ",
        "base   base hears 'two' after 1 ",
        "tuned  tuned hears 'two' after 1 ",
        "base   base hears 'three' after 0 ",
        "tuned  tuned hears 'three' after 0 ",
    ]


@pytest.mark.usefixtures("piped")
def test_chat_with_one_prompt_as_json(capsys):
    assert cli.main(["chat", "runs/a", "--prompt", "hi", "--json"]) == 0
    turns = [{"prompt": "hi", "tuned": "tuned hears 'hi' after 0"}]
    assert json.loads(capsys.readouterr().out) == {
        "model": "m + a",
        "prompt_format": "chat",
        "system": None,
        "turns": turns,
    }


def test_chat_with_a_model_trained_on_plain_text(verbs, monkeypatch, capsys):
    import io

    session = Session()
    session.prompt_format = "text"
    verbs.chat = lambda run, system, display: session
    monkeypatch.setattr(sys, "stdin", io.StringIO("word: fig\\ncode:\n"))
    assert cli.main(["chat", "runs/a", "--json"]) == 0
    out, shown = capsys.readouterr()
    assert [turn["prompt"] for turn in json.loads(out)["turns"]] == ["word: fig\ncode:"]  # a line break
    assert "Trained on plain text" in shown
    assert cli.main(["chat", "runs/a", "--json", "--prompt", r"word: fig\ncode:"]) == 0
    assert [turn["prompt"] for turn in json.loads(capsys.readouterr().out)["turns"]] == [r"word: fig\ncode:"]


# --- the real verbs, as far as they need no model


def test_init_writes_a_config_that_loads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "some/model", "chats.jsonl"]) == 2  # no such file
    assert "chats.jsonl: no such file" in capsys.readouterr().err and not (tmp_path / "solotune.yaml").exists()
    (tmp_path / "chats.jsonl").write_text("{}\n")
    capsys.readouterr()
    assert cli.main(["init", "some/model", "chats.jsonl"]) == 0
    assert capsys.readouterr().out == snapshot("""\
loading libraries ...
reading the model's files ...
settings are not fitted to model and data, because the model could not be read: some/model is not in the cache and cannot be downloaded (HF_HUB_OFFLINE=1 is set, so nothing is downloaded)
Wrote solotune.yaml. Next: solotune data solotune.yaml
""")
    config = solotune.load_config("solotune.yaml")
    assert (config.model_name_or_path, config.dataset) == ("some/model", "chats.jsonl")
    assert cli.main(["init", "some/model", "chats.jsonl"]) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.main(["init", "some/model", "chats.jsonl", "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": "solotune.yaml"}


def test_runs_of_an_empty_folder(tmp_path, capsys):
    assert cli.main(["runs", "--root", str(tmp_path)]) == 0
    assert stable(capsys.readouterr().out) == snapshot("No runs in <tmp> yet. Start one with: solotune train CONFIG")
    assert cli.main(["runs", "--root", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": []}


def test_runs_lists_what_is_there(tmp_path, capsys):
    folder = tmp_path / "demo-1"
    folder.mkdir()
    (folder / "config.yaml").touch()
    step = {"event": "step", "step": 3, "total_steps": 9, "loss": 1.5, "tokens_per_second": 10.0, "peak_bytes": 2**30}
    (folder / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    assert cli.main(["runs", "--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-2].split() == [
        "demo-1",
        "unfinished",
        "3/9",
        "1.500",
        "10",
        "1.0",
        "GiB",
    ]


def test_evaluate_of_no_run_is_exit_2(tmp_path, capsys):
    assert cli.main(["evaluate", str(tmp_path / "none")]) == 2
    assert error_in(capsys.readouterr().err) == snapshot("""\
<tmp>/none: run not found
  allowed: a run directory\
""")


def test_a_model_that_is_not_here_is_told_the_same_by_each_verb(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("model_name_or_path: owner/none\ndataset: a.jsonl\nuse_cpu: true\n")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    told = set()
    for verb in ("data", "plan", "train"):
        assert cli.main([verb, "a.yaml"]) == 2
        told.add(error_in(capsys.readouterr().err))
    assert told == snapshot(
        {
            """\
a.yaml line 1, model_name_or_path: owner/none is not in the cache and cannot be downloaded
  seen:    HF_HUB_OFFLINE=1 is set, so nothing is downloaded
  change:  unset HF_HUB_OFFLINE to download it once, or use a local folder\
"""
        }
    )
