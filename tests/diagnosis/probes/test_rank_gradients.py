"""P15: the gradient of several ranks, exchanged rightly and in every wrong way."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from tiny import FAMILIES

from solotune.diagnosis.probes.rank_gradients import exchanged_against_whole
from solotune.diagnosis.probes.skipped import Skipped
from solotune.diagnosis.run_facts import LiveModel, RunFacts, Settings

LENGTHS = (3, 6, 12, 24)
EXCHANGED = {"all": lambda g, rank: g.mean(0), "sum": lambda g, rank: g.sum(0), "none": lambda g, rank: g[rank]}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def batches(lengths=LENGTHS):
    found = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, 100, (1, 30), generator=torch.Generator().manual_seed(number))
        found.append({"input_ids": ids, "labels": torch.where(torch.arange(30) < 30 - length, -100, ids)})
    return found


def step_of_ranks(exchange="all", divides_by="all", accumulation=None):
    """A training loop of several ranks: what each divides by, and what they exchange."""

    def backward(model, of_ranks):
        counts = [sum(int((b["labels"][:, 1:] != -100).sum()) for b in own) for own in of_ranks]
        gradients = []
        for own, count in zip(of_ranks, counts, strict=True):
            model.zero_grad()
            for batch in own:
                mean = model(**batch).loss / (accumulation or len(own))
                factor = {"all": count * len(counts) / sum(counts), "own": 1, "twice": count / sum(counts)}[divides_by]
                (mean * factor).backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        trained = [p for p in model.parameters() if p.grad is not None]
        for place, (p, *own) in enumerate(zip(trained, *gradients, strict=True)):
            how = exchange if exchange != "half" else "all" if place < len(trained) / 2 else "none"
            p.grad = EXCHANGED[how](torch.stack(own), 0)

    return backward


def probed(model, backward, ranks=2, lengths=LENGTHS, **settings):
    live = LiveModel(model, batches(lengths), backward_of_ranks=backward)
    run_facts = RunFacts("ranks", Settings({"world_size": ranks, **settings}))
    signals, found = exchanged_against_whole(live, run_facts, 5.0)
    assert all(p.grad is None for p in model.parameters()), "left as it was"
    return {(s.code, "against" if s.against else s.kind) for s in signals}, found


HEALTHY = {("F79", "against"), ("F80", "against")}


@pytest.mark.parametrize(
    ("how", "ranks", "expected"),
    [
        ({}, 2, HEALTHY),
        ({}, 4, HEALTHY),
        ({"exchange": "none"}, 2, {("F79", "invariant")}),
        ({"exchange": "none", "divides_by": "own"}, 4, {("F79", "invariant")}),
        ({"exchange": "half"}, 2, {("F79", "invariant")}),
        ({"divides_by": "own"}, 2, {("F79", "against"), ("F80", "measured")}),
        ({"divides_by": "own"}, 4, {("F79", "against"), ("F80", "measured")}),
        ({"exchange": "sum"}, 4, {("F79", "against"), ("F80", "invariant")}),
        ({"divides_by": "twice"}, 3, {("F79", "against"), ("F80", "invariant")}),
        ({"exchange": "sum", "divides_by": "twice"}, 3, HEALTHY),  # summed, of parts of one mean
    ],
)
def test_ways_to_exchange(model, how, ranks, expected):
    told, found = probed(model, step_of_ranks(**how), ranks)
    assert told == expected, found
    assert found["labels"][0] == 3 and found["labels"][-1] == 24, "as unequal as there are"


def test_ranks_with_equally_many_labels_may_divide_by_their_own(model):
    assert probed(model, step_of_ranks(divides_by="own"), lengths=(9, 9, 9))[0] == HEALTHY


def test_a_step_has_as_many_micro_batches_as_in_training(model):
    fixed = step_of_ranks(accumulation=4)  # the loss is divided by a setting, not by what is there
    assert probed(model, fixed, gradient_accumulation_steps=4)[0] == HEALTHY
    summed = step_of_ranks(accumulation=1)  # F74, which P9 finds: it would look like a sum over two ranks
    assert ("F80", "invariant") not in probed(model, summed, gradient_accumulation_steps=2)[0]


def test_what_it_cannot_do_is_said(model):
    for parts, why in (
        ({"ranks": 40}, "at most 16 ranks"),
        ({"ranks": 5}, "4 batches have labels"),
        ({"gradient_accumulation_steps": 64}, "64 micro-batches"),
    ):
        with pytest.raises(Skipped, match=why):
            probed(model, step_of_ranks(), **parts)
    with pytest.raises(Skipped, match="not known"):
        probed(model, None)
