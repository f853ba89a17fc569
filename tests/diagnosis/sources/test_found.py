"""A trainer's folder given alone: the data, the config and the base in it or beside it, and what is only offered."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from tiny import chat_rows

from solotune.diagnosis.sources import detect, found_rows, hf_trainer
from solotune.diagnosis.sources.surroundings import NUM_ENTRIES, Surroundings
from tests.diagnosis.sources.real_logs import WANDB


def lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """output/ of a run of 2 epochs over 40 rows in batches of 4; nothing beside it."""
    out = tmp_path / "project" / "output"
    out.mkdir(parents=True)
    history = [{"step": step, "loss": 3 - step / 20, "learning_rate": 1e-3, "grad_norm": 1.0, "epoch": step / 10}
               for step in range(2, 21, 2)]  # fmt: skip
    state = {"log_history": history, "max_steps": 20, "global_step": 20, "train_batch_size": 4}
    (out / "trainer_state.json").write_text(json.dumps(state))
    arguments(out)
    return tmp_path / "project"


def arguments(out: Path, **values: Any) -> None:
    made = transformers.TrainingArguments(
        output_dir="output", learning_rate=1e-3, per_device_train_batch_size=4, num_train_epochs=2, use_cpu=True,
        report_to=[], warmup_steps=3,
    )  # fmt: skip
    made.__dict__.update(values)
    torch.save(made, out / "training_args.bin")


def found(project: Path) -> dict[str, str]:
    return dict(hf_trainer.from_folder(project / "output").found)


# --- the data


@pytest.mark.parametrize("place", ["train.jsonl", "output/train.jsonl", "data/train.jsonl", "dataset/chats.jsonl"])
def test_a_file_whose_rows_make_the_steps_is_the_runs(project, place):
    lines(project / place, chat_rows(40))
    rows = found(project)["rows"]
    assert (
        rows == f"{os.path.relpath(project / place, project / 'output')} (its 40 rows make the run's steps of an epoch)"
    )


@pytest.mark.parametrize("count", [36, 44, 400])
def test_a_file_with_another_number_of_rows_is_offered_and_not_read(project, count):
    """37 to 40 rows make ten batches of four."""
    lines(project / "train.jsonl", chat_rows(count))
    facts = hf_trainer.from_folder(project / "output")
    assert not len(facts.train) and "--dataset" in facts.found["rows"] and "train.jsonl" in facts.found["rows"]
    assert "train" in facts.not_given


def test_of_two_files_that_fit_neither_is_taken_unless_one_is_named_train(project):
    lines(project / "a.jsonl", chat_rows(40))
    lines(project / "b.jsonl", chat_rows(40))
    assert "may be the run's" in found(project)["rows"]
    (project / "a.jsonl").rename(project / "train.jsonl")
    assert found(project)["rows"].startswith("../train.jsonl")


@pytest.mark.parametrize("name", ["/home/them/work/data/mine.jsonl", "./data/mine.jsonl", "C:\\work\\data\\mine.jsonl"])
def test_a_file_that_the_config_names_is_the_runs_whatever_its_length(project, name):
    (project / "sft.yaml").write_text(
        f"output_dir: ./output\nlearning_rate: 1e-3\nmax_length: 64\ndataset_name: {name}\n"
    )
    lines(project / "data" / "mine.jsonl", chat_rows(9))
    lines(project / "mine.jsonl", chat_rows(5))
    facts = found(project)
    assert facts["rows"] == "../data/mine.jsonl (its name is in sft.yaml)", "the longer match"
    assert facts["config"] == "../sft.yaml (its output_dir is this folder)"


def test_a_name_that_lies_nowhere_is_told_and_no_other_file_taken_for_it(project):
    (project / "sft.yaml").write_text("output_dir: output\nlearning_rate: 1e-3\nlora_r: 4\ndataset_name: org/chats\n")
    lines(project / "train.jsonl", chat_rows(40))
    assert found(project)["rows"].startswith("not here: the run names org/chats; give --dataset")


def test_llama_factorys_list_of_data_sets_leads_to_the_file(project):
    (project / "output" / "training_args.yaml").write_text(
        "dataset: identity,mine\ndataset_dir: data\ncutoff_len: 512\nlora_rank: 8\nlearning_rate: 1e-3\nstage: sft\n"
    )
    info = {"identity": {"file_name": "identity.json"}, "mine": {"file_name": "sub/mine.jsonl"},
            "far": {"hf_hub_url": "org/x"}}  # fmt: skip
    lines(project / "data" / "mine.jsonl", chat_rows(30))
    (project / "data" / "identity.json").write_text(json.dumps(chat_rows(10)))
    (project / "data" / "dataset_info.json").write_text(json.dumps(info))
    facts = hf_trainer.from_folder(project / "output")
    assert facts.found["rows"] == "../data/identity.json, ../data/mine.jsonl (its name is in training_args.yaml)"
    assert facts.settings.get("tool") == "transformers" and facts.settings.get("max_length") == 512


@pytest.mark.parametrize(("value", "names"), [
    ("a.jsonl", ["a.jsonl"]), (["d/a.jsonl#500", "b"], ["d/a.jsonl", "b"]), ("identity,mine", ["identity", "mine"]),
    ([{"path": "d/a.jsonl", "type": "chat_template"}, {"path": "json", "data_files": ["b.jsonl"]}], ["d/a.jsonl", "b.jsonl"]),
    (None, []), (3, []), ("x" * 9000, []),
])  # fmt: skip
def test_names_of_data_as_each_tool_writes_them(value, names):
    assert found_rows.names_of(value) == names


@pytest.mark.parametrize(("batch", "accumulation", "digits"), [(4, 1, 9), (4, 4, 9), (2, 8, 2), (8, 3, 4)])
def test_rows_and_steps_as_transformers_counts_them(project, batch, accumulation, digits):
    """Steps of an epoch are rounded up; the epoch counts batches, and some trainers round it."""
    batches, history, step, epoch = -(-45 // batch), [], 0, 0
    for epoch in range(3):
        for done in range(batches):
            if (done + 1) % accumulation == 0 or done + 1 == batches:
                step += 1
                history.append({"step": step, "loss": 2.0, "epoch": round(epoch + (done + 1) / batches, digits)})
    state = {"log_history": history, "max_steps": step, "global_step": step, "train_batch_size": batch}
    (project / "output" / "trainer_state.json").write_text(json.dumps(state))
    arguments(project / "output", gradient_accumulation_steps=accumulation)
    lines(project / "chats.jsonl", chat_rows(45))
    assert "45 rows" in found(project)["rows"]
    lines(project / "chats.jsonl", chat_rows(70))
    assert "45 rows" not in found(project)["rows"] and "may be" in found(project)["rows"]


def test_rows_that_were_packed_are_not_counted(project):
    arguments(project / "output", packing=True)
    lines(project / "train.jsonl", chat_rows(40))
    assert "may be the run's" in found(project)["rows"]


def test_rows_that_fit_by_chance_accuse_nobody(project):
    """40 lines that are no rows of a training: they are not the run's, and no fault."""
    lines(project / "prices.jsonl", [{"price": i} for i in range(40)])
    facts = hf_trainer.from_folder(project / "output")
    assert not len(facts.train) and not facts.refusals and "train" in facts.not_given


