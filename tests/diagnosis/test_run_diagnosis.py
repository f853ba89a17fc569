"""A whole examination of trainings that really run: a PEFT loop on a tiny model, healthy and with one thing wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from tiny import VOCAB
from transformers import AutoModelForCausalLM

from solotune.diagnosis.run_diagnosis import examine
from solotune.diagnosis.run_facts import LiveModel, RunFacts, Settings, Trace
from solotune.errors import InputError

RATE = 3e-3


def rows(seed, count=4):
    """int64 (count, 12): each counts up in steps of its own, which a model can know."""
    generator = torch.Generator().manual_seed(seed)
    start, step = (torch.randint(3, high, (count, 1), generator=generator) for high in (VOCAB, 8))
    return 3 + (start + step * torch.arange(12)) % (VOCAB - 3)


def batches(count=2, shift=0):
    made = []
    for seed in range(count):
        ids = rows(seed)
        labels = ids.roll(-shift, 1)
        labels[:, :6] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


@pytest.fixture(scope="module")
def base(model_folder, tmp_path_factory):
    """A tiny model that has learned to count."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        ids = rows(100 + step, 32)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 3  # of log V = 4.85
    folder = tmp_path_factory.mktemp("counts")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def run_facts(base):
    """A training of another tool: settings, batches, a model with adapters, a trace of twenty steps."""

    def make(shift=0, frozen=False):
        def live():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            targets = ["q_proj", "v_proj"]
            model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
            for name, parameter in model.named_parameters():
                if frozen and "lora_" in name:
                    parameter.requires_grad_(False)
            return LiveModel(model, batches(shift=shift), lambda ps: torch.optim.AdamW(ps, lr=RATE))

        steps = np.arange(1, 21)
        falling = 4.8 * np.exp(-steps / 30)
        settings = {"learning_rate": RATE, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"]}
        return RunFacts(
            "theirs",
            Settings(settings),
            trace=Trace(
                steps, falling, np.full(20, RATE), np.ones(20), steps / 20, steps[:0], falling[:0], 20, is_finished=True
            ),
            live=live,
        )

    return make


def test_labels_that_are_not_their_tokens_are_named_by_rules_and_probes(run_facts):
    found = examine(run_facts(shift=1), budget=10)
    assert found.verdict == "fault" and found.culprits[0].fault == "F22", found
    assert {"rules", "loading"} <= set(found.cost)
    assert found.culprits[0].evidence and found.culprits[0].fix


def test_frozen_adapters_are_named(run_facts):
    found = examine(run_facts(frozen=True), budget=10)
    assert found.verdict == "fault" and found.culprits[0].fault in ("F57", "F58"), found


def test_without_its_model_the_rules_answer_and_what_is_open_is_said(run_facts):
    def absent():
        raise InputError("out/: the base is not on this machine", seen="meta-llama/Llama-3.1-8B")

    def too_large():
        raise MemoryError

    for live, why in ((absent, "not on this machine"), (too_large, "too large"), (None, "no model")):
        found = examine(replace(run_facts(), live=live))
        assert found.skipped and all(why in reason for reason in found.skipped.values())
        assert "loading" not in found.cost
        assert found.verdict == "healthy" and any("--dataset" in one for one in found.not_checked)


def test_no_budget_loads_nothing(run_facts):
    def loaded():
        raise AssertionError("loaded")

    found = examine(replace(run_facts(), live=loaded), budget=0)
    assert set(found.skipped.values()) == {"--budget 0 turns model probes off"}


def test_an_empty_trace_is_no_ground_for_healthy():
    none = np.array([])
    empty = Trace(none, none, none, none, none, none, none, None, is_finished=False)
    found = examine(RunFacts("empty", Settings({}), trace=empty))
    assert found.verdict == "undecided" and found.next_experiment
