"""S9: each fault of the split is found, and no other."""

from __future__ import annotations

import numpy as np

from tests.dataset.conftest import Writer, tiny_tokenizer
from tests.diagnosis.rules.rows import Bench, answered, find, masked, talk


def test_f47_other_labels_in_validation(bench: Bench) -> None:
    tokenizer = tiny_tokenizer("chatml")
    config, result = bench.prepared(talk(), tokenizer)
    everything = masked(lambda row: np.arange(len(row.loss_mask)) > 0)
    found = find(config, tokenizer, result.train, everything(result.validation), result.report)
    assert [f.code for f in found] == ["F47"]
    assert found[0].evidence["validation_rows_with_prompt"] == 10


def test_f48_three_validation_rows(bench: Bench) -> None:
    assert bench.only("F48", talk(120), validation_size=3).fix == "validation_size: 20"


def test_f48_validation_of_another_kind(bench: Bench, write: Writer) -> None:
    own = write("own.jsonl", *answered(talk(40, seed=9), lambda n, text: f"Yes {n}."))
    found = bench.only("F48", talk(), eval_dataset=str(own), validation_size=0)
    assert "another kind" in found.message
