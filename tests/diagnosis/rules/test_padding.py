"""S6: padding made by hand in many ways."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from tests.diagnosis.rules.batches import END, PAD, answers, chat, labelled, padded, run_facts_of, tokens_of, told

CHATS = [chat(n) for n in range(24)]


@pytest.fixture(scope="module")
def pairs(tokenizer):
    return labelled([tokens_of(tokenizer, messages) for messages in CHATS], answers)


def without_mask(batches):
    return [{key: value for key, value in batch.items() if key != "attention_mask"} for batch in batches]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("fill", [PAD, 7])
def test_labels_on_padding(tokenizer, pairs, left, fill):
    """The id of the padding, or another number."""
    assert told(run_facts_of(tokenizer, padded(pairs, left, fill=fill), CHATS)) == {"F29": "fault"}


def test_one_number_in_place_of_the_mask(tokenizer, pairs):
    """Also on the padding: it is the mask that is wrong (F20)."""
    filled = [(ids, [0 if label == -100 else label for label in labels]) for ids, labels in pairs]
    assert told(run_facts_of(tokenizer, padded(filled, fill=0), CHATS)) == {"F20": "fault"}


def test_labels_on_padding_that_is_the_end(tokenizer, pairs):
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    assert told(run_facts_of(same, padded(pairs, pad=END, fill=END), CHATS)) == {"F29": "fault"}
    assert told(run_facts_of(same, without_mask(padded(pairs, pad=END, fill=END)), CHATS)) == {"F29": "fault"}
    assert told(run_facts_of(same, padded(pairs, pad=END), CHATS)) == {}


@pytest.mark.parametrize("how", ["none", "ones", "inverted", "of the other side"])
def test_masks_that_are_missing_or_wrong(tokenizer, pairs, how):
    batches = padded(pairs, left=True)
    if how == "none":
        batches = without_mask(batches)
    for batch in batches if how != "none" else ():
        mask = batch["attention_mask"]
        batch["attention_mask"] = {"ones": torch.ones_like(mask), "inverted": 1 - mask}.get(how, mask.flip(1))
    assert told(run_facts_of(tokenizer, batches, CHATS)).get("F28") == "fault"
    assert "F29" not in told(run_facts_of(tokenizer, batches, CHATS))


def test_padding_with_the_end_of_text_where_there_is_no_other_token(tokenizer, pairs):
    """Control: on the right, where attention never reaches it, and the one end that each row has."""
    same = copy.deepcopy(tokenizer)
    same.pad_token = None
    left, right = (without_mask(padded(pairs, left=left, pad=END)) for left in (True, False))
    assert told(run_facts_of(same, left, CHATS)) == {"F28": "fault"}
    assert told(run_facts_of(same, right, CHATS)) == {}


def test_padding_that_does_no_harm(tokenizer, pairs):
    for batches in (padded(pairs), padded(pairs, left=True), without_mask(padded(pairs))):
        assert told(run_facts_of(tokenizer, batches, CHATS)) == {}
    begun = [([PAD, *ids], [-100, *labels]) for ids, labels in pairs]  # a beginning of text that is also the padding
    one_by_one = without_mask(padded(begun, size=1))
    assert told(run_facts_of(tokenizer, one_by_one, CHATS)) == {}


def test_left_padding_of_absolute_positions(tokenizer, pairs):
    batches = padded(pairs, left=True)
    gpt2 = replace(run_facts_of(tokenizer, batches, CHATS), model_config={"model_type": "gpt2"})
    assert told(gpt2) == {"F27": "fault"}
    for batch in batches:  # positions that count the padding
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand(batch["input_ids"].shape)
    assert told(replace(gpt2, batches=list(batches))) == {"F27": "fault"}
    for batch in batches:
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert told(replace(gpt2, batches=list(batches))) == {}


def test_the_first_token_after_left_padding(tokenizer, pairs):
    whole = [(ids, list(ids)) for ids, _ in pairs]
    facts = run_facts_of(tokenizer, padded(whole, left=True), CHATS, assistant_only_loss=False)
    assert told(facts) == {"F30": "fault"}
    assert told(run_facts_of(tokenizer, padded(whole), CHATS, assistant_only_loss=False)) == {}


@pytest.mark.parametrize("pad", [END, 1])
@pytest.mark.parametrize("named", [None, "<|endoftext|>"])
def test_padding_by_a_token_that_is_not_the_named_one(tokenizer, pairs, pad, named):
    """A collator by hand fills with the end of text, or with a number."""
    other = copy.deepcopy(tokenizer)
    other.pad_token = named
    left = without_mask(padded(pairs, left=True, pad=pad))
    assert told(run_facts_of(other, left, CHATS)).get("F28") == "fault"
    assert told(run_facts_of(other, without_mask(padded(pairs, pad=pad)), CHATS)) == {}


def test_rows_that_begin_alike_are_not_padded(tokenizer, pairs):
    """Three special tokens before each text: a format, of one length."""
    other = copy.deepcopy(tokenizer)
    other.pad_token = None
    begun = [([END] * 3 + ids, [-100] * 3 + labels) for ids, labels in pairs]
    assert "F28" not in told(run_facts_of(other, without_mask(padded(begun, size=1)), CHATS))


def test_padding_between_prompt_and_answer(tokenizer, pairs):
    """Prompts are padded to one length before the answers are appended."""

    def apart(ids, labels, fill):
        begin = next(at for at, label in enumerate(labels) if label != -100)
        gap = 40 - begin if fill else 0
        return ids[:begin] + [PAD] * gap + ids[begin:], labels[:begin] + [-100] * gap + labels[begin:]

    inside = padded([apart(*pair, True) for pair in pairs])
    assert told(run_facts_of(tokenizer, without_mask(inside), CHATS)).get("F28") == "fault"
    for batch in inside:
        batch["attention_mask"] = (batch["input_ids"] != PAD).long()
    assert "F28" not in told(run_facts_of(tokenizer, inside, CHATS))
    assert "F28" not in told(run_facts_of(tokenizer, without_mask(padded([apart(*p, False) for p in pairs])), CHATS))
