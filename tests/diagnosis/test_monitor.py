"""The watch over a run of ours: silent over healthy ones, and one line for each thing that is wrong."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from tiny import metrics_of, random_rows

from solotune.diagnosis import monitor as watching
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.monitor import Monitor
from solotune.diagnosis.run_facts import RunFacts, Settings
from solotune.diagnosis.sources import solotune_run
from solotune.display.observer import Observers, SilentObserver
from solotune.model.loading import load_model
from solotune.run.events import StepEvent
from solotune.run.record import RunRecord
from solotune.run.run_dir import RunDirectory
from solotune.run.run_log import RunLog
from solotune.training import loop

CPU = torch.device("cpu")


class Told(SilentObserver):
    def __init__(self):
        self.lines = []

    def diagnosed(self, event, text):
        self.lines.append(text)


def watched(config, tmp_path, before=lambda model: None, findings=()):
    """The lines that the watch wrote over a whole training, and the watch."""
    run = RunDirectory.create(str(tmp_path / "run"))
    model = load_model(config, CPU, torch.float32)
    before(model)
    rows, told = random_rows(12), Told()
    run_facts = RunFacts("test", solotune_run.settings_of(config), findings=findings)
    watch = Monitor(model, run_facts, Observers(RunLog(run), told), RunRecord.read(run.path))
    loop.train(model, rows[:8], rows[8:], config, run, watch)
    logged = [event["code"] for event in metrics_of(run) if event["event"] == "diagnosed"]
    assert len(logged) == len(told.lines)
    return told.lines, watch


@pytest.mark.parametrize("keys", [{}, {"warmup_steps": 1}, {"optim": "adamw_8bit"}], ids=str)
def test_a_healthy_run_is_left_alone(keys, tiny_config, tmp_path):
    said, watch = watched(tiny_config(max_steps=4, learning_rate=1e-3, **keys), tmp_path)
    assert said == []
    assert watch._num_updates == 2  # so it did look


def test_adapters_without_gradient_are_named_at_the_first_update(tiny_config, tmp_path):
    def cut_off(model):
        model.flat_params.data.zero_()  # A = B = 0: no gradient reaches either

    said, _ = watched(tiny_config(max_steps=3, learning_rate=1e-3), tmp_path, cut_off)
    assert len(said) == 1
    assert said[0].startswith("F57 no-gradient: lora_B of 14 of 14 layers did not change in update 1")


def test_one_layer_that_is_cut_off_is_named(tiny_config, tmp_path):
    def cut_off(model):
        layer = model.lora_layers["model.layers.0.self_attn.q_proj"]
        layer.lora_A.register_hook(torch.zeros_like)
        layer.lora_B.register_hook(torch.zeros_like)

    said, _ = watched(tiny_config(max_steps=3, learning_rate=1e-3), tmp_path, cut_off)
    assert "F57" in said[0] and "1 of 14 layers" in said[0] and "layers.0.self_attn.q_proj" in said[0]


def test_updates_that_are_rounded_away_are_named(tiny_config, tmp_path, monkeypatch):
    class Rounding(torch.optim.AdamW):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.copy_(parameter.data.bfloat16())

    def in_16_bits(model):
        model.flat_params.data.copy_(model.flat_params.data.bfloat16())

    monkeypatch.setattr(loop, "make_optimizer", lambda config, ps: Rounding(ps, lr=config.learning_rate))
    said, _ = watched(tiny_config(max_steps=3, learning_rate=1e-5), tmp_path, in_16_bits)
    assert len(said) == 1 and said[0].startswith("F54 updates-lost")
    said, _ = watched(tiny_config(max_steps=3, learning_rate=1e-2), tmp_path / "high", in_16_bits)
    assert said == []


def test_a_first_loss_above_guessing_is_a_doubt(tiny_config, tmp_path):
    def confuse(model):
        model.module.lm_head.weight.data.mul_(40)

    said, _ = watched(tiny_config(max_steps=1), tmp_path, confuse)
    assert said[0].startswith("perhaps F04 wrong-tokenizer") and "4.85" in said[0]


def test_evaluations_ask_the_rules_on_the_curve_and_each_fault_is_told_once(tiny_config, tmp_path, monkeypatch):
    asked = []

    def ask_all(run_facts):
        if run_facts.trace is None:  # before the run
            return [], {}
        asked.append(len(run_facts.trace.step_S))
        assert run_facts.trace.eval_step_E[-1] == asked[-1] and np.isfinite(run_facts.trace.loss_S).all()
        return [Signal("F65", "invariant", "the rate rises for 9 steps", 0.9, fix="warmup_ratio: 0.03")], {}

    monkeypatch.setattr(watching, "ask_all", ask_all)
    config = tiny_config(max_steps=4, eval_steps=2, learning_rate=1e-3)
    said, _ = watched(config, tmp_path)
    assert asked == [2, 4]
    assert said == ["F65 warmup-too-long: the rate rises for 9 steps → warmup_ratio: 0.03 (solotune explain F65)"]
    for severity, words in (("error", []), ("warning", said), ("info", said)):  # a remark that became a fault is told
        known = Finding("F65", "warmup-too-long", "S13", severity, "", {}, "")
        assert watched(config, tmp_path / severity, findings=[known])[0] == words


def test_remarks_are_told_as_remarks_and_only_if_the_data_did_not_say_them(tiny_config, tmp_path, monkeypatch):
    remark = Signal("F24", "remark", "9 of 99 answers are truncated", 0.3, fix="max_length: 512")
    doubt = Signal("F46", "measured", "the held-out loss rises", 0.3)
    monkeypatch.setattr(watching, "ask_all", lambda run_facts: ([remark, doubt], {}))
    config = tiny_config(max_steps=2, eval_steps=1, learning_rate=1e-3)
    said, _ = watched(config, tmp_path)
    assert said == [
        "remark F24 answers-cut: 9 of 99 answers are truncated → max_length: 512 (solotune explain F24)",
    ]
    known = Finding("F24", "answers-cut", "S5", "warning", "", {}, "")
    assert watched(config, tmp_path / "again", findings=[known])[0] == []


def test_it_costs_less_than_a_hundredth_of_a_step(tiny_config, tmp_path):
    config = tiny_config(max_steps=200)
    model = load_model(config, CPU, torch.float32)
    watch = Monitor(model, RunFacts("test", Settings({})), Told(), RunRecord.read(tmp_path))
    watch.begin(200)
    figures = StepEvent(1, 200, 0.1, 2.0, 0.1, 1e-3, 1.0, 99, 9, 9.0, 0.1, 990.0, 0)
    model.flat_params.data.add_(1.0)
    started = time.process_time()  # what else runs on the machine does not count
    for _ in range(200):
        watch.step(figures)
    assert (time.process_time() - started) / 200 < 0.01 * 0.1  # of steps of a tenth of a second
