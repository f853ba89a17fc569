"""What batches show: the rules on labels, padding and packing, and the probes P2 and P3 that confirm them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
import transformers
from tiny import FAMILIES

from solotune.dataset.example import Example
from solotune.diagnosis.facts.texts import Batches
from solotune.diagnosis.probes.batch_isolation import packed_against_alone, padded_against_alone
from solotune.diagnosis.probes.skipped import Skipped
from solotune.diagnosis.rules import rules
from tests.diagnosis.probed_models import Ward, chats, packed, padded, render

END, PAD = 2, 0  # <|im_end|>, which is also the tokenizer's pad; <|endoftext|>
ABOUT_BATCHES = [f"F{n}" for n in (17, 18, 19, 20, 21, 22, 23, 27, 28, 29, 30, 31, 32, 33)]


@pytest.fixture(scope="module")
def ward(tmp_path_factory):
    return Ward(tmp_path_factory.getbasetemp() / "ward")  # one for both files: it is pretrained for seconds


def told(run_facts) -> set[str]:
    """Codes that the rules on batches speak for."""
    found = set()
    for code in ABOUT_BATCHES:
        for rule in rules()[code]:
            if rule.lacks(run_facts) is None and (signal := rule.ask(run_facts)):
                found.add(signal.code)
    return found


def batches_of(rows, **how):
    return [padded(rows[i : i + 4], pad=END, **how) for i in range(0, len(rows), 4)]


def relabelled(rows, label):
    return [(ids, [label(t, ids, labels) for t in range(len(ids))]) for ids, labels in rows]


LABELS = {
    "F17": lambda t, ids, labels: -100 if ids[t] == END else labels[t],
    "F20": lambda t, ids, labels: ids[t],
    "F21": lambda t, ids, labels: -100,
    "F22": lambda t, ids, labels: ids[t + 1] if labels[t] != -100 and t + 1 < len(ids) else -100,
    "F23": lambda t, ids, labels: ids[t] if labels[t] == -100 else -100,
}


@pytest.mark.parametrize("code", LABELS)
def test_a_fault_of_labels_is_told_by_its_own_rule_alone(ward, code):
    rows = relabelled(ward.rows(), LABELS[code])
    run_facts = ward.run_facts(batches_of(rows))
    if code == "F21":
        run_facts = ward.run_facts(batches_of(rows), settings={"response_template": "### Answer: "})
    assert told(run_facts) == {code}


def test_a_template_without_markers_that_leaves_no_label(ward):
    rows = relabelled(ward.rows(), LABELS["F21"])
    assert told(ward.run_facts(batches_of(rows))) == {"F18"}


def test_an_end_that_is_masked_and_is_not_the_pad(ward):
    import copy

    tokenizer = copy.deepcopy(ward.tokenizer)
    tokenizer.pad_token = "<|endoftext|>"
    rows = relabelled(ward.rows(), LABELS["F17"])
    batches = [padded(rows[i : i + 4], pad=PAD) for i in range(0, 16, 4)]
    assert told(replace(ward.run_facts(batches), tokenizer=tokenizer)) == {"F19"}


def test_healthy_batches_are_not_accused(ward):
    """pad = eos masked by position, left padding with a mask on a rotary model, packing with restarting positions."""
    rows = ward.rows()
    config = {"model_type": "llama"}
    for batches in (batches_of(rows), batches_of(rows, left=True), [packed(rows[:3]), packed(rows[3:6])]):
        assert told(ward.run_facts(batches, model_config=config)) == set()
    everything = relabelled(rows, LABELS["F20"])
    assert told(ward.run_facts(batches_of(everything), settings={"assistant_only_loss": False})) == set()


def test_labels_on_pads_and_behind_them(ward):
    rows = ward.rows()
    batch = padded(rows[6:10], pad=END)
    batch["labels"] = torch.where(batch["attention_mask"] == 0, END, batch["labels"])
    assert told(ward.run_facts([batch])) == {"F29"}
    whole = relabelled(rows, LABELS["F20"])
    run_facts = ward.run_facts(batches_of(whole, left=True), settings={"assistant_only_loss": False})
    assert told(run_facts) == {"F30"}


def test_labels_of_zero_instead_of_a_mask(ward):
    rows = relabelled(ward.rows(), lambda t, ids, labels: max(labels[t], 0))
    assert told(ward.run_facts(batches_of(rows))) == {"F20"}


def test_pads_that_are_attended(ward):
    batches = batches_of(ward.rows(), left=True, mask=False)
    assert told(ward.run_facts(batches)) == {"F28"}
    signals, found = padded_against_alone(ward.live(batches=batches), ward.run_facts(batches), 5.0)
    assert [(s.code, s.kind) for s in signals] == [("F28", "counterfactual")]
    assert found["difference"] > 0.05 > found["with_mask_and_positions"]


def test_absolute_positions_behind_left_padding(ward):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["gpt2"]())
    model.transformer.wpe.weight.data.normal_(std=0.5)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"))
    batches = batches_of(ward.rows(), left=True)
    run_facts = ward.run_facts(batches, model_config={"model_type": "gpt2"})
    assert told(run_facts) == {"F27"}
    signals, found = padded_against_alone(ward.live(model, batches), run_facts, 5.0)
    assert [(s.code, s.kind) for s in signals] == [("F27", "counterfactual")], found
    right = batches_of(ward.rows())
    signals, _ = padded_against_alone(ward.live(model, right), replace(run_facts, batches=right), 5.0)
    assert all(s.against for s in signals)


@pytest.mark.parametrize(("how", "codes"), [({"restart": False}, {"F31"}), ({"mask": True}, {"F31"}), ({}, set())])
def test_packs_whose_rows_see_each_other(ward, how, codes):
    rows = ward.rows()
    batches = [packed(rows[:3], **how), packed(rows[3:6], **how)]
    examples = [_example(ward, chat) for chat in chats(16, 100)]
    run_facts = ward.run_facts(batches, train=examples)
    assert told(run_facts) == codes
    signals, found = packed_against_alone(ward.live(batches=batches), run_facts, 5.0)
    if codes:
        assert [(s.code, s.kind) for s in signals] == [("F31", "counterfactual")]
        assert found["difference"] > 0.05 > found["apart"]
    else:
        assert all(s.against for s in signals) and found["difference"] < 1e-3


def test_blocks_without_restarting_positions(ward):
    rows = ward.rows()[:3]
    batch = packed(rows, restart=False)
    number = torch.tensor([n for n, (ids, _) in enumerate(rows) for _ in ids])
    length = len(number)
    allowed = (number[:, None] == number[None]) & torch.ones(length, length).tril().bool()
    batch["attention_mask"] = torch.zeros(1, 1, length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)
    run_facts = ward.run_facts([batch])
    assert told(run_facts) == {"F32"}
    signals, found = packed_against_alone(ward.live(batches=[batch]), run_facts, 5.0)
    assert found["difference"] < 1e-3 and all(s.against and s.code == "F31" for s in signals)  # rotary: relative


def test_packing_that_cuts_rows(ward):
    rows = ward.rows()
    cut = [packed([rows[i], (rows[i + 1][0][:-5], rows[i + 1][1][:-5])]) for i in range(0, 12, 2)]
    assert told(ward.run_facts(cut)) == {"F33"}


def test_a_batch_without_padding_has_nothing_to_compare(ward):
    batch = padded([ward.rows()[0]], pad=END)
    with pytest.raises(Skipped):
        padded_against_alone(ward.live(batches=[batch]), ward.run_facts([batch]), 5.0)


def test_documents_are_found_as_claimed_and_as_seen(ward):
    rows = ward.rows()[:3]
    claimed = Batches([packed(rows)], END, single=frozenset({END}))
    assert [d.ids.tolist() for d in claimed.documents] == [ids for ids, _ in rows]
    seen = Batches([packed(rows, restart=False)], END, frozenset({END}), rows=[np.array(ids) for ids, _ in rows])
    assert [d.ids.tolist() for d in seen.documents] == [ids for ids, _ in rows]
    turns = [[*one, *other] for one, other in itertools.pairwise(chats(20, 100)[:4])]  # begin as single ones do
    known = [np.array(render(ward.tokenizer, chat)[0]) for chat in turns]
    whole = Batches([padded([render(ward.tokenizer, chat) for chat in turns], pad=PAD)], PAD, rows=known)
    assert [d.ids.tolist() for d in whole.documents] == [ids.tolist() for ids in known], "turns are no documents"
    rows = ward.rows()[6:10]  # of several lengths
    left = Batches([padded(rows, pad=END, left=True, mask=False)], END, single=frozenset({END}))
    assert [d.ids.tolist() for d in left.documents] == [ids for ids, _ in rows]


def _example(ward, chat) -> Example:
    ids, labels = render(ward.tokenizer, chat)
    return Example(np.array(ids, np.int32), np.array(labels) != -100, "chats.jsonl:1", chat)
