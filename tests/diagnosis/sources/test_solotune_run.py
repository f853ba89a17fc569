"""Subjects out of configs and run directories in every state: what is read, and what is said to be missing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import solotune
from solotune.config.load import load_config
from solotune.diagnosis.probes.probed_model import extra_adapters
from solotune.diagnosis.rules import ask_all
from solotune.diagnosis.sources import live_model, solotune_run
from solotune.errors import InputError

METRICS = "metrics.jsonl"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, chat_model):
    """A finished run; tests copy it."""
    from tiny import chat_rows

    folder = tmp_path_factory.mktemp("own")
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows(60)))
    solotune.train({
        "model_name_or_path": str(chat_model), "dataset": str(folder / "chats.jsonl"), "validation_size": 10,
        "max_length": 64, "output_dir": str(folder / "run"), "use_cpu": True, "lora_target_modules": "all-linear",
        "lora_r": 4, "lora_alpha": 8.0, "max_steps": 6, "per_device_train_batch_size": 4, "num_samples": 0,
        "gradient_accumulation_steps": 1, "learning_rate": 1e-3, "save_steps": 3, "eval_steps": 3, "seed": 0,
    })  # fmt: skip
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def sure(run_facts) -> set[str]:
    signals, unasked = ask_all(run_facts)
    assert not [why for why in unasked.values() if "failed" in why], "no rule stumbles"
    return {signal.code for signal in signals if signal.weight >= 0.5 and not signal.against}


def test_a_finished_run_is_read_whole(run):
    run_facts = solotune_run.from_run(run)
    trace, saved = run_facts.trace, run_facts.saved
    assert trace is not None and trace.is_finished and trace.step_S.tolist() == [1, 2, 3, 4, 5, 6]
    assert trace.total_steps == 6 and trace.eval_step_E.tolist() == [3, 6] and np.isfinite(trace.loss_S).all()
    assert saved is not None and saved.adapter_config["r"] == 4 and len(saved.adapter) == 28
    assert len(run_facts.train) == 50 and len(run_facts.validation) == 10 and run_facts.environment["versions"]
    assert run_facts.settings.get("train_rows") == 50 and not run_facts.missing
    assert sure(run_facts) == set()


def test_extra_adapters_reach_every_linear_of_ours(run):
    live = solotune_run.from_run(run).live()
    with extra_adapters(live.model) as parameters:
        assert len(parameters) == 2 * 14  # seven linears in each of two layers


def test_probes_get_the_batches_that_the_run_saw_and_its_adapter(run):
    run_facts = solotune_run.from_run(run)
    live = run_facts.live()
    events = map(json.loads, (run / METRICS).read_text().splitlines())
    first = next(event["loss"] for event in events if event["event"] == "step")
    config = load_config(run / "config.yaml")
    fresh = solotune_run.live_of(config, *prepared_of(config), None)()
    fresh.model.eval()
    seen = float(fresh.model(**fresh.batches[0]).loss.detach())
    assert seen == pytest.approx(first, rel=0.05), "dropout apart"
    assert any(p.abs().max() > 0 for n, p in live.model.named_parameters() if n.endswith("lora_B"))
    assert live.evaluate(live.model) == pytest.approx(run_facts.trace.eval_loss_E[-1], rel=0.01)


def prepared_of(config):
    from solotune.dataset import load_tokenizer, prepare

    tokenizer = load_tokenizer(config)
    return tokenizer, prepare(config, tokenizer)


def test_packed_batches_say_where_rows_begin(run):
    config = load_config(run / "config.yaml", ["packing=true", "max_length=128"])
    tokenizer, prepared = prepared_of(config)
    batch = live_model.batches_of(config.batches, tokenizer, prepared.train)[0]
    starts = (batch["position_ids"] == 0).sum(1)
    assert "attention_mask" not in batch and (starts > 1).any()
    assert (batch["labels"][batch["position_ids"] == 0] == -100).all()


@pytest.mark.parametrize("content", ["", "\n\n", '{"event": "st', "[1]\n3\n", '{"event": "step", "step": "x"}\n'])
def test_metrics_that_hold_nothing_are_an_empty_trace(run, content):
    (run / METRICS).write_text(content)
    run_facts = solotune_run.from_run(run)
    assert run_facts.trace is not None and not len(run_facts.trace.step_S) and not run_facts.trace.is_finished
    assert sure(run_facts) == set()


def test_an_unfinished_run_has_a_torn_line_and_its_newest_checkpoint(run):
    lines = (run / METRICS).read_text().splitlines()
    kept = [line for line in lines if '"end"' not in line and json.loads(line).get("step", 0) <= 4]
    (run / METRICS).write_text("\n".join([*kept, '{"event": "step", "st']))
    shutil.rmtree(run / "adapter")
    run_facts = solotune_run.from_run(run)
    assert run_facts.trace is not None and not run_facts.trace.is_finished and run_facts.trace.step_S[-1] == 4
    assert run_facts.saved is not None and run_facts.saved.optimizer_present is True
    shutil.rmtree(run / "checkpoints")
    assert solotune_run.from_run(run).missing["saved"] == "nothing was saved yet"


def test_a_crash_and_a_resumption_are_in_the_trace(run):
    with open(run / METRICS, "a") as file:
        file.write(json.dumps({"event": "non_finite", "step": 7, "seen": "loss NaN", "rows": []}) + "\n")
        file.write(json.dumps({"event": "resume", "step": 3}) + "\n")
        file.write('{"event": "step", "step": 7, "total_steps": 9, "loss": NaN, "learning_rate": null}\n')
    trace = solotune_run.from_run(run).trace
    assert trace is not None and trace.seams == (3,) and "loss NaN" in trace.errors[0] and np.isnan(trace.loss_S[-1])


def test_a_damaged_adapter_is_missing_and_no_more(run):
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00nothing!")
    run_facts = solotune_run.from_run(run)
    assert run_facts.saved is None and run_facts.missing["saved"]
    assert sure(run_facts) == set()


def test_a_run_of_a_version_with_other_keys_is_bad_input_that_names_it(run):
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "\nadapter_kind: dora\n")
    with pytest.raises(InputError) as error:
        solotune_run.from_run(run)
    assert "cannot read the config" in error.value.problem and "adapter_kind" in str(error.value.seen)


def test_without_the_base_the_static_rules_still_answer(run, tmp_path):
    config = load_config(run / "config.yaml", ["lora_alpha=4096", f"model_name_or_path={tmp_path}/gone"])
    run_facts = solotune_run.of_config(config)
    assert run_facts.live is None and "gone" in run_facts.missing["live"] and len(run_facts.conversations) == 60
    assert sure(run_facts) == {"F61"}


def test_without_the_data_settings_and_findings_of_the_run_still_answer(run):
    data = json.loads((run / "data.json").read_text())
    finding = {"code": "F39", "slug": "duplicates", "suspect": "S8", "severity": "warning", "message": "copies",
               "evidence": {}, "fix": "remove them"}  # fmt: skip
    (run / "data.json").write_text(json.dumps({**data, "findings": [finding]}))
    text = (run / "config.yaml").read_text().replace("chats.jsonl", "gone.jsonl")
    (run / "config.yaml").write_text(text)
    run_facts = solotune_run.from_run(run)
    assert "gone.jsonl" in run_facts.missing["train"] and run_facts.live is None
    assert sure(run_facts) == set() and [s.kind for s in ask_all(run_facts)[0] if s.code == "F39"] == ["remark"]


def test_a_model_that_does_not_fit_is_not_loaded(run, monkeypatch):
    monkeypatch.setattr(solotune_run, "_free_bytes", lambda: 1 << 10)
    run_facts = solotune_run.of_config(load_config(run / "config.yaml"))
    assert run_facts.live is None and "free on this machine" in run_facts.missing["live"]
    assert replace(run_facts, missing={}).train