def test_saved_tokens_are_the_labels_of_the_training(project, chat_model):
    shutil.copytree(chat_model, project / "output", dirs_exist_ok=True)
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 9, 8], "attention_mask": [1] * 4} for _ in range(40)]
    datasets.Dataset.from_list(rows).save_to_disk(project / "prepared")
    facts = hf_trainer.from_folder(project / "output")
    assert facts.found["rows"].startswith("../prepared (its 40 rows")
    assert facts.train[0].loss_mask.tolist() == [False, True, True, True]
    assert facts.batches[0]["labels"][0].tolist() == [-100, 6, 9, 8] and len(facts.batches[0]["labels"]) == 4


# --- config and base


@pytest.mark.parametrize(("text", "is_taken"), [
    ("output_dir: runs/output\nlearning_rate: 1e-3\nwarmup_steps: 3\nlora_r: 4\n", True),
    ("learning_rate: 1e-3\nper_device_train_batch_size: 4\nwarmup_steps: 3\nnum_train_epochs: 2\n", True),
    ("output_dir: runs/output\nlearning_rate: 7e-3\nwarmup_steps: 3\nlora_r: 4\n", False),  # of another run
    ("output_dir: runs/other\nlearning_rate: 1e-3\nwarmup_steps: 9\nlora_r: 4\n", False),
    ("name: x\nservices:\n  web: 1\n", False),
])  # fmt: skip
def test_a_config_beside_is_the_runs_if_it_says_so_and_nothing_contradicts(project, text, is_taken):
    (project / "config.yaml").write_text(text)
    facts = hf_trainer.from_folder(project / "output")
    assert bool(facts.settings.asked) == is_taken
    assert ("perhaps" in facts.found.get("config", "perhaps")) != is_taken


