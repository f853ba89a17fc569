"""The watch over a run of ours: silent over healthy ones, and one line for each thing that is wrong."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from tiny import chat_rows, metrics_of, random_rows

import solotune
from solotune.config.load import load_config
from solotune.diagnosis import monitor as watching
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.monitor import Monitor
from solotune.diagnosis.run_facts import RunFacts, Settings
from solotune.diagnosis.sources import solotune_run
from solotune.display.observer import Observers, SilentObserver
from solotune.display.progress import SilentDisplay
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
    faults = [line for line in said if not line.startswith("remark")]
    assert len(faults) == 1 and faults[0].startswith("F54 updates-lost")
    said, _ = watched(tiny_config(max_steps=3, learning_rate=1e-2), tmp_path / "high", in_16_bits)
    assert said == []


def test_a_first_loss_above_guessing_is_a_doubt(tiny_config, tmp_path):
    def confuse(model):
        model.module.lm_head.weight.data.mul_(40)

    said, _ = watched(tiny_config(max_steps=1), tmp_path, confuse)
    assert said[0].startswith("perhaps F04 wrong-tokenizer") and "4.85" in said[0]


def test_evaluations_ask_the_rules_on_the_curve_and_each_fault_is_told_once(tiny_config, tmp_path, monkeypatch):
    asked = []

    def signals(rules, trace=None):
        if trace is None:  # before the run
            return []
        asked.append(len(trace.step_S))
        assert trace.eval_step_E[-1] == asked[-1] and np.isfinite(trace.loss_S).all()
        return [Signal("F65", "invariant", "the rate rises for 9 steps", 0.9, fix="warmup_ratio: 0.03")]

    monkeypatch.setattr(watching.GrowingRun, "signals", signals)
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
    monkeypatch.setattr(watching.GrowingRun, "signals", lambda rules, trace=None: [remark, doubt])
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


# --- one judgement: what `data`, the monitor and `diagnose` say of the same config


def _answers(path, long):
    """Sixty chats; every `long`th answer is of 60 tokens more."""
    for number, row in enumerate(rows := chat_rows(60)):
        row["messages"][1]["content"] += ", and so it goes on and on" * 2 * (number % long == 0)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


CONFIGS = {
    "plain": ({}, 100, {}),
    "packed": ({"packing": True, "max_length": 200}, 2, {}),
    "packed, rows that end without an end": ({"packing": True, "max_length": 80}, 4, {"F24": "remark"}),
    "a few truncated": ({"max_length": 80}, 4, {"F24": "remark"}),
    "half truncated": ({"max_length": 80}, 2, {"F24": "fault"}),
    "half truncated and packed": ({"max_length": 80, "packing": True}, 2, {"F24": "fault"}),
    "split": ({"max_length": 80, "overflow": "split", "packing": True}, 2, {}),
    "dropped": ({"max_length": 80, "overflow": "drop"}, 4, {"F24": "remark"}),
    "all tokens": ({"assistant_only_loss": False, "max_length": 200, "packing": True}, 2, {}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_data_monitor_and_diagnose_agree(name, chat_config, tmp_path):
    keys, long, expected = CONFIGS[name]
    _answers(tmp_path / "chats.jsonl", long)
    config = load_config({**chat_config, **keys})
    found = [Finding(**one) for one in solotune.data(config).report.findings or ()]
    by_data = {one.code: one.word for one in found if one.signal is not None}

    told = Told()
    Monitor(None, solotune_run.of_config(config), told, RunRecord.read(tmp_path))  # type: ignore[arg-type]  # not begun
    by_monitor = {}
    for line in told.lines:
        assert not line.startswith("perhaps")
        word, _, rest = line.partition(" ")
        by_monitor |= {rest.partition(" ")[0]: "remark"} if word == "remark" else {word: "fault"}
    assert not set(by_monitor) & set(by_data), "what the data said is not said again"

    diagnosis = solotune.diagnose(config, budget=0)
    culprits, remarks = diagnosis.culprits, diagnosis.remarks
    decided = {c.fault: "fault" for c in culprits} | {r.fault: "remark" for r in remarks}
    assert decided == by_data | by_monitor and diagnosis.verdict == ("fault" if culprits else "healthy")
    about = [f"F{n}" for n in range(17, 34)]
    assert {code: word for code, word in decided.items() if code in about} == expected


def test_the_verdict_at_the_end_is_that_of_the_files(chat_config, tmp_path):
    _answers(tmp_path / "chats.jsonl", 2)
    keys = {"max_length": 80, "max_steps": 2, "eval_steps": 1, "num_samples": 0, "allow_faults": ["F24"]}
    run = solotune.train({**chat_config, **keys}).run_dir
    at_the_end = json.loads((run / "diagnosis.json").read_text())
    of_files = json.loads(json.dumps(solotune.diagnose(run, budget=0).to_json()))
    for part in ("verdict", "culprits", "remarks", "ruled_out"):
        assert at_the_end[part] == of_files[part], part
    assert [one["fault"] for one in of_files["culprits"]] == ["F24"]


def test_a_packed_run_is_not_told_that_packing_loses_rows(chat_config, tmp_path):
    """Rows that fill max_length and have no end, whole in their packs; through the whole of `train`."""
    _answers(tmp_path / "chats.jsonl", 4)
    lines = []

    class Said(SilentDisplay):
        def note(self, text):
            lines.append(text)

        def diagnosed(self, event, text):
            lines.append(text)

    keys = {"packing": True, "max_length": 80, "max_steps": 1, "num_samples": 0}
    solotune.train({**chat_config, **keys}, display=Said())
    assert any("no row is truncated" in line for line in lines) and not any("F33" in line for line in lines)
    assert [line.partition(":")[0] for line in lines if "F24" in line] == ["remark F24 answers-cut"]
