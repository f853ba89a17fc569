"""S7: packs made by hand. Rows that are cut are found by comparison with the rows, and no whole row is taken for one."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from solotune.dataset import Example
from solotune.diagnosis.run_facts import RunFacts
from tests.diagnosis import probed_models
from tests.diagnosis.probed_models import tokenizer_at
from tests.diagnosis.rules.batches import END, answers, chat, labelled, run_facts_of, tokens_of, told

CHATS = [chat(n) for n in range(24)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Any:
    return copy.deepcopy(tokenizer_at(tmp_path_factory.getbasetemp() / "ward"))


@pytest.fixture(scope="module")
def pairs(tokenizer):
    return labelled([tokens_of(tokenizer, messages) for messages in CHATS], answers)


def packs(pairs, size=3, **how):
    return [probed_models.packed(pairs[i : i + size], **how) for i in range(0, len(pairs), size)]


def with_rows(run_facts: RunFacts, pairs, **settings) -> RunFacts:
    rows = [Example(np.array(ids, np.int32), np.array(labels) != -100, f"chats.jsonl:{n}", [])
            for n, (ids, labels) in enumerate(pairs, 1)]  # fmt: skip
    values = {**run_facts.settings.values, "packing": True, **settings}
    return replace(run_facts, train=rows, settings=replace(run_facts.settings, values=values))


def cut(pairs, every=3, ids=slice(-5)):
    return [(i[ids], labels[ids]) if n % every == every - 1 else (i, labels) for n, (i, labels) in enumerate(pairs)]


@pytest.mark.parametrize("part", [slice(-5), slice(-9), slice(6, None)], ids=str)
@pytest.mark.parametrize("known", [True, False])
def test_rows_that_are_cut(tokenizer, pairs, part, known):
    facts = run_facts_of(tokenizer, packs(cut(pairs, ids=part)), CHATS)
    if known:
        assert told(with_rows(facts, pairs)) == {"F33": "fault"}
    elif part.stop:  # without the rows, only a missing end is seen
        assert told(facts) == {"F33": "fault"}


def test_few_rows_that_are_cut_are_a_remark(tokenizer, pairs):
    assert told(with_rows(run_facts_of(tokenizer, packs(cut(pairs, every=12)), CHATS), pairs)) == {"F33": "remark"}


def test_whole_rows_without_an_end(tokenizer, pairs):
    """Rows that were truncated before, or that have no end: whole ones for the packing."""
    open_ = cut(pairs)
    facts = run_facts_of(tokenizer, packs(open_), CHATS)
    assert told(with_rows(facts, open_)) == {}
    assert told(with_rows(facts, open_, tool="solotune")) == {}
    assert told(with_rows(facts, open_, sft={"packing": True, "packing_strategy": "bfd_split"})) == {}


def test_a_row_that_begins_another_one_is_whole(tokenizer, pairs):
    """Chats of which every beginning is a row, too; the last rows are not among those that are looked up first."""
    begun = [(ids[: ids.index(END, ids.index(END) + 1) + 1], labels) for ids, labels in pairs]
    begun = [(ids, labels[: len(ids)]) for ids, labels in begun]
    from solotune.diagnosis.rules import packing

    facts = run_facts_of(tokenizer, packs(begun), CHATS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "NUM_KNOWN", len(pairs))
        assert told(with_rows(facts, [*pairs, *begun])) == {}
        assert told(with_rows(facts, pairs)) == {"F33": "fault"}


def test_packs_that_are_not_kept_apart(tokenizer, pairs):
    for how, expected in (({"restart": False}, {"F31": "fault"}), ({"mask": True}, {"F31": "fault"}), ({}, {})):
        assert told(with_rows(run_facts_of(tokenizer, packs(pairs, **how), CHATS), pairs)) == expected
