"""`evaluate` and the keys that it reads: scores of answers in train and evaluate, and whose Python file is run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import solotune
from solotune import cli
from solotune.api.evaluate import python_metrics_of_a_file
from solotune.config.load import load_config
from solotune.config.write import to_yaml
from solotune.display.progress import SilentDisplay
from solotune.errors import InputError, program
from solotune.evaluation import standard_tasks
from solotune.evaluation.standard_tasks import TaskRequest
from solotune.evaluation.task_scores import TaskScore, score_tasks
from tests.evaluation.task_files import logged
from tests.messages import stable

OWN = """import pathlib
pathlib.Path("was-run").touch()
def length(answer, reference):
    return min(1.0, len(answer) / len(reference))
"""


class Notes(SilentDisplay):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def config(chat_config, tmp_path: Path):
    (tmp_path / "own.py").write_text(OWN)
    return {**chat_config, "metrics": [{"regex": r"it is (\d+)"}, {"python": "own.py:length"}], "metrics_rows": 8}


ASKED: list[tuple[TaskRequest, dict[str, Any]]] = []


def run_tasks(asked: TaskRequest, model: Any, tokenizer: Any, **settings: Any) -> list[TaskScore]:
    """Scores of the record: lm_eval is not in this environment."""
    ASKED[:] = [(asked, settings)]
    return score_tasks(*logged())


def test_scores_of_answers_and_whose_file_is_run(
    config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = solotune.train(config).evaluation.to_json()
    assert set(trained["scores"]) == {"exact_match", "regex", "length"}
    assert {name: score["rows"] for name, score in trained["scores"].items()} == {
        "exact_match": 10,
        "regex": 8,
        "length": 8,
    }
    assert 0 < trained["scores"]["length"]["tuned"] <= 1
    assert trained["generation"]["rows"] >= 8 and trained["generation"]["training_rows"] == 50
    assert json.loads((tmp_path / "run/evaluation.json").read_text()) == json.loads(json.dumps(trained))

    (tmp_path / "was-run").unlink()
    display = Notes()
    again = solotune.evaluate("run", display).to_json()
    assert not (tmp_path / "was-run").exists()  # only the run's config names the file
    assert set(again["scores"]) == {"exact_match", "regex"}
    del trained["scores"]["length"]
    assert again == trained
    (tmp_path / "run/report.html").unlink()
    note = next(note for note in display.notes if "To measure them: " in note)
    hint = note.partition("To measure them: ")[2].removeprefix(program())
    monkeypatch.setattr(standard_tasks, "load_tasks", lambda asked: asked)
    monkeypatch.setattr(standard_tasks, "run_tasks", run_tasks)
    tasks = ["--tasks", "answer,kind", "--include_path", str(tmp_path), "--limit", "9", "--num_fewshot", "2"]
    assert cli.main([*shlex.split(hint), "num_samples=1", "--json", *tasks]) == 0
    assert "length" in (tmp_path / "run/report.html").read_text()
    assert (tmp_path / "was-run").exists()
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert set(printed["scores"]) == {"exact_match", "regex", "length"} and len(printed["samples"]) == 1
    assert printed["tasks"][-1]["difference"] == pytest.approx(0.1702, abs=1e-4)  # bits_per_byte
    assert printed["tasks"] == json.loads((tmp_path / "run/evaluation.json").read_text())["tasks"]
    assert "--apply-chat-template asks them through the chat template" in captured.err
    ((asked, settings),) = ASKED
    assert asked == TaskRequest(["answer", "kind"], str(tmp_path), 9, 2)
    assert settings["batch_size"] == 8 and settings["system_prompt"] is None and settings["stops"]
    with pytest.raises(InputError) as caught:
        solotune.evaluate("run", overrides=["seed=3"])
    assert stable(caught.value) == (
        "evaluate: seed cannot be changed after the run\n"
        "  seen:    3\n"
        "  allowed: metrics, metrics_rows, num_samples, max_new_tokens, per_device_eval_batch_size"
    )


def test_a_config_file_that_names_code_does_not_run_it(config, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(to_yaml(load_config(config)))
    with pytest.raises(InputError) as caught:
        solotune.train("run.yaml")
    assert re.sub(r"line \d+", "line N", stable(caught.value)) == (
        "run.yaml line N, metrics: python: own.py:length: code that only a config file names is not run\n"
        "  change:  name it on the command line: 'metrics=[regex: it is (\\d+), python: own.py:length]'"
    )
    assert not (tmp_path / "was-run").exists()
    (given,) = shlex.split(caught.value.change.partition("command line: ")[2])
    checked = load_config("run.yaml", [given])
    assert python_metrics_of_a_file(checked) is None and checked.metrics == config["metrics"]


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"validation_size": 0}, "metrics: there are no held-out rows to measure on"),
        ({"metrics": ["json"]}, "metrics, json: none of 8 held-out rows has such a reference"),
        ({"metrics": [{"python": "gone.py:score"}]}, "metrics, python: gone.py:score: no such file"),
    ],
)
def test_a_metric_that_cannot_be_used_stops_a_run_before_it_begins(config, tmp_path: Path, keys, problem: str) -> None:
    with pytest.raises(InputError) as caught:
        solotune.train(config, **keys)
    assert caught.value.problem == problem
    assert not (tmp_path / "run").exists()
