"""Logs of every trainer and tracker: files as they write them, torn and hostile ones, and several runs in one."""

from __future__ import annotations

import json
import math
import os
import struct
import time
from pathlib import Path

import pytest

from solotune.diagnosis.sources import binary_logs, console_log, model_card, step_log, trainer_logs
from tests.diagnosis.sources.real_logs import TENSORBOARD, WANDB

LOSSES = [2.9, 2.5, math.nan, 2.25]


def losses(log: step_log.StepLog | None) -> list[float]:
    assert log is not None
    return [entry["loss"] for entry in log.entries if "loss" in entry]


def steps(log: step_log.StepLog | None) -> list[int]:
    assert log is not None
    return [entry["step"] for entry in log.entries if "loss" in entry]


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- trackers


def test_a_file_of_wandb_itself(tmp_path):
    (tmp_path / "run-a.wandb").write_bytes(WANDB)
    log = trainer_logs.read(tmp_path / "run-a.wandb")
    assert log is not None and steps(log) == [5, 10, 15, 20] and log.is_finished
    assert losses(log)[:2] == [2.9, 2.5] and math.isnan(losses(log)[2])
    assert log.settings["learning_rate"] == 0.001 and [e["eval_loss"] for e in log.entries if "eval_loss" in e] == [2.4]


def test_a_file_of_tensorboard_itself(tmp_path):
    file = tmp_path / "events.out.tfevents.1.host.1.0"
    file.write_bytes(TENSORBOARD)
    log = trainer_logs.read(file)
    assert log is not None and steps(log) == [5, 10, 15, 20] and losses(log)[1] == 2.5
    assert [entry["learning_rate"] for entry in log.entries] == [0.001, 0.00075, 0.0005, 0.00025], "no float32 noise"
    assert log.settings == {"learning_rate": 0.001, "per_device_train_batch_size": 4}


@pytest.mark.parametrize("name", ["run-a.wandb", "events.out.tfevents.1"])
def test_a_binary_log_that_is_cut_or_changed_anywhere_gives_what_stands_before(name, tmp_path):
    content = WANDB if name.endswith("wandb") else TENSORBOARD
    file, found = tmp_path / name, set()
    for cut in range(0, len(content), 37):
        file.write_bytes(content[:cut])
        log = trainer_logs.read(file)
        found.add(log.num_steps if log else 0)
        file.write_bytes(content[:cut] + bytes([255 - content[cut]]) + content[cut + 1 :])
        trainer_logs.read(file)
    assert found == {0, 1, 2, 3, 4}


def test_a_binary_log_that_promises_gigabytes_costs_nothing(tmp_path):
    file = tmp_path / "events.out.tfevents.1"
    file.write_bytes(struct.pack("<Q", 1 << 60) + b"abcd" + b"x" * 100)
    os.truncate(file, 1 << 40)
    started = time.process_time()
    assert list(binary_logs.tensorboard(file)) == [] and time.process_time() - started < 1
    wandb = tmp_path / "run-a.wandb"
    wandb.write_bytes(b":W&B\xe1\xbe\x00" + b"abcd" + struct.pack("<HB", 65535, 2) + b"\0" * 65535)
    os.truncate(wandb, 1 << 36)
    assert trainer_logs.read(wandb) is None and time.process_time() - started < 5


def test_a_folder_of_mlflow(tmp_path):
    run = tmp_path / "mlruns" / "1" / "abc"
    for name, content in {
        "meta.yaml": "run_id: abc\n",
        "metrics/loss": "1700000000000 2.9 5\n1700000000001 2.5 10\n1700000000002 nan 15\n1700000000003 2.25 20\n",
        "metrics/learning_rate": "1700000000000 0.001 5\nnot a line\n",
        "metrics/eval/loss": "1700000000003 2.4 20\n",
        "params/learning_rate": "0.001",
        "params/bf16": "True",
    }.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(content)
    [log] = trainer_logs.find_logs(tmp_path / "mlruns")
    assert log.kind == "mlflow" and steps(log) == [5, 10, 15, 20] and log.entries[-1]["eval_loss"] == 2.4
    assert log.settings == {"learning_rate": 0.001, "bf16": True}


# --- lines of JSON


