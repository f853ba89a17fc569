"""Held-out rows as questions, and the answers of base and tuned to them.

A question is asked as the run was trained: of a chat, its last answer, through the chat template, with its system
prompt and the messages before; of plain text, what follows its prompt, or its first half if it has none.

    asked = questions(tokenizer, rows, day, limit=200)
    answered = answer(model, tokenizer, asked, ...)         [Answered(question, base, tuned), ...]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import islice
from typing import Any, NamedTuple

from solotune.dataset import Example, render_prompt
from solotune.evaluation import generation
from solotune.evaluation.generation import Generated
from solotune.model.loading import TrainableModel
from solotune.model.lora import adapters_off

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Question:
    """A prompt made of a held-out row, and the row's own answer."""

    where: str
    group: str  # rows that belong together share it
    prompt_ids: Sequence[int]
    prompt: str
    reference: str
    reference_ids: Sequence[int]
    is_chat: bool


class Answered(NamedTuple):
    """A question with the answers of both models, as token ids and as texts."""

    question: Question
    base: Generated
    tuned: Generated
    base_text: str
    tuned_text: str


def first_questions(
    tokenizer: Any, rows: Iterable[Example], count: int, rendered_on: date | None = None
) -> list[Question]:
    """Questions of the first rows that can be asked."""
    found = (asked for row in rows if (asked := _question(tokenizer, row, rendered_on)) is not None)
    return list(islice(found, count))


def spread_questions(
    tokenizer: Any, rows: Sequence[Example], limit: int, rendered_on: date | None = None
) -> list[Question]:
    """Questions of at most `limit` rows, spread evenly over all rows that can be asked."""
    asked = first_questions(tokenizer, rows, len(rows), rendered_on)
    count = min(limit, len(asked))
    return [asked[number * len(asked) // count] for number in range(count)]


def _question(tokenizer: Any, row: Example, rendered_on: date | None) -> Question | None:
    """The question of a row; None if nothing can be asked: a chat that ends with its user, or part of a split row."""
    group = row.group or row.where
    if row.messages:
        if row.messages[-1]["role"] != "assistant":
            return None
        users = [message["content"] for message in row.messages if message["role"] == "user"]
        prompt_ids = render_prompt(tokenizer, row.messages[:-1], row.tools, rendered_on=rendered_on)
        answer_ids = row.input_ids[len(row.prompt_ids) :][row.loss_mask[len(row.prompt_ids) :]].tolist()
        prompt, reference = users[-1] if users else "", row.messages[-1]["content"] or ""
        return Question(row.where, group, prompt_ids, prompt, reference, answer_ids, True)
    begin = len(row.prompt_ids) or len(row.input_ids) // 2
    if row.is_later_part or begin == 0:
        return None
    prompt_ids, after = row.input_ids[:begin].tolist(), row.input_ids[begin:][row.loss_mask[begin:]].tolist()
    prompt, reference = _text(tokenizer, prompt_ids), _text(tokenizer, after)
    return Question(row.where, group, prompt_ids, prompt, reference, after, False)


def answer(
    model: TrainableModel,
    tokenizer: Any,
    asked: Sequence[Question],
    stops: list[int],
    max_new_tokens: int,
    batch_size: int,
    progress: Progress = lambda done, total, what: None,
    what: str = "sample answers",
) -> list[Answered]:
    """The answers of tuned and base to the same questions."""
    prompts, total = [one.prompt_ids for one in asked], 2 * len(asked)

    def ask(before: int) -> list[Generated]:
        progress(before, total, what)
        return generation.generate_all(
            model, prompts, max_new_tokens, stops, batch_size, lambda done: progress(before + done, total, what)
        )

    if not asked:
        return []
    tuned = ask(0)
    with adapters_off(model.module):
        base = ask(len(asked))
    return [
        Answered(question, of_base, of_tuned, *(_shown(tokenizer, question, one) for one in (of_base, of_tuned)))
        for question, of_base, of_tuned in zip(asked, base, tuned, strict=True)
    ]


def _shown(tokenizer: Any, question: Question, generated: Generated) -> str:
    text = _text(tokenizer, generated.ids)
    return text.strip() if question.is_chat else text


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)
