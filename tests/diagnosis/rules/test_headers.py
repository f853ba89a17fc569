"""S3, the header before an answer: in the labels, and in the data."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest

from solotune.dataset import Example
from solotune.diagnosis.rules import ask_all, rules
from solotune.diagnosis.run_facts import RunFacts, Settings
from tests.dataset.conftest import tiny_tokenizer
from tests.diagnosis.probed_models import Ward, chats, padded
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


def test_f15_labels_of_batches_that_begin_before_the_answer(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A base without a template. Controls: the mask as it should be, and a phrase that is the answers' own."""
    ward = Ward(tmp_path_factory.getbasetemp() / "ward")
    tokenizer = copy.deepcopy(ward.tokenizer)
    tokenizer.chat_template = None

    def found(begins: str, own: str = "") -> list[str]:
        talks = [[one[0], {**one[1], "content": own + one[1]["content"]}] for one in chats(6, 100)]
        rows = []
        for asked, said in talks:
            before, _, learned = f"Instruct:\n{asked['content']}\nOutput:\n{said['content']}".partition(begins)
            ids = [tokenizer.encode(text, add_special_tokens=False) for text in (before, begins + learned)]
            rows.append(([*ids[0], *ids[1], 2], [-100] * len(ids[0]) + [*ids[1], 2]))
        known = ward.run_facts([padded(rows, pad=2)], tokenizer=tokenizer, conversations=talks)
        return [signal.code for rule in rules()["F15"] if not rule.reads_rows for signal in rule.signals(known)]

    assert found("Output:\n") == ["F15"]
    assert found("Answer:", own="Answer: ") == []
