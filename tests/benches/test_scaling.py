"""bench.scaling: the bench of one run, on each card and on all of them, compared."""

from __future__ import annotations

import pytest
from tiny import save_tokenizer

from bench import plan_cases, scaling
from bench.made_weights import make_checkpoint


def test_the_table_compares_cards_with_one_and_losses_with_their_noise():
    def run(speed, losses):
        planned = {"step_seconds": 1.0, "peak_gib": 5.0, "choices": []}
        return {"tokens_per_second": speed, "step_seconds": 1.1, "peak_gib": 5.1, "losses": losses,
                "predicted": planned}  # fmt: skip

    one, both = [run(100, [2.0, 1.5]), run(102, [2.0, 1.501])], run(199, [2.0, 1.5002])
    assert scaling.row("8B", 2, one, both) == ["8B", "101", "199", "1.970", 5.1, "1.0 / 1.1", "1.0e-03", "2.0e-04"]
    assert scaling.row("70B", 2, [], both)[1:4] == ["", "199", ""], "not run on one card"


@pytest.fixture
def tiny_case(tmp_path):
    """A case of a tiny shape on the CPU, and the folder of its model."""
    save_tokenizer(tmp_path / "tokenizer")
    make_checkpoint(tmp_path / "tiny", plan_cases._llama(64, 128, 2, 4, 2, 128, False), tmp_path / "tokenizer")
    return scaling.Case("tiny", 1, ("use_cpu=true", "max_length=24", "base_precision=fp32", "learning_rate=0.01"))


@pytest.mark.ranks
def test_two_ranks_train_on_the_rows_of_one(tiny_case, tmp_path):
    one = scaling.run(tiny_case, tmp_path, cards=2, ranks=1, steps=4)
    (both,) = scaling.run(tiny_case, tmp_path, cards=2, ranks=2, steps=4)
    assert [found["ranks"] for found in (*one, both)] == [1, 1, 2]
    assert one[0]["losses"] == one[1]["losses"], "a CPU has no noise"
    assert both["losses"] == pytest.approx(one[0]["losses"], abs=1e-5)
    assert both["grad_norms"] == pytest.approx(one[0]["grad_norms"], rel=1e-3)
    assert both["losses"][0] - both["losses"][-1] > 1e-3, "it learns"
    assert "tiny use_cpu=true" in scaling.markdown(
        {"cards": 2, "card": "CPU", "torch": "2", "cases": {tiny_case.name: {"one": one, "all": both}}}
    )


@pytest.mark.ranks
def test_a_run_that_fails_ends_the_bench_with_what_it_said(tiny_case, tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)tiny .*on 1 cards:.*warmup_ratio"):
        scaling.run(tiny_case._replace(overrides=("use_cpu=true", "warmup_ratio=7")), tmp_path, 1, 1, 3)
