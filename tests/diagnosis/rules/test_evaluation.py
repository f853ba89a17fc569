"""S9: each fault of the split is found, and no other."""

from __future__ import annotations

import random

import numpy as np

from tests.dataset.conftest import Writer, chat, tiny_tokenizer
from tests.diagnosis.rules.rows import Bench, answered, find, masked, sentence, talk


def test_f43_validation_rows_of_training(bench: Bench) -> None:
    config, result = bench.prepared(talk(), tiny_tokenizer("chatml"))
    found = find(config, tiny_tokenizer("chatml"), result.train, result.train[:10], result.report)
    assert [(f.code, f.severity) for f in found] == [("F43", "error")]
    assert bench.only("F43", talk(), validation_size=0).severity == "info"


def test_f44_passages_on_both_sides(bench: Bench) -> None:
    rng = random.Random(3)
    passages = [sentence(rng, 40) for _ in range(20)]
    turns = [(sentence(rng, 9), f"{passages[n // 2]} {sentence(rng, 9)}", *talk(1, seed=n)) for n in range(40)]
    rows = [
        {"messages": chat(asked, told) + more["messages"], "doc": n // 2} for n, (asked, told, more) in enumerate(turns)
    ]
    found = bench.only("F44", rows)
    assert found.evidence["rows_with"] >= 4
    assert "split_by" in found.fix
    assert bench.codes(rows, split_by="doc") == []
    # ids that say it, and ids that do not
    assert bench.codes([{**row, "id": f"c0DE{n // 2:02}_{n % 2}"} for n, row in enumerate(rows)]) == []
    assert bench.only("F44", [{**row, "id": f"2024_{n:02}"} for n, row in enumerate(rows)])


def test_one_document_under_several_questions(bench: Bench) -> None:
    rng = random.Random(3)
    documents = [sentence(rng, 40) for _ in range(20)]
    rows = [{"messages": chat(f"{documents[n // 2]} {sentence(rng, 40)}?", sentence(rng, 20))} for n in range(40)]
    assert bench.codes(rows) == []


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
