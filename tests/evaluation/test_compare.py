"""Base against tuned: what is asked once and used twice, and what is said of the answers and of a single group."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from solotune.config.load import load_config
from solotune.dataset import prepare
from solotune.evaluation import compare, generation
from solotune.evaluation.compare import Evaluation
from solotune.evaluation.generation import Generated
from solotune.evaluation.scores import score_of
from tests.dataset.conftest import Writer, config_of, tiny_tokenizer

TOKENIZER = tiny_tokenizer("chatml")


@pytest.fixture
def rows(write: Writer) -> Any:
    texts = [{"prompt": f"word {n}:", "completion": "yes" if n % 2 else "no"} for n in range(8)]
    return prepare(config_of(write("a.jsonl", *texts)), TOKENIZER, use_cache=False).train


def test_each_row_is_answered_once_for_samples_and_scores(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def generate(model: Any, prompts: Any, *rest: Any) -> list[Generated]:
        asked.extend(str(TOKENIZER.decode(prompt)) for prompt in prompts)
        return [Generated(TOKENIZER.encode("yes"), True)] * len(prompts)

    monkeypatch.setattr(generation, "_continue", generate)
    monkeypatch.setattr(generation, "stop_ids", lambda *given: [0])
    monkeypatch.setattr(compare, "score", lambda *given: score_of(rows, [1.0] * 8, [False] * 8))
    model: Any = type("Model", (), {"module": torch.nn.Module()})
    keys = {"model_name_or_path": "m", "dataset": "d", "num_samples": 2, "metrics": ["choice"], "metrics_rows": 4}
    found = compare.compare(model, TOKENIZER, rows, load_config(keys).evaluation, training_rows=rows)
    assert sorted(asked) == sorted(2 * ["word 0:", "word 1:", "word 2:", "word 4:", "word 6:"])
    assert [sample.prompt for sample in found.samples] == ["word 0:", "word 1:"]
    assert (found.metrics["choice"].rows, found.metrics["choice"].tuned) == (4, 0.0)
    assert found.to_json()["generation"]["rows"] == 5
    assert found.answers_in_words[0] == "answers that end by themselves: 100% of tuned, 100% of base"


def test_a_single_group_is_said(rows: Any) -> None:
    shop = [replace(row, group="one") for row in rows]
    base, tuned = (score_of(shop, [level + n / 10 for n in range(8)], [False] * 8) for level in (2.0, 1.0))
    assert Evaluation(base, tuned, []).verdict_in_words.endswith(
        "(paired test, p = 0.0078; all of one group, so not known of others)"
    )


def test_repeated_answers_are_said() -> None:
    none: Any = None
    side = {"stop_rate": 0.5, "repetition": 0.0, "overlap": 0.25}
    figures = {"base": side, "tuned": {**side, "repetition": 0.6}, "reference": side}
    said = Evaluation(none, none, [], {}, figures).answers_in_words
    assert said == [
        "answers that end by themselves: 50% of tuned, 50% of base",
        "tuned repeats itself: 4-grams said before 60% (in the references 0%)",
        "8-grams of answers that stand in training answers: 25% of tuned, 25% of the references",
    ]
