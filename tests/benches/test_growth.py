"""bench.growth: its cases are configs that are accepted, and a row says what the plan chose, or what failed."""

from __future__ import annotations

import pytest

from bench import growth
from bench.plan_runs import config_of


def test_every_case_is_a_config_that_loads(tmp_path):
    found = list(growth.cases())
    assert len({(grows, case.name) for grows, case in found}) == len(found) > 20
    for _, case in found:
        config = config_of(case, tmp_path)
        assert (config.max_length, config.per_device_train_batch_size) == (case.tokens, case.rows)


@pytest.mark.parametrize(
    ("checkpointed", "streamed", "words"),
    [(False, False, "quantized"), (10, False, "quantized, 10 checkpointed"),
     (True, True, "quantized, all checkpointed, all streamed"), (0, 3, "quantized, 0 checkpointed, 3 streamed")],
)  # fmt: skip
def test_a_row_says_what_was_chosen_and_the_share_of_the_ceiling(checkpointed, streamed, words):
    chosen = {"gradient_checkpointing": checkpointed, "base_residency": "quantized", "base_offload": streamed}
    result = {"grows": "size", "case": "8B 4x2048", "chosen": chosen, "tokens_per_second": 17000.4}
    line = growth.line_of({**result, "peak_bytes": 43 << 29, "ceiling": 25000.0})
    assert line == f"| size | 8B 4x2048 | {words} | 17,000 | 21.5 | 25,000 | 68% |"


def test_a_case_that_failed_has_a_row_of_as_many_cells():
    line = growth.line_of({"grows": "size", "case": "70B 4x2048", "error": "no setting fits"})
    assert line == "| size | 70B 4x2048 | no setting fits | | | | |"
    assert line.count("|") == growth.HEAD.splitlines()[0].count("|")