def test_llama_factorys_and_swifts_lines(tmp_path):
    rows = [{"current_steps": 5 * i, "total_steps": 20, "loss": 3.0 - i / 10, "lr": 1e-4, "epoch": i / 4,
             "percentage": 25.0 * i, "elapsed_time": "0:00:01"} for i in range(1, 5)]  # fmt: skip
    log = trainer_logs.read(lines(tmp_path / "trainer_log.jsonl", rows))
    assert log is not None and steps(log) == [5, 10, 15, 20] and log.total_steps == 20 and log.is_finished
    assert log.entries[0]["learning_rate"] == 1e-4
    swift = [{"loss": 2.0, "grad_norm": 0.5, "learning_rate": 1e-4, "token_acc": 0.5, "epoch": 0.1, "memory(GiB)": 9,
              "global_step/max_steps": "1/93", "percentage": "1.08%"},
             {"eval_loss": 1.9, "epoch": 0.5, "global_step/max_steps": "50/93"},
             {"loss": 1.5, "epoch": 0.6, "global_step/max_steps": "55/93"}]  # fmt: skip
    log = trainer_logs.read(lines(tmp_path / "logging.jsonl", swift))
    assert log is not None and steps(log) == [1, 55] and log.total_steps == 93 and not log.is_finished


def test_of_several_runs_in_one_file_the_last_counts_and_a_continued_one_has_a_seam(tmp_path):
    first = [{"step": i, "loss": 9.0} for i in range(1, 8)]
    second = [{"step": i, "loss": 2.0} for i in (1, 2, 3, 4, 5)] + [{"step": i, "loss": 1.0} for i in (4, 5, 6)]
    log = trainer_logs.read(lines(tmp_path / "log.jsonl", first + second))
    assert log is not None and log.num_runs == 2 and log.seams == (3,)
    assert steps(log) == [1, 2, 3, 4, 5, 6] and losses(log) == [2.0] * 3 + [1.0] * 3


def test_torn_and_hostile_lines_are_left_out(tmp_path):
    file = tmp_path / "train_log.jsonl"
    file.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss"\n["loss"]\n{"loss": "x", "step": 3}\n'
                     + b'{"loss": ' + b"[" * 9000 + b"\n" + b'{"step": 1e400, "loss": 1.0}\n{"step": 4, "loss": true}\n'
                     + b"\xff\xfe loss\n" + b'{"loss": 1.5, "step": 5}')  # fmt: skip
    log = trainer_logs.read(file)
    assert log is not None and losses(log) == [2.0, 1.0, 1.5]


# --- a console

CONSOLE = (
    "Map: 100%|##| 240/240 [00:00<00:00]\n/x.py:3: UserWarning: deprecated\n"
    "  0%|  | 0/40 [00:00<?]\r 10%|# | 4/40 [00:01<00:09]\r     \r"
    "{'loss': '2.4', 'grad_norm': '0.3', 'learning_rate': '1e-4', 'epoch': '0.1'}\n"
    " 12%|# | 5/40 [00:01]\r 22%|## | 9/40 [..]\r   \r{'loss': 2.1, 'grad_norm': nan, 'learning_rate': 9e-05, 'epoch': 0.2}\n"
    "  0%|  | 0/4 [00:00]\r{'eval_loss': 2.0, 'eval_runtime': 0.5, 'epoch': 0.2}\n 37%|### | 15/40 [..]\r{'loss': 2.0, 'epoch': 0.3}\n"
)


def test_a_console_tells_its_steps_by_the_progress_bar():
    entries, total, ended = console_log.steps_of(CONSOLE)
    assert [(entry["step"], entry.get("loss")) for entry in entries] == [(5, 2.4), (10, 2.1), (10, None), (15, 2.0)]
    assert total == 40 and not ended and entries[0]["learning_rate"] == 1e-4 and math.isnan(entries[1]["grad_norm"])
    assert console_log.steps_of(CONSOLE + "{'train_runtime': 3.0, 'train_loss': 2.2}\n")[2]


@pytest.mark.parametrize("text", [
    "Step 1 | loss:1.5 lr:0.0001 tokens_per_second:9\nStep 2 | loss:1.25 lr:0.0002\n",
    "Epoch 1 | iter 1 step 1 | loss train: 1.500, val: n/a\nEpoch 1 | iter 2 step 2 | loss train: 1.250, val: n/a\n",
    "[INFO] step 1/40: train loss 1.5, lr 1e-4\n[INFO] step 2/40: train loss 1.25, lr 1e-4\n",
    '{"step": 1, "loss": 1.5}\n{"step": 2, "loss": 1.25}\n',
    "iter 1: loss 1.5000, time 20ms\niter 2: loss 1.2500, time 20ms\n",
])  # fmt: skip
def test_lines_of_other_loops(text):
    entries, _, _ = console_log.steps_of(text)
    assert [(entry["step"], entry["loss"]) for entry in entries] == [(1, 1.5), (2, 1.25)]


