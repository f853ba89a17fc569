"""Every result and every help text fits its terminal: no line is wider, and no figure or key is cut."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from solotune import cli
from solotune.api.data import DataPreview, ShownRow
from solotune.api.train import TrainResult
from solotune.cli import commands, results, run_list
from solotune.config.run_config import Choice
from solotune.dataset import DataReport
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.verdict import decide
from solotune.display.progress import LiveDisplay
from solotune.evaluation.compare import Evaluation, Sample
from solotune.evaluation.metrics import MetricScore
from solotune.evaluation.scores import Score
from solotune.evaluation.task_scores import score_tasks
from solotune.hardware.doctor import Check, DoctorReport
from solotune.run.run_dir import RunSummary
from solotune.training.verify_run import Problem, Verification
from tests.display.test_progress import a_run, metrics, shown_on
from tests.evaluation.task_files import logged
from tests.planning.test_planner import planned

WIDTHS = (60, 80)
RUN = "runs/support-answers-20260101-120000"


def evaluation() -> Evaluation:
    base = Score(12.3673, 0.1234, 1_234_567, 0.0, 0.0, 1_200, (1.0, 2.0), (1, 1), (False, False))
    tuned = Score(10.2841, 0.0912, 1_234_567, 0.9512, 0.0281, 1_200, (0.5, 0.4), (1, 1), (True, True))
    sample = Sample(
        "data/support/chats-2026.jsonl:10417", "Where is my order? " * 9, '{"status": "open"}', "It is " * 40, "x" * 130
    )
    scores = {"json_fields": MetricScore(0.1, 0.9123, 0.0301, 0.0211, 0.02, 0.001, 200)}
    side = {"stop_rate": 0.97, "repetition": 0.0, "overlap": 0.31}
    generation = {"base": side, "tuned": {**side, "repetition": 0.64}, "reference": side}
    return Evaluation(base, tuned, [sample], scores, generation, score_tasks(*logged()))


def data_preview() -> DataPreview:
    finding = {
        "code": "F24",
        "slug": "truncated-answers",
        "severity": "warning",
        "message": "1,143 answers are cut " * 3,
    }
    report = DataReport(
        "messages",
        num_read=1_697_000,
        num_train=1_600_000,
        num_validation=1_200,
        num_tokens=123_456_789,
        num_supervised=23_456_789,
        num_groups=900,
        num_near_duplicates=12_345,
        num_truncated=753,
        num_answers_cut=753,
        findings=[{**finding, "fix": "max_length: 2880 (then 99.9% of the rows fit), or overflow: split"}],
    )  # fmt: skip
    pieces = [
        ("<|im_start|>user\nWhere is my order of eleven dark sponges, please?", False, [1] * 20),
        ("It " * 60, True, [7] * 60),
    ]
    tokens = ["<|im_start|>", "user", "\n", *["Where"] * 17, *["It"] * 60]
    return DataPreview(report, [ShownRow("data/support/chats-2026.jsonl:10417", pieces, tokens)])


def diagnosis():
    says = "at 10 times the rate one batch falls to 1.21 in 30 steps, at yours to 4.93"
    signals = [
        Signal("F64", "measured", says, 0.9, fix="learning_rate: 2e-4", expect="about 3.1 instead of 4.9 after 50 steps"),
        Signal("F17", "invariant", "the end of turn is in 0 of 40 answers' labels", 0.95, fix="pad_token: <|pad|>"),
        Signal("F48", "remark", "7 rows are held out: the loss is known to 0.2 only", 0.9, fix="validation_size: 200"),
    ]  # fmt: skip
    skipped = {"P1": "the base is not on this machine", "P7": "the base is not on this machine"}
    return decide(
        "run", signals, {"F57": "the model was not loaded"}, skipped, not_checked=["rows and labels: give the data"]
    )


def doctor() -> DoctorReport:
    fix = "install a CUDA build: pip install torch --index-url https://download.pytorch.org/whl/cu128"
    checks = [
        Check("bitsandbytes", "fail", "0.49.1, but its native library for CUDA 12.8 does not load", fix),
        Check("disk", "warn", "12.3 GiB free in /home/somebody/projects/support-answers", "free 8 GiB"),
    ]
    return DoctorReport(None, checks)  # type: ignore[arg-type]


def run_summaries() -> list[RunSummary]:
    names = ("support-answers-20260101-120000", "demo-20260101-120000")
    figures = (12_000, 12_000, 1.4, 12.3412, 10.1234, 0.95, 12_204.0, 42 << 30)
    return [
        RunSummary(names[0], Path("a"), "finished", *figures),
        RunSummary(names[1], Path("b"), "unfinished", 0, *([None] * 7)),
    ]


def verification() -> Verification:
    file = "checkpoints/step-00012000/adapter_model.safetensors"
    return Verification(
        Path(RUN), True, 31, 1 << 30, 2, [Problem(file, "the sha256 is not the recorded one")], ["unused: step-3"]
    )


def plan(console: Console, **keys: object) -> None:
    results.print_plan(planned(**keys), console)


def trained() -> TrainResult:
    return TrainResult(Path(RUN), {}, [Choice("optim", "adamw_torch", "no CUDA")], evaluation())


def lines_of_a_run(console: Console) -> None:
    display = LiveDisplay(2, console)
    a_run(display)
    display.step(metrics(12_003, total=12_000, num_tokens=50_000, peak_bytes=42 << 30))
    display.finish()


SCREENS: dict[str, Callable[[Console], None]] = {
    "doctor": lambda console: results.print_doctor(doctor(), console),
    "data": lambda console: results.print_data(data_preview(), console),
    "data --ids": lambda console: results.print_data(data_preview(), console, with_ids=True),
    "plan": plan,
    "a plan that does not fit": lambda console: plan(console, memory_budget="4GiB"),
    "evaluate": lambda console: results.print_evaluation(evaluation(), console),
    "train": lambda console: results.print_trained(trained(), console),
    "diagnose": lambda console: results.print_diagnosis(diagnosis(), console),
    "verify": lambda console: results.print_verification(verification(), console),
    "runs": lambda console: run_list.print_runs(run_summaries(), "runs", console),
    "no runs": lambda console: run_list.print_runs([], "runs", console),
    "the lines of a run": lines_of_a_run,
}
FIGURES = {
    "plan": ["activations", "peak (", "budget", "GiB"],
    "evaluate": [
        "12.3673",
        "0.1234",
        "10.2841",
        "0.0912",
        "-2.0832",
        "0.0%",
        "95.1%",
        "2.8",
        "+95.1 points",
        "1,234,567",
        "json_fields",
        "0.912 ± 0.021",
        "+0.812",
        "97% of tuned",
        "said before 64% (in the references 0%)",
        "answer exact_match",
        "+100.0 ± 0.0",
        "inside the noise",
        "f1, bleu: one number of all documents together",
    ],
    "train": ["solotune chat", RUN],
    "data": ["1,697,000 read", "123,456,789", "753", "F24 truncated-answers"],
    "diagnose": ["F17 pad-masks-terminator", "learning_rate: 2e-4", "95% sure"],
    "the lines of a run": ["step 2/5  loss 2.0000", "held-out loss 1.2500 ± 0.0100  exact match 50.0%", "saved runs/a"],
    "verify": ["adapter_model.safetensors"],
    "runs": ["finished", "support-answers-20260101-120000", "12,000/12,000", "12.341", "10.123", "95%"],
}


def words(lines: list[str]) -> str:
    """Lines as one, without blanks: a word or a path may be broken at the edge, but nothing of it is missing."""
    return re.sub(r"\s", "", "".join(lines))


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("screen", SCREENS)
def test_results_fit(screen: str, columns: int) -> None:
    shown = "\n".join(shown_on(columns, SCREENS[screen]))
    lines = re.split(r"\r|\n", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown))  # a live line is written over itself
    assert [line for line in lines if len(line) > columns] == []
    assert [line for line in lines if "…" in line] == []
    for figure in FIGURES.get(screen, []):
        assert re.sub(r"\s", "", figure) in words(lines), figure


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("verb", ["", *commands.solotune.commands])
def test_help_fits(verb: str, columns: int, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main([*([verb] if verb else []), "--help"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > columns] == []


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("code", ["", "S4", "F17", "F33", "F48"])
def test_explanations_fit(code: str, columns: int, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(["explain", *([code] if code else [])]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if len(line) > columns] == []
    assert code in out
