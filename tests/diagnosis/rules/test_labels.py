"""S4, from batches: labels made by hand in many ways. Each fault is told by its own rule alone, the rest by none."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from solotune.dataset import Example
from solotune.diagnosis.rules.labels import loss_of_no_labels
from solotune.diagnosis.run_facts import RunFacts, Settings, Trace
from tests.diagnosis.rules.batches import (
    END,
    IGNORED,
    PAD,
    answers,
    chat,
    labelled,
    padded,
    run_facts_of,
    tokens_of,
    told,
)

CHATS = [chat(n) for n in range(24)]


@pytest.fixture(scope="module")
def rows(tokenizer):
    return [tokens_of(tokenizer, messages) for messages in CHATS]


def is_text(row, at, role="assistant"):
    return row[at][1] == role and row[at][2] == "text"


def is_end(row, at):
    return row[at][2] == "end" and row[at][1] == "assistant"


def from_first_answer(row, at):
    """A search for the answer's marker that stops at the first: later questions are trained on."""
    return any(answers(row, place) for place in range(at + 1))


def all_but_three_of_the_end(row, at):
    return answers(row, at) and not any(is_end(row, place) for place in range(at, min(at + 3, len(row))))


MASKS = {
    # F20: prompts
    "all tokens": (lambda row, at: True, {"F20": "fault"}),
    "all but the first token": (lambda row, at: at > 0, {"F20": "fault"}),
    "all from the first answer on": (from_first_answer, {"F20": "fault"}),
    "users as well, without headers": (lambda row, at: is_text(row, at, "user") or answers(row, at), {"F20": "fault"}),
    # F23: inverted
    "inverted": (lambda row, at: not answers(row, at), {"F23": "fault"}),
    "inverted, without headers": (lambda row, at: is_text(row, at, "user"), {"F23": "fault"}),
    "inverted, with the ends of all": (lambda row, at: not is_text(row, at), {"F23": "fault"}),
    # F19: ends
    "without ends": (is_text, {"F19": "fault"}),
    "without ends, with the line break": (lambda row, at: is_text(row, at) or row[at][1:3] == ("assistant", "line"),
                                          {"F19": "fault"}),
    "off by one": (lambda row, at: at + 1 < len(row) and answers(row, at + 1), {"F19": "fault"}),
    "without the last three tokens": (all_but_three_of_the_end, {"F19": "fault"}),
    "without the end of the last answer": (lambda row, at: answers(row, at) and not (is_end(row, at) and row[at][3] > 1),
                                           {"F19": "fault"}),
    # F21: nothing
    "none": (lambda row, at: False, {"F18": "fault"}),
    # right, or another one's business
    "answers": (answers, {}),
    "answers and the line break": (lambda row, at: row[at][1] == "assistant" and row[at][2] != "header", {}),
    "answers and their headers": (lambda row, at: row[at][1] == "assistant", {}),
    "the last answer": (lambda row, at: answers(row, at) and row[at][3] == row[-1][3], {}),
    "the first answer": (lambda row, at: answers(row, at) and row[at][3] == 1, {}),
    "answers without their first token": (lambda row, at: answers(row, at) and answers(row, at - 1), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks(tokenizer, rows, name):
    has_label, expected = MASKS[name]
    assert told(run_facts_of(tokenizer, padded(labelled(rows, has_label)), CHATS)) == expected


def test_training_on_prompts_is_a_fault_if_only_answers_should_count_and_a_remark_if_that_is_not_known(tokenizer, rows):
    batches = padded(labelled(rows, lambda row, at: True))
    for asked, expected in ((True, {"F20": "fault"}), (None, {"F20": "remark"}), (False, {})):
        assert told(run_facts_of(tokenizer, batches, CHATS, assistant_only_loss=asked)) == expected


def test_prompts_of_a_format_without_headers_are_found_by_the_conversations(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    texts = [f"Q {a['content']} A {b['content']}" for a, b, *_ in CHATS]
    pairs = [([*bare.encode(text, add_special_tokens=False), END],) * 2 for text in texts]
    batches = padded([(list(ids), list(labels)) for ids, labels in pairs])
    assert told(run_facts_of(bare, batches, [messages[:2] for messages in CHATS])) == {"F20": "fault"}
    assert told(run_facts_of(bare, batches)) == {}, "texts without known chats may all be meant"


@pytest.mark.parametrize("key", ["loss_mask", "weights"])
def test_a_weight_of_zero_is_no_label(tokenizer, rows, key):
    """A custom loss: labels everywhere, and a weight for each token."""
    batches = padded(labelled(rows, lambda row, at: True))
    masks = padded(labelled(rows, answers))
    weighted = [{**b, key: (m["labels"] != IGNORED).float()} for b, m in zip(batches, masks, strict=True)]
    assert told(run_facts_of(tokenizer, weighted, CHATS)) == {}
    unused = [{**b, key: torch.ones_like(b["labels"])} for b in batches]
    assert told(run_facts_of(tokenizer, unused, CHATS)) == {"F20": "fault"}


@pytest.mark.parametrize("value", [0, 1, END])
def test_another_number_than_the_ignored_one(tokenizer, rows, value):
    batches = padded(labelled(rows, answers))
    for batch in batches:
        masked = (batch["labels"] == IGNORED) & (batch["attention_mask"] == 1)
        batch["labels"] = torch.where(masked, value, batch["labels"])
    assert told(run_facts_of(tokenizer, batches, CHATS)) == {"F20": "fault"}


def test_ends_masked_by_the_id_of_the_padding(tokenizer, rows):
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    for mask in (answers, lambda row, at: True):
        asked = mask is answers
        by_id = labelled(rows, lambda row, at, mask=mask: mask(row, at) and row[at][0] != END)
        facts = run_facts_of(same, padded(by_id, pad=END), CHATS, assistant_only_loss=asked)
        assert told(facts) == {"F17": "fault"}
        by_place = padded(labelled(rows, mask), pad=END)
        assert told(run_facts_of(same, by_place, CHATS, assistant_only_loss=asked)) == {}
        one_by_one = padded(by_id, pad=END, size=1)  # without any padding
        assert told(run_facts_of(same, one_by_one, CHATS, assistant_only_loss=asked)) == {"F17": "fault"}


def test_a_part_of_the_rows_is_a_fault_from_a_third_on(tokenizer, rows):
    for every, word in ((2, "fault"), (3, "fault"), (8, "remark")):
        without = labelled(rows, answers)
        for ids, labels in without[::every]:
            labels[:] = [IGNORED] * len(ids)
        assert told(run_facts_of(tokenizer, padded(without), CHATS)) == {"F21": word}
        open_ = labelled(rows, answers)
        for _, labels in open_[::every]:
            labels[:] = [IGNORED if label == END else label for label in labels]
        assert told(run_facts_of(tokenizer, padded(open_), CHATS)) == {"F19": word}


@pytest.mark.parametrize("shift", [1, -1, 2])
@pytest.mark.parametrize("mask", ["answers", "all"])
def test_shifted_labels(tokenizer, rows, shift, mask):
    batches = padded(labelled(rows, answers if mask == "answers" else lambda row, at: True))
    for batch in batches:
        batch["labels"] = torch.roll(batch["labels"], -shift, dims=1)
    facts = run_facts_of(tokenizer, batches, CHATS, assistant_only_loss=mask == "answers")
    assert told(facts).get("F22") == "fault" and "F20" not in told(facts)


def test_inputs_without_the_last_token_and_labels_without_the_first(tokenizer, rows):
    pairs = [(ids[:-1], labels[1:]) for ids, labels in labelled(rows, answers)]
    assert told(run_facts_of(tokenizer, padded(pairs), CHATS)) == {"F22": "fault"}


def test_what_a_tool_says_is_neither_the_users_nor_an_answer(tokenizer):
    chats = [chat(n, roles=("user", "assistant", "tool", "assistant")) for n in range(24)]
    rows = [tokens_of(tokenizer, messages) for messages in chats]
    assert told(run_facts_of(tokenizer, padded(labelled(rows, answers)), chats)) == {}
    everything = padded(labelled(rows, lambda row, at: True))
    assert told(run_facts_of(tokenizer, everything, chats)) == {"F20": "fault"}


def test_a_system_message_and_a_chat_that_ends_with_the_user(tokenizer):
    chats = [
        [{"role": "system", "content": "be brief"}, *chat(n), {"role": "user", "content": "bye"}] for n in range(24)
    ]
    rows = [tokens_of(tokenizer, messages) for messages in chats]
    assert told(run_facts_of(tokenizer, padded(labelled(rows, answers)), chats)) == {}


def test_two_end_tokens(tokenizer, rows):
    """<|im_end|>, and <|endoftext|> at the end of the row: the first one ends the answer, with or without the other."""
    both = [[*row, (PAD, "assistant", "end", 3)] for row in rows]
    other = copy.deepcopy(tokenizer)
    other.pad_token = "<|im_start|>"
    for mask in (answers, lambda row, at: answers(row, at) and row[at][0] != PAD):
        assert told(run_facts_of(other, padded(labelled(both, mask), pad=1), CHATS)) == {}
    assert told(run_facts_of(other, padded(labelled(both, is_text), pad=1), CHATS)) == {"F19": "fault"}


def test_padding_that_is_also_an_end_is_told_by_the_known_rows(tokenizer, rows):
    """Batches without a mask: of a run of pads, the first is no end of a row that is known to have none."""
    own = copy.deepcopy(tokenizer)
    own.pad_token = own.eos_token
    endless = [[t for t in row if t[1] == "user" or t[2] not in ("end", "line")] for row in rows]
    pairs = labelled(endless, lambda row, at: is_text(row, at) or is_end(row, at))
    batches = [{k: v for k, v in batch.items() if k != "attention_mask"} for batch in padded(pairs, pad=END)]
    train = [Example(np.array(ids, np.int32), np.array(labels) >= 0, "row", []) for ids, labels in pairs]
    assert "F17" not in told(replace(run_facts_of(own, batches, CHATS), train=train))


@pytest.mark.parametrize(
    ("loss", "norm", "held_out", "is_found"),
    [(0.0, 0.0, np.nan, True), (0.0, np.nan, np.nan, False), (0.0, 0.0, 2.3, False), (1e-4, 0.0, np.nan, False)],
)
def test_f21_by_a_log_of_nothing(loss: float, norm: float, held_out: float, is_found: bool) -> None:
    """A loss of exactly 0 with a gradient of exactly 0; one that overflowed has a gradient that is no number."""
    steps = np.arange(1, 6)
    trace = Trace(steps, steps * 0 + loss, steps * 1e-4, steps * 0 + norm, steps / 5, steps[-1:], np.array([held_out]),
                  5, True)  # fmt: skip
    run_facts = RunFacts("a run", Settings({}), trace=trace)
    assert (loss_of_no_labels(run_facts) is not None) == is_found
