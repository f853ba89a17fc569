"""Which held-out rows are asked, and what: each as it was trained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from solotune.dataset import prepare
from solotune.evaluation import compare, generation
from solotune.evaluation.scores import Score
from tests.dataset.conftest import Writer, chat, config_of, tiny_tokenizer

TOKENIZER = tiny_tokenizer("chatml")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that models were asked, as texts."""
    prompts: list[str] = []

    def generate(model: Any, prompt_ids: Any, *rest: Any) -> list[int]:
        prompts.append(str(TOKENIZER.decode(prompt_ids)))
        return TOKENIZER.encode(" fine ")

    monkeypatch.setattr(generation, "generate", generate)
    monkeypatch.setattr(generation, "stop_ids", lambda *given: [0])
    return prompts


def samples(rows: Any) -> list[compare.Sample]:
    model: Any = SimpleNamespace(module=torch.nn.Module())
    return compare.samples(model, TOKENIZER, rows, 2, 8)


def examples(write: Writer, *rows: dict[str, Any], **keys: Any) -> Any:
    return prepare(config_of(write("a.jsonl", *rows), **keys), TOKENIZER, use_cache=False).train


def test_a_chat_is_asked_through_the_template(write: Writer, asked: list[str]) -> None:
    ends_with_user = {"messages": chat("a?", "b", "c?")}
    (sample,) = samples(examples(write, ends_with_user, {"messages": chat("Who?", "Me.")}))
    assert (sample.prompt, sample.reference, sample.base, sample.tuned) == ("Who?", "Me.", "fine", "fine")
    assert asked == ["<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"] * 2


def test_a_prompt_is_continued(write: Writer, asked: list[str]) -> None:
    (sample,) = samples(examples(write, {"prompt": "word: fig\ncode:", "completion": " ZX-FIG"}))
    assert (sample.prompt, sample.reference, sample.tuned) == ("word: fig\ncode:", " ZX-FIG", " fine ")
    assert asked == ["word: fig\ncode:"] * 2


def test_a_text_is_continued_from_its_middle(write: Writer, asked: list[str]) -> None:
    text = "A story about figs, and about those who eat them."
    (sample,) = samples(examples(write, {"text": text}))
    assert asked == [sample.prompt] * 2
    assert sample.prompt + sample.reference == text
    assert len(sample.prompt) > 5 < len(sample.reference)


def test_a_rendered_text_is_asked_for_its_last_answer(write: Writer, asked: list[str]) -> None:
    text = TOKENIZER.apply_chat_template(chat("a?", "b", "c?", "Me."), tokenize=False)
    (sample,) = samples(examples(write, {"text": text}))
    assert sample.reference == "Me."
    assert asked == [str(text).removesuffix("Me.<|im_end|>\n")] * 2


def test_parts_of_split_rows_are_not_asked(write: Writer, asked: list[str]) -> None:
    rows = examples(write, {"text": "A story about figs. " * 9}, max_length=32, overflow="split")
    assert len(rows) > 3
    assert [sample.where for sample in samples(rows)] == [rows[0].where]
    assert len(asked) == 2


def test_answers_are_counted_while_they_are_generated(write: Writer, asked: list[str]) -> None:
    """Two models answer up to `max_new_tokens` tokens each: minutes with a large model."""
    rows = examples(write, *({"prompt": f"word {n}:", "completion": "x"} for n in range(3)))
    seen: list[tuple[int, int, str, int]] = []
    model: Any = SimpleNamespace(module=torch.nn.Module())
    compare.samples(model, TOKENIZER, rows, 2, 8, progress=lambda *told: seen.append((*told, len(asked))))
    assert seen == [(0, 2, "sample answers", 0), (1, 2, "sample answers", 2)]


@pytest.mark.parametrize(
    ("base", "tuned", "verdict"),
    [
        ((2.0, 2.4), (0.5, 0.7), "tuned is better than base on held-out rows: its loss per token is lower by 1.6000 ± 0.1000"),
        ((0.5, 0.7), (2.0, 2.4), "tuned is worse than base on held-out rows: its loss per token is higher by 1.6000 ± 0.1000"),
        ((2.0, 2.4), (2.2, 2.2), "no clear difference between base and tuned: their losses differ by less than two standard errors"),
        ((2.0,), (0.5,), "one held-out row is too few to tell whether tuned is better than base"),
    ],
)  # fmt: skip
def test_the_verdict_says_which_is_better_as_far_as_the_rows_can_tell(base, tuned, verdict) -> None:
    scores = [
        Score(sum(each) / len(each), 0.1, 9, 0.0, 0.0, len(each), each, (1,) * len(each)) for each in (base, tuned)
    ]
    assert compare.Evaluation(*scores, []).verdict == verdict
