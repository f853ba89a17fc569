"""S3, the header before an answer: in the labels, and in the data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from solotune.dataset import Example
from solotune.diagnosis.rules import ask_all
from solotune.diagnosis.run_facts import RunFacts, Settings
from tests.dataset.conftest import tiny_tokenizer
from tests.diagnosis.rules.rows import Bench, answered, talk, with_template

PLAIN = (
    "{% for m in messages %}{{ {'user': 'Pupil:', 'assistant': 'Teacher:'}[m.role] + '\\n' + m.content }}"
    "{% if m.role == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Teacher:\\n' }}{% endif %}"
)


def test_f15_a_header_of_plain_words_in_the_labels(bench: Bench) -> None:
    """Control: the mask as it should be, and answers that begin with other words."""
    tokenizer = with_template("chatml", PLAIN)
    header = len(tokenizer.encode("Teacher:\n"))

    def earlier(rows: list[Example]) -> list[Example]:
        return [replace(row, loss_mask=row.loss_mask | np.roll(row.loss_mask, -header)) for row in rows]

    found = bench.only("F15", talk(), tokenizer, earlier)
    assert found.severity == "error" and "in the prompt already" in found.message
    assert bench.codes(talk(), tokenizer) == []


def test_f15_of_conversations_that_cannot_be_rendered() -> None:
    """Control: answers without it, and chats whose questions have their headers too (F12)."""

    def codes(rows: list) -> list[str]:
        chats = [row["messages"] for row in rows]
        run_facts = RunFacts("a run", Settings({}), tokenizer=tiny_tokenizer("chatml"), conversations=chats)
        return [signal.code for signal in ask_all(run_facts)[0]]

    header = "<|im_start|>assistant\n"
    rows = answered(talk(), lambda n, text: header + text)
    assert "F15" in codes(rows) and "F15" not in codes(talk())
    for row in rows:
        row["messages"][0]["content"] = "<|im_start|>user\n" + row["messages"][0]["content"]
    assert "F15" not in codes(rows)
