"""The steps and evaluations of a run as a pandas DataFrame, for plots and comparisons.

    history = history_of(RunRecord.read("runs/demo"))
    history.plot(x="step", y="loss")
    history.dropna(subset="eval_loss")      the evaluations

One row for each step, as metrics.jsonl has them; an evaluation stands in the row of the step after which it was made.
pandas is imported here only: it is not needed for anything else.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from solotune.errors import CheckError
from solotune.run.record import RunRecord

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS = (
    "step", "epoch", "loss", "eval_loss", "eval_stderr", "eval_exact_match", "learning_rate", "grad_norm",
    "token_accuracy", "num_tokens", "num_supervised", "step_seconds", "tokens_per_second", "peak_bytes",
)  # fmt: skip


def history_of(record: RunRecord) -> DataFrame:
    """The steps of a run with their evaluations, in order; a figure that was not recorded is NaN.

    Raises:
        CheckError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise CheckError("history needs pandas", seen=str(error), change="pip install pandas") from None
    rows: dict[int, dict[str, Any]] = {}
    for step in record.steps:
        rows[step.step] = asdict(step)
    for score in record.evals:
        found = {"eval_loss": score.loss, "eval_stderr": score.stderr, "eval_exact_match": score.exact_match}
        rows.setdefault(score.step, {"step": score.step}).update(found)
    return pandas.DataFrame([rows[step] for step in sorted(rows)], columns=list(COLUMNS))
