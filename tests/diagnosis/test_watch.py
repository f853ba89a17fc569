"""The watch over a run of ours: silent over healthy ones, and one line for each thing that is wrong."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from tiny import random_rows

from solotune import training
from solotune.diagnosis import watch as watching
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.subject import Settings
from solotune.diagnosis.watch import Watch, in_words
from solotune.model import load_model
from solotune.record import RunDirectory

CPU = torch.device("cpu")


def told(config, tmp_path, before=lambda model: None, already=()):
    """The codes that the watch named over a whole training."""
    run = RunDirectory.create(config.replaced("test", output_dir=str(tmp_path / "run")))
    model = load_model(config, CPU, torch.float32)
    before(model)
    said: list[Signal] = []
    rows = random_rows(12)
    watch = Watch(model, Settings(config.model_dump()), said.append, already)
    training.train(model, rows[:8], rows[8:], config, run, watch)
    return said, watch


@pytest.mark.parametrize("keys", [{}, {"warmup_steps": 1}, {"optim": "adamw_8bit"}], ids=str)
def test_a_healthy_run_is_left_alone(keys, tiny_config, tmp_path):
    said, watch = told(tiny_config(max_steps=4, learning_rate=1e-3, **keys), tmp_path)
    assert [signal.code for signal in said] == []
    assert watch._num_updates == 2  # so it did look


def test_adapters_without_gradient_are_named_at_the_first_update(tiny_config, tmp_path):
    def cut_off(model):
        model.joined.data.zero_()  # A = B = 0: no gradient reaches either

    said, _ = told(tiny_config(max_steps=3, learning_rate=1e-3), tmp_path, cut_off)
    assert said[0].code == "F57" and said[0].kind == "invariant"
    assert "did not change in update 1" in said[0].says and "14 of 14" in said[0].says
    assert len([signal for signal in said if signal.code == "F57"]) == 1


def test_one_layer_that_is_cut_off_is_named(tiny_config, tmp_path):
    def cut_off(model):
        layer = model.adapted["model.layers.0.self_attn.q_proj"]
        layer.lora_A.register_hook(torch.zeros_like)
        layer.lora_B.register_hook(torch.zeros_like)

    said, _ = told(tiny_config(max_steps=3, learning_rate=1e-3), tmp_path, cut_off)
    assert "1 of 14 layers" in said[0].says and "layers.0.self_attn.q_proj" in said[0].says


def test_updates_that_are_rounded_away_are_named(tiny_config, tmp_path, monkeypatch):
    class Rounding(torch.optim.AdamW):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.copy_(parameter.data.bfloat16())

    def in_16_bits(model):
        model.joined.data.copy_(model.joined.data.bfloat16())

    monkeypatch.setattr(training, "make_optimizer", lambda config, ps: Rounding(ps, lr=config.learning_rate))
    said, _ = told(tiny_config(max_steps=3, learning_rate=1e-5), tmp_path, in_16_bits)
    assert [signal.code for signal in said] == ["F54"]
    said, _ = told(tiny_config(max_steps=3, learning_rate=1e-2), tmp_path / "high", in_16_bits)
    assert said == []


def test_a_first_loss_above_guessing_is_a_doubt(tiny_config, tmp_path):
    def confuse(model):
        model.module.lm_head.weight.data.mul_(40)

    said, _ = told(tiny_config(max_steps=1), tmp_path, confuse)
    assert said[0].code == "F04" and "4.85" in said[0].says and in_words(said[0]).startswith("perhaps F04")


def test_evaluations_ask_the_rules_on_the_curve_and_each_fault_is_told_once(tiny_config, tmp_path, monkeypatch):
    asked = []

    def ask_all(subject):
        asked.append(len(subject.trace.step_S))
        assert subject.trace.eval_step_E[-1] == asked[-1] and np.isfinite(subject.trace.loss_S).all()
        return [Signal("F65", "invariant", "the rate rises for 9 steps", 0.9, fix="warmup_ratio: 0.03")], {}

    monkeypatch.setattr(watching, "ask_all", ask_all)
    config = tiny_config(max_steps=4, eval_steps=2, learning_rate=1e-3)
    said, _ = told(config, tmp_path)
    assert asked == [2, 4] and [signal.code for signal in said] == ["F65"]
    assert in_words(said[0]) == (
        "F65 warmup-too-long: the rate rises for 9 steps → warmup_ratio: 0.03 (solotune explain F65)"
    )
    said, _ = told(config, tmp_path / "again", already=["F65"])
    assert said == []


def test_it_costs_less_than_a_hundredth_of_a_step(tiny_config):
    config = tiny_config(max_steps=200)
    model = load_model(config, CPU, torch.float32)
    watch = Watch(model, Settings({}), lambda signal: None)
    watch.begin(200)
    figures = training.StepMetrics(1, 200, 0.1, 2.0, 0.1, 1e-3, 1.0, 99, 9, 9.0, 0.1, 990.0, 0)
    started = time.perf_counter()
    for _ in range(200):
        watch.step(figures)
    assert (time.perf_counter() - started) / 200 < 0.01 * 0.1  # of steps of a tenth of a second
