"""A flat run: its cause by the order of questions, or the task's floor, or noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from solotune import dataset
from solotune.config.load import load_config
from solotune.diagnosis import probes
from solotune.diagnosis.evidence import Probed, Signal
from solotune.diagnosis.plateau import plateau, shape_of
from solotune.diagnosis.run_facts import RunFacts, Settings, Trace
from solotune.diagnosis.sources.live_model import load_live_model
from solotune.diagnosis.sources.solotune_run import from_prepared
from solotune.hub.model_files import resolve_model
from solotune.training import trained_run

STEPS = np.arange(1, 201)
FLAT = 2.4 + 2 * np.exp(-STEPS / 10) + 0.03 * np.random.default_rng(0).standard_normal(200)


def run(loss=FLAT, rate=None, **settings):
    rate = np.full(200, 2e-3) if rate is None else rate
    none = np.array([])
    trace = Trace(STEPS, loss, rate, np.full(200, 0.5), STEPS / 100, none, none, 200, True)
    return RunFacts("a run", Settings({"learning_rate": 2e-3, **settings}), trace=trace)


CASES = {
    "F64": (run(), [Signal("F64", "counterfactual", "more at ten times", 0.8, expect="4 times the gain")]),
    "F22": (run(), [Signal("F64", "measured", "", 0.8), Signal("F22", "invariant", "", 0.9)]),  # asked first
    "F65": (run(rate=2e-3 * STEPS / 200), []),
    "F66": (run(rate=np.where(STEPS < 60, 2e-3, 0.0)), []),
    "F68": (run(max_grad_norm=1e-8), []),
    "F69": (run(weight_decay=100.0), []),
    "floor": (run(max_grad_norm=1e-4, weight_decay=0.1), []),
}


@pytest.mark.parametrize("cause", CASES)
def test_the_first_question_with_an_answer_is_the_cause(cause):
    run_facts, signals = CASES[cause]
    found = Probed(list(signals))
    said = plateau(run_facts, found)
    assert found.measurements["plateau"]["cause"] == cause
    assert {s.code for s in said} == ({cause} if cause != "floor" else set())
    if cause == "F64":
        assert found.measurements["plateau"]["expected"] == "4 times the gain"


def test_a_run_that_still_falls_is_not_flat():
    found = Probed([])
    assert plateau(run(4.0 - STEPS / 100), found) == [] and not found.measurements["plateau"]["is_flat"]
    assert shape_of(None) is None


def test_our_own_training_as_a_live_one(chat_config):
    config, machine, _ = trained_run.resolve_for_machine(load_config({**chat_config, "learning_rate": 2e-3}))
    tokenizer = dataset.load_tokenizer(config)
    prepared = dataset.prepare(config, tokenizer)
    live = load_live_model(config, machine, tokenizer, prepared.train, prepared.validation)
    before = {name: p.clone() for name, p in live.model.named_parameters()}
    found = probes.run_all(live, from_prepared(config, tokenizer, prepared, [], resolve_model(config)), 4.0)
    assert [s for s in found.signals if not s.against and s.code not in ("F62", "F64")] == []  # rates of a random model
    assert found.measurements["P9"]["from_tokens"] < 1e-4
    assert all(torch.equal(p, before[name]) for name, p in live.model.named_parameters())