def test_prose_about_losses_is_no_step():
    text = "Using loss function cross_entropy at step 3\nThe loss is computed on answers.\nloss: 3.1\n{'lossless': 1}\n"
    assert [e for e in console_log.steps_of(text)[0] if "loss" in e] == []


def test_a_second_run_in_the_same_console_counts_alone(tmp_path):
    file = tmp_path / "nohup.out"
    file.write_text(CONSOLE + CONSOLE.replace("2.4", "8.4"))
    log = trainer_logs.read(file)
    assert log is not None and log.num_runs == 2 and losses(log) == [8.4, 2.1, 2.0] and log.total_steps == 40


def test_a_long_line_and_a_huge_file_cost_little(tmp_path):
    file = tmp_path / "train.log"
    file.write_text("{'loss': " + "9" * 5_000_000 + "\n" + "x" * 5_000_000 + "\n{'loss': 1.5, 'epoch': 0.1}\n")
    started = time.process_time()
    assert losses(trainer_logs.read(file))[-1] == 1.5
    os.truncate(file, 1 << 40)
    trainer_logs.read(file)
    assert time.process_time() - started < 10


# --- the model card


def test_a_card_of_transformers_and_one_of_axolotl():
    card = model_card.read(
        "### Training hyperparameters\n\nThe following hyperparameters were used during training:\n"
        "- learning_rate: 0.0002\n- train_batch_size: 2\n- seed: 42\n- gradient_accumulation_steps: 4\n"
        "- optimizer: Use OptimizerNames.ADAMW_TORCH with betas=(0.9,0.999) and epsilon=1e-08\n"
        "- lr_scheduler_type: cosine\n- lr_scheduler_warmup_steps: 10\n- num_epochs: 3.0\n\n### Training results\n\n"
        "| Training Loss | Epoch | Step | Validation Loss |\n|:--:|:--:|:--:|:--:|\n| No log | 0.5 | 5 | 2.5 |\n"
        "| 2.1 | 1.0 | 10 | 2.3 |\n\n### Framework versions\n\n- PEFT 0.21.2\n- Transformers 5.24.0\n"
    )
    assert card.settings["learning_rate"] == "0.0002" and card.settings["optim"] == "adamw_torch"
    assert card.entries[0] == {"epoch": "0.5", "step": "5", "eval_loss": "2.5"} and card.entries[1]["loss"] == "2.1"
    assert card.versions == {"peft": "0.21.2", "transformers": "5.24.0"}
    axolotl = model_card.read(
        "<details><summary>See axolotl config</summary>\n\naxolotl version: `0.19.0`\n```yaml\nbase_model: org/base\n"
        "micro_batch_size: 2\nlearning_rate: 0.0002\n```\n</details>\n"
    )
    assert axolotl.settings == {"base_model": "org/base", "micro_batch_size": 2, "learning_rate": 0.0002}


# --- which of them


def test_the_log_that_goes_on_to_the_crash_wins_over_the_state_of_the_last_checkpoint(tmp_path):
    history = [{"step": i, "loss": 2.0 + i, "epoch": i / 10} for i in range(1, 4)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history, "max_steps": 9, "global_step": 3}))
    lines(tmp_path / "logging.jsonl", [{"step": i, "loss": 2.0 + i} for i in range(1, 8)])
    state, further = (trainer_logs.read(tmp_path / name) for name in ("trainer_state.json", "logging.jsonl"))
    assert state is not None and further is not None
    assert step_log.best([state, further]) is further
    other = lines(tmp_path / "log.jsonl", [{"step": i, "loss": 7.0} for i in range(1, 8)])
    foreign = trainer_logs.read(other)
    assert foreign is not None and step_log.best([state, foreign]) is state, "another run's log"


@pytest.mark.parametrize(("name", "is_one"), [
    ("trainer_log.jsonl", True), ("train-log.jsonl", True), ("metrics.jsonl", True), ("slurm-12.out", True),
    ("running_log.txt", True), ("dialogs.jsonl", False), ("catalog.jsonl", False), ("train.jsonl", False),
    ("blog.txt", False),
])  # fmt: skip
def test_names_of_logs(name, is_one):
    assert trainer_logs.is_log(name) == is_one
