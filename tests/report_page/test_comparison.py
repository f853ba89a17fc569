"""Two runs on one page: what may be said about which is better."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from solotune.report_page.build import comparison_page
from tests.report_page.run_files import CONFIG, EVALUATION, events, start, write_run

WITHOUT_ROWS = {key: value for key, value in EVALUATION.items() if key != "row_losses"}


def tuned(loss: float, stderr: float, rows: list[float] | None = None) -> dict[str, Any]:
    """An evaluation with this loss; `rows`: the tuned losses of its rows."""
    found = {**WITHOUT_ROWS, "tuned": {"loss": loss, "stderr": stderr, "tokens": 80}}
    return found if rows is None else {**found, "row_losses": {**EVALUATION["row_losses"], "tuned": rows}}


def compare(tmp_path: Path, first: dict[str, Any] | None, second: dict[str, Any] | None, **changes: Any) -> list[Any]:
    runs = write_run(tmp_path / "a", evaluation=first), write_run(tmp_path / "b", evaluation=second, **changes)
    return [block for section in comparison_page(*runs).sections for block in section.blocks]


PAIRED = [10 * (1.0 + 0.3 * (-1) ** i) for i in range(8)]


@pytest.mark.parametrize(
    ("first", "second", "headline", "test"),
    [
        (tuned(1.0, 0.3, PAIRED), tuned(0.9, 0.3, [x - 1 for x in PAIRED]), "b is better than a", "paired test over 8"),
        (
            tuned(1.0, 0.3, PAIRED),
            tuned(1.1, 0.3, [x + 1 for x in PAIRED]),
            "a is better than b",
            "token of a is lower by 0.1",
        ),
        (tuned(1.0, 0.3), tuned(0.9, 0.3), "No clear difference", "not paired"),
        (tuned(1.0, 0.01), tuned(0.9, 0.01), "b is better than a", "not paired"),
        (tuned(1.0, 0.3, PAIRED), tuned(1.0, 0.3, PAIRED), "have the same held-out loss", ""),
        (tuned(1.0, 0.3, PAIRED), tuned(0.9, 0.01, [1.0]), "No clear difference", "not paired"),
    ],
)
def test_the_tuned_models_are_compared_row_by_row_where_rows_are_known(
    first: Any, second: Any, headline: str, test: str, tmp_path: Path
) -> None:
    """The paired test finds a tenth of the loss in 8 rows, whose errors alone would hide it."""
    verdict = compare(tmp_path, first, second)[0]
    assert headline in verdict.headline and test in " ".join(verdict.lines)


def test_other_held_out_rows_are_not_compared(tmp_path: Path) -> None:
    verdict = compare(tmp_path, tuned(1.0, 0.1), tuned(0.1, 0.1), fingerprints={"validation_rows": "c3"})[0]
    assert verdict.headline == "The two runs held out different rows"


def test_a_run_without_evaluation_is_shown_with_its_curves(tmp_path: Path) -> None:
    blocks = compare(tmp_path, None, tuned(1.0, 0.1))
    assert blocks[0].headline == "The two tuned models cannot be compared"
    assert [block.name for block in blocks if block.kind == "chart"] == [
        "loss",
        "held_out",
        "learning_rate",
        "grad_norm",
    ]


def test_ranks_are_compared_if_a_run_had_several(tmp_path: Path) -> None:
    logged = [dataclasses.replace(start(), world_size=2), *events()[1:]]
    for name, more, rows in (("one", {}, []), ("two", {"logged": logged}, [("Ranks", "1", "2")])):
        tables = {b.caption: b.rows for b in compare(tmp_path / name, None, None, **more) if b.kind == "table"}
        assert [row for row in tables["Both runs"] if row[0] == "Ranks"] == rows


def test_only_what_differs_is_listed(tmp_path: Path) -> None:
    config = CONFIG.replace("base_precision: nf4  # run.yaml line 2\n", "").replace(
        "models/tiny  # run.yaml line 1", "m  # x"
    )
    tables = {b.caption: b.rows for b in compare(tmp_path, None, None, config=config) if b.kind == "table"}
    assert tables["2 keys differ"] == (
        ("model_name_or_path", "models/tiny", "m", "run.yaml line 1 / x"),
        ("base_precision", "nf4", "not there", "run.yaml line 2"),
    )
    blocks = compare(tmp_path / "again", None, None)
    assert "The two configs are the same" in [block.headline for block in blocks if block.kind == "callout"]