def test_axolotl_and_swift_configs_give_the_settings_of_a_folder_without_arguments(project):
    (project / "output" / "training_args.bin").unlink()
    (project / "axolotl.yml").write_text(
        "base_model: org/base\nadapter: lora\nlora_r: 16\nlora_alpha: 32\nsequence_len: 128\nmicro_batch_size: 2\n"
        "learning_rate: 0.0002\noutput_dir: ./outputs/output\ndatasets:\n  - path: data/train.jsonl\n    type: chat_template\n"
    )
    lines(project / "data" / "train.jsonl", chat_rows(40))
    facts = hf_trainer.from_folder(project / "output")
    get = facts.settings.get
    assert (get("tool"), get("max_length"), get("lr_scheduler_type")) == ("axolotl", 128, "cosine")
    assert facts.found["rows"] == "../data/train.jsonl (its name is in axolotl.yml)"
    assert facts.found["base"] == "not opened: the run names org/base; give --base MODEL"
    (project / "axolotl.yml").unlink()
    (project / "output" / "args.json").write_text(json.dumps(
        {"model": "Qwen/Qwen3-0.6B", "dataset": ["data/train.jsonl#20"], "train_type": "lora", "lora_rank": 8,
         "learning_rate": 1e-4, "max_length": 2048, "output_dir": "/root/out/v0", "val_dataset": []}
    ))  # fmt: skip
    facts = hf_trainer.from_folder(project / "output")
    assert (facts.settings.get("tool"), facts.settings.get("learning_rate")) == ("swift", 1e-4)
    assert facts.found["rows"].startswith("../data/train.jsonl (its name is in args.json")


@pytest.mark.parametrize("place", ["Base-1B", "models/Base-1B", "output/Base-1B"])
@pytest.mark.parametrize("name", ["org/Base-1B", "/somewhere/else/Base-1B", "./Base-1B"])
def test_a_base_is_found_by_its_name(project, chat_model, name, place):
    shutil.copytree(chat_model, project / place)
    (project / "output" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name, "r": 4}))
    facts = hf_trainer.from_folder(project / "output")
    assert facts.model_config["model_type"] == "llama" and "in or beside" in facts.found["base"]


def test_what_a_tracker_recorded_are_the_settings_of_logs_alone(tmp_path):
    run = tmp_path / "wandb" / "offline-run-1"
    run.mkdir(parents=True)
    (run / "run-a.wandb").write_bytes(WANDB)
    facts = detect.run_facts_of(tmp_path)
    assert facts.settings.get("learning_rate") == 0.001 and facts.settings.get("max_length") is None
    assert facts.found["steps"] == "4 logged steps from wandb/offline-run-1/run-a.wandb"


def test_a_console_beside_is_the_runs_only_with_its_losses(project):
    history = json.loads((project / "output" / "trainer_state.json").read_text())["log_history"]
    shown = "".join(f"{{'loss': '{entry['loss']:.4g}', 'epoch': '{entry['epoch']}'}}\n" for entry in history[:5])
    error = "Traceback (most recent call last):\ntorch.OutOfMemoryError: CUDA out of memory\n"
    (project / "nohup.out").write_text(shown + error)
    (project / "other.log").write_text("{'loss': 9.1, 'epoch': 0.1}\n" * 5 + "RuntimeError: of another run\n")
    trace = hf_trainer.from_folder(project / "output").trace
    assert trace is not None
    assert any("out of memory" in text for text in trace.errors) and "another run" not in " ".join(trace.errors)


# --- where it looks, and where it does not


def test_places_are_few_and_links_are_no_places(tmp_path):
    project = tmp_path / "project"
    for name in ("output/a.jsonl", "b.jsonl", "data/c.jsonl", "output/data/d.jsonl", "src/e.jsonl", "output/x/f.jsonl"):
        lines(project / name, [{}])
    lines(tmp_path / "g.jsonl", [{}])
    (project / "h.jsonl").symlink_to(tmp_path / "g.jsonl")
    (project / "datasets").symlink_to(tmp_path)
    os.mkfifo(project / "i.jsonl")
    seen = Surroundings.of(project / "output" / "checkpoint-9")
    assert seen.folder == project / "output"
    assert sorted(path.name for path in seen.data) == ["a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl"]


def test_a_name_leads_to_nothing_that_is_not_listed(tmp_path):
    lines(tmp_path / "secret" / "rows.jsonl", [{}])
    (tmp_path / "project" / "output").mkdir(parents=True)
    around = Surroundings.of(tmp_path / "project" / "output")
    for name in (str(tmp_path / "secret" / "rows.jsonl"), "../../secret/rows.jsonl", "~/rows.jsonl", "\0", "", None, 3):
        assert around.named(name, around.data) is None


def test_a_folder_of_very_many_files_is_read_in_part(tmp_path):
    for number in range(NUM_ENTRIES + 50):
        (tmp_path / f"{number}.jsonl").touch()
    (tmp_path / "output").mkdir()
    assert len(Surroundings.of(tmp_path / "output").data) <= NUM_ENTRIES


def test_a_large_file_is_offered_by_its_name_alone(project, monkeypatch):
    monkeypatch.setattr(found_rows, "MAX_FILE_BYTES", 100)
    lines(project / "train.jsonl", chat_rows(40))
    assert "--dataset" in found(project)["rows"] and not len(hf_trainer.from_folder(project / "output").train)
