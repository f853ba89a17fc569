"""What a result says in one line and in a notebook: short, escaped, readable in any theme."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny import chat_rows

import solotune
from solotune.api.runs import Runs
from solotune.config.load import load_config
from solotune.diagnosis.evidence import Culprit, Diagnosis, Remark
from solotune.evaluation.compare import Evaluation, Sample
from solotune.evaluation.scores import Score
from solotune.hardware.doctor import Check, DoctorReport
from solotune.result_repr import Html, ResultRepr, Table, as_html, escaped
from solotune.run.run_dir import RunSummary
from solotune.training.verify_run import Problem, Verification

HOSTILE = "<script>alert(1)</script> & $x$ \x1b[31m \u202egnp \ud800"
MOST_CHARACTERS = 400


@dataclass(frozen=True, repr=False)
class Sizes(ResultRepr):
    rows: int
    loss: float | None
    path: Path

    def figures(self):
        return {"rows": self.rows, "base_loss": self.loss, "path": self.path}

    def tables(self):
        return [Table("Sizes", ("a", "b"), [(self.rows, True)]), Table("Nothing", ("c",), [])]


class Parsed(HTMLParser):
    """The texts of a piece of HTML, which is well formed."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.texts = [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        assert tag in ("div", "table", "caption", "thead", "tbody", "tr", "th", "td", "b", "u")
        assert "color" not in str(dict(attrs).get("style")), "the notebook's theme has the colours"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_a_result_in_one_line_and_as_tables():
    result = Sizes(1200, 1.23456789, Path("runs/a"))
    assert repr(result) == "Sizes(rows=1200, base_loss=1.235, path='runs/a')"
    assert repr(Sizes(1, None, Path("a" * 80))) == f"Sizes(rows=1, path='{'a' * 57}...')"
    assert Parsed(result._repr_html_()).texts == [
        "rows", "1,200", "base loss", "1.235", "path", "runs/a", "Sizes", "a", "b", "1,200", "yes",
    ]  # fmt: skip


def test_text_of_data_is_text():
    html = as_html([Table(HOSTILE, (HOSTILE,), [(HOSTILE, Html("<b>bold</b>"))])])
    assert "".join(Parsed(html).texts).count("<script>") == 3
    assert not re.search("[\x1b\u202e\ud800]", html)
    assert html.startswith('<div class="tex2jax_ignore'), "a $ is no formula"
    assert escaped("a\nb\tc") == "a\nb\tc"


def _results():
    score = Score(1.25, 0.01, 4000, 0.5, 0.028, 60, (1.0,) * 60, (1.0,) * 60)
    culprit = Culprit("S13", "F67", "rate-too-high", 0.8, [HOSTILE], None, "learning_rate: 2e-4")
    remark = Remark("S8", "F39", "duplicate-rows", HOSTILE, "remove them")
    run = RunSummary("a", Path("runs/a"), "finished", 5, 10, None, 1.5, 1.0, 0.25, 100.0, 1)
    machine = None  # not shown
    return {
        "evaluation": Evaluation(score, score, [Sample("chats.jsonl:1", HOSTILE, "4", "5", "4")]),
        "score": score,
        "diagnosis": Diagnosis("a", "fault", [culprit], [], None, [remark], ["rows"]),
        "doctor": DoctorReport(machine, [Check("GPU", "fail", HOSTILE, "buy one"), Check("disk", "ok", "1 TiB", None)]),
        "verification": Verification(Path("runs/a"), True, 3, 100, 1, [Problem("log.txt", HOSTILE)], ["a note"]),
        "run": run,
        "runs": Runs([run, run]),
        "explanation": solotune.explain("F17"),
        "suspect": solotune.explain("S4"),
        "config": load_config({"model_name_or_path": "m", "dataset": HOSTILE[:20], "lora_r": 8}),
    }


@pytest.mark.parametrize("name", _results())
def test_each_result_is_short_in_a_line_and_whole_in_a_notebook(name):
    result = _results()[name]
    if name != "runs":  # a list says what its elements say
        assert len(repr(result)) < MOST_CHARACTERS and repr(result).startswith(type(result).__name__)
    html = result._repr_html_()
    said = " ".join(Parsed(html).texts)
    expected = {"evaluation": "<script>", "diagnosis": "learning_rate: 2e-4", "doctor": "buy one", "runs": "finished",
                "verification": "log.txt", "explanation": "pad-masks-terminator", "suspect": "F23", "config": "python"}  # fmt: skip
    assert expected.get(name, "") in said


def test_a_config_names_the_keys_that_are_set_and_those_that_were_chosen():
    config = load_config({"model_name_or_path": "m", "dataset": "d"}).replaced("machine", bf16=False)
    assert repr(config) == "RunConfig(model_name_or_path='m', dataset='d', bf16=False)"
    assert "machine" in config._repr_html_() and "lora_r" not in config._repr_html_()


def test_a_list_of_no_runs_says_so(tmp_path):
    assert solotune.runs(tmp_path)._repr_html_() == "No runs yet."


def test_plan_data_and_train_show_what_they_found(chat_config):
    """With rows from Python, an error in them, and the answers of the run."""
    rows = [*chat_rows(60), *chat_rows(5)]
    keys = {**chat_config, "dataset": rows, "max_steps": 2, "num_samples": 1, "save_strategy": "no", "save_steps": None}
    preview = solotune.data(keys)
    assert repr(preview).startswith(
        "DataPreview(format='messages', rows_read=65, rows_kept=60, train=50, validation=10, "
    )
    assert len(repr(preview)) < MOST_CHARACTERS and repr(preview.report).startswith("DataReport(")
    assert "exact duplicate" in (html := preview._repr_html_()) and "<b><u>it is" in html
    assert repr(preview.shown[0]).startswith("ShownRow(where=") and "<b><u>" in preview.shown[0]._repr_html_()
    plan = solotune.plan(keys, learning_rate=1.0)
    assert repr(plan).startswith("Plan(fits=True, card='cpu', peak=") and len(repr(plan)) < MOST_CHARACTERS
    assert {"Memory at", "adamw_torch", "rate-too-high"} <= set(
        re.findall("Memory at|adamw_torch|rate-too-high", plan._repr_html_())
    )
    result = solotune.train(keys)
    assert re.fullmatch(
        r"TrainResult\(run_dir='run', steps=2, base_loss=[\d.]+, tuned_loss=[\d.]+, base_exact_match=0, .*\)",
        repr(result),
    )
    assert "Answers" in result._repr_html_()
    history = result.history
    assert list(history.step) == [1, 2] and list(history.columns[:4]) == ["step", "epoch", "loss", "eval_loss"]
    assert history.eval_loss.notna().tolist() == [False, True]
    assert history.eval_loss.iloc[-1] == pytest.approx(result.evaluation.tuned.loss)
    assert solotune.runs(".")[-1].history.equals(history)
    session = solotune.chat(result.run_dir)
    session.reply("twice <3>")
    assert "turns=1" in repr(session) and "twice &lt;3&gt;" in session._repr_html_()
