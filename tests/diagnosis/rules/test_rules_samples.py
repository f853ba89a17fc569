"""The shape and cost of findings, and the sample of large data."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace

import numpy as np
import pytest

from solotune.diagnosis.facts import row_arrays
from solotune.diagnosis.findings import Finding
from tests.dataset.conftest import chat, tiny_tokenizer
from tests.diagnosis.rules.rows import Bench, answered, find, sentence, talk


def test_the_shape_of_a_finding(bench: Bench) -> None:
    found = bench.find(answered(talk(), lambda n, text: "Yes."), "glm", validation_size=0)
    assert [finding.severity for finding in found] == sorted(
        (f.severity for f in found), key="error warning info".split().index
    )
    for finding in found:
        shape = json.loads(json.dumps(finding.to_json()))
        assert list(shape) == list(Finding.__dataclass_fields__)
        assert finding.message.endswith(".")
        assert finding.fix


def test_five_thousand_rows_in_seconds(bench: Bench) -> None:
    rows = talk(50, turns=4)
    config, result = bench.prepared(rows, tiny_tokenizer("chatml"))
    many = [replace(row, where=f"a.jsonl:{n}") for n, row in enumerate([*result.train] * 135)]
    started = time.process_time()
    find(config, tiny_tokenizer("chatml"), many[:5000], result.validation, result.report)
    assert time.process_time() - started < 10


def test_large_data_is_sampled_and_the_finding_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_arrays, "NUM_READ", 32)
    rows = talk(400)
    shifted = answered(rows, lambda n, text: rows[(n + 1) % 400]["messages"][1]["content"])  # is seen by neighbours
    found = bench.only("F38", shifted)
    assert (found.evidence["rows_judged"], found.evidence["training_rows"]) == (32, 300)
    assert bench.codes(rows) == []
    blank = answered(rows, lambda n, text: text if n % 4 else " ")
    found = bench.only("F34", blank)
    # a quarter is dropped: of 225 + 75 + 100 rows, or as many of those that are judged
    assert found.evidence["dropped_as_empty"] == 100 * 32 // 225


def test_faults_of_single_rows_are_searched_in_all_rows(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_arrays, "NUM_READ", 16)
    tokenizer = tiny_tokenizer("chatml")
    config, result = bench.prepared(talk(100), tokenizer)
    train, validation = [*result.train], [*result.validation]
    in_sample = {row.where for row in row_arrays.judged(train)}
    outside = next(row for row in train if row.where not in in_sample)
    assert len(in_sample) == 16

    leaked = find(config, tokenizer, train, validation[:3] + train[40:60], result.report)
    assert "F43" in [f.code for f in leaked]
    copies = find(config, tokenizer, train + [outside] * 10, validation, result.report)
    assert [f.evidence["equal_after_truncation"] for f in copies if f.code == "F39"] == [10]
    config = config.replaced("test", model_name_or_path=bench.model(config={"vocab_size": 1000}))
    odd = replace(outside, input_ids=np.append(outside.input_ids[:-1], 1234).astype(np.int32))
    beyond = find(config, tokenizer, [odd if row is outside else row for row in train], validation, result.report)
    assert [f.evidence["rows"] for f in beyond if f.code == "F05"] == [[outside.where]]


def test_passages_are_searched_in_all_rows(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_arrays, "NUM_READ", 16)
    rng = random.Random(3)
    passages = [sentence(rng, 40) for _ in range(60)]
    told = [f"{passages[n % 60]} {sentence(rng, 9)}" for n in range(120)]
    rows = [{"messages": chat(sentence(rng, 9), one)} for one in told]
    found = [f for f in bench.find(rows) if f.code == "F44"]
    assert found[0].evidence["rows_with"] >= 5
