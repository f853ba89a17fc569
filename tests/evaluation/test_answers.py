"""Which held-out rows are asked, and what: each as it was trained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from solotune.dataset import prepare
from solotune.evaluation import generation
from solotune.evaluation.answers import answer, first_questions, spread_questions
from solotune.evaluation.compare import Sample, sample_of
from solotune.evaluation.generation import Generated
from tests.dataset.conftest import Writer, chat, config_of, tiny_tokenizer

TOKENIZER = tiny_tokenizer("chatml")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that models were asked, as texts."""
    prompts: list[str] = []

    def generate(model: Any, chosen: Any, *rest: Any) -> list[Generated]:
        prompts.extend(str(TOKENIZER.decode(prompt_ids)) for prompt_ids in chosen)
        return [Generated(TOKENIZER.encode(" fine "), True)] * len(chosen)

    monkeypatch.setattr(generation, "_continue", generate)
    return prompts


def samples(rows: Any, **given: Any) -> list[Sample]:
    model: Any = SimpleNamespace(module=torch.nn.Module())
    questions = first_questions(TOKENIZER, rows, 2)
    return [sample_of(one) for one in answer(model, TOKENIZER, questions, [0], 8, **{"batch_size": 4, **given})]


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
    samples(rows, batch_size=1, progress=lambda *told: seen.append((*told, len(asked))))
    counts = [(0, 0), (1, 1), (2, 2), (2, 2), (3, 3), (4, 4)]
    assert seen == [(done, 4, "sample answers", prompts) for done, prompts in counts]


def test_the_system_prompt_is_asked_too(write: Writer, asked: list[str]) -> None:
    messages = [{"role": "system", "content": "Be terse."}, *chat("Who?", "Me.")]
    (sample,) = samples(examples(write, {"messages": messages}))
    assert sample.prompt == "Who?"
    assert asked[0].startswith("<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nWho?")


def test_scored_rows_are_spread_over_all(write: Writer) -> None:
    rows = examples(write, *({"prompt": f"word {n}:", "completion": "x"} for n in range(10)))
    assert [one.prompt for one in spread_questions(TOKENIZER, rows, 3)] == ["word 0:", "word 3:", "word 6:"]
    assert len(spread_questions(TOKENIZER, rows, 99)) == 10


def test_the_reference_ids_are_the_answers_own(write: Writer) -> None:
    (question,) = first_questions(TOKENIZER, examples(write, {"messages": chat("a?", "b", "c?", "Me.")}), 9)
    assert str(TOKENIZER.decode(question.reference_ids)).startswith("Me.<|im_end|>")
