"""S9: each fault of the split is found, and no other."""

from __future__ import annotations

import numpy as np
import pytest

from solotune.diagnosis.rules import rules
from solotune.diagnosis.run_facts import RunFacts, Settings, Trace
from tests.dataset.conftest import Writer, tiny_tokenizer
from tests.diagnosis.rules.rows import Bench, answered, find, masked, talk


def test_f47_other_labels_in_validation(bench: Bench) -> None:
    tokenizer = tiny_tokenizer("chatml")
    config, result = bench.prepared(talk(), tokenizer)
    everything = masked(lambda row: np.arange(len(row.loss_mask)) > 0)
    found = find(config, tokenizer, result.train, everything(list(result.validation)), result.report)
    assert [f.code for f in found] == ["F47"]
    assert found[0].evidence["validation_rows_with_prompt"] == 10


def test_f48_three_validation_rows(bench: Bench) -> None:
    found = bench.only("F48", talk(120), validation_size=3)
    assert (found.fix, found.severity, found.is_statistic) == ("validation_size: 20", "error", True)
    assert bench.codes(talk(120), validation_size=20) == []


def test_f48_few_rows_by_our_own_default_are_a_note(bench: Bench) -> None:
    assert bench.only("F48", talk(120), validation_size=0.05).severity == "info"


@pytest.mark.parametrize(("rows", "kinds"), [(3, ["measured"]), (7, ["remark"]), (12, [])])
def test_f48_from_the_number_of_rows(rows: int, kinds: list[str]) -> None:
    known = RunFacts("test", Settings({"validation_rows": rows, "train_rows": 480}))
    assert [signal.kind for rule in rules()["F48"] for signal in rule.signals(known)] == kinds


def curve(held: list[float], end: float, epochs: float = 20.0) -> list[str]:
    """Kinds of the signals of F46 and F48, of a run whose training loss falls from 2 to `end`."""
    steps = np.arange(1, 101)
    loss = end + (2 - end) * np.exp(-steps / 12)
    every = np.linspace(100 / len(held), 100, len(held)).astype(int)
    trace = Trace(steps, loss, 0 * loss, 0 * loss, steps * epochs / 100, every, np.array(held), 100, True)
    known = RunFacts("test", Settings({}), trace=trace)
    return [f"{s.code} {s.kind}" for code in ("F46", "F48") for rule in rules()[code] for s in rule.signals(known)]


def test_f46_rows_known_by_heart() -> None:
    assert curve([1.5, 1.2, 1.6, 2.1], 0.3) == ["F46 measured"]
    assert curve([1.4, 1.9], 0.05) == ["F46 measured"]
    assert curve([1.6, 1.40, 1.41, 1.40, 1.41, 1.40], 0.02) == ["F46 measured"]  # stands still, far above


def test_what_is_not_known_by_heart() -> None:
    assert curve([1.6, 1.40, 1.41, 1.40, 1.41, 1.40], 0.02, epochs=3) == []
    assert curve([0.9, 0.5, 0.2, 0.08, 0.03, 0.02], 0.01) == []  # a deterministic task is learned on both sides
    assert curve([1.9, 1.6, 1.4, 1.3, 1.25, 1.2], 0.2) == []  # still falls
    assert curve([1.4, 1.5], 0.9) == []


def test_f48_a_held_out_loss_that_has_converged_is_not_rough() -> None:
    assert curve([0.8, 0.801, 0.799, 0.802, 0.8, 0.801, 0.799, 0.8], 0.7) == []
    assert "F48 curve" in curve([0.8, 1.1, 0.7, 1.2, 0.75, 1.15, 0.7, 0.82], 0.7)


def test_f47_other_settings_for_the_evaluation() -> None:
    def kinds(**settings: object) -> list[str]:
        known = RunFacts("test", Settings(settings))
        return [s.kind for rule in rules()["F47"] for s in rule.signals(known)]

    assert kinds(packing=True, eval_packing=False) == ["remark"]
    assert kinds(assistant_only_loss=True, eval_assistant_only_loss=False) == ["measured"]


def test_f48_validation_of_another_kind(bench: Bench, write: Writer) -> None:
    own = write("own.jsonl", *answered(talk(40, seed=9), lambda n, text: f"Yes {n}."))
    found = bench.only("F48", talk(), eval_dataset=str(own), validation_size=0)
    assert "another kind" in found.message
