"""`solotune diagnose` from its door to diagnosis.json: configs, runs in every state, and what is none of these."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest

import solotune
from solotune import cli
from solotune.config.load import load_config
from solotune.errors import InputError


@pytest.fixture(autouse=True)
def libraries_stay_as_they_are(monkeypatch) -> None:
    monkeypatch.setattr(importlib.import_module("solotune.cli.main"), "quieten", lambda: None)


# --- what is none of these


def test_a_folder_that_is_no_run_is_exit_2_and_says_what_would_do(tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    assert cli.main(["diagnose", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert (
        "is not a run, a config or a trainer's output folder" in err
        and "notes.txt" in err
        and "adapter_config.json" in err
    )


def test_a_folder_of_runs_names_the_newest(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    with pytest.raises(InputError) as refused:
        solotune.diagnose(tmp_path)
    assert str(refused.value.change).startswith(f"solotune diagnose {tmp_path}")


def test_a_name_that_is_nowhere_is_exit_2(capsys):
    assert cli.main(["diagnose", "runs/nowhere", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["problem"] == "runs/nowhere: no such file or folder"


@pytest.mark.parametrize("option", ["--config", "--dataset"])
def test_options_of_foreign_folders_are_refused_for_ours(option, tmp_path, capsys):
    path = tmp_path / "a.yaml"
    path.write_text("model_name_or_path: m\ndataset: d\n")
    assert cli.main(["diagnose", str(path), option, "x"]) == 2
    assert f"{option} is only for folders of other trainers" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "content", "advice"), [
    ("chats.jsonl", '{"messages": []}\n', "solotune data solotune.yaml"),
    ("chats.csv", "prompt,completion\na,b\n", "--dataset"),
    ("rows.json", '[{"text": "a"}]', "this is data, not a run"),
    ("dialogs.jsonl", '{"loss": "of words"}\n', "this is data, not a run"),
    ("run.zip", "PK", "unzip"),
    ("run.tar.gz", "", "tar -xf"),
    ("train.py", "import torch\n", "which is not run here"),
    ("adapter_model.safetensors", "", "solotune diagnose"),
])  # fmt: skip
def test_a_file_that_is_no_config_says_what_to_type(name, content, advice, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    assert cli.main(["diagnose", str(tmp_path / name)]) == 2
    assert advice in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("name", "change"), [
    ("config.json+model.safetensors", "output_dir of the training"),
    ("train.parquet+test.parquet", "solotune init MODEL"),
    ("a/adapter_config.json+b/adapter_config.json", "solotune diagnose"),
])  # fmt: skip
def test_a_folder_of_something_else_says_what_to_type(name, change, tmp_path, capsys):
    for one in name.split("+"):
        (tmp_path / one).parent.mkdir(exist_ok=True)
        (tmp_path / one).write_text("{}")
    assert cli.main(["diagnose", str(tmp_path)]) == 2
    assert change in " ".join(capsys.readouterr().err.split())


# --- logs alone, and a project with one run


def flat(tmp_path: Path, name: str) -> Path:
    """A log of a run whose loss grows without end."""
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"current_steps": i, "total_steps": 40, "loss": 2.0, "lr": 1e-4, "epoch": i / 40} for i in range(1, 41)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_logs_alone_are_healthy_as_far_as_checked_and_say_what_to_give(tmp_path, capsys):
    log = flat(tmp_path, "output/trainer_log.jsonl")
    for target in (log, log.parent, tmp_path):
        assert cli.main(["diagnose", str(target)]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "found settings: not known" in shown and "40 logged steps from" in shown and "give --base" in shown
        assert "rows and labels: give the training data with --dataset" in shown
        assert "healthy as far as checked" in shown
    assert cli.main(["diagnose", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["found"]
    assert list(found) == ["settings", "steps", "rows", "base"]


def test_a_console_that_ended_in_an_error_is_a_fault(tmp_path, capsys):
    log = tmp_path / "slurm-1.out"
    log.write_text("{'loss': 2.0, 'epoch': 0.1}\nTraceback (most recent call last):\n  x\n"
                   "TypeError: SFTTrainer.__init__() got an unexpected keyword argument 'max_seq_length'\n")  # fmt: skip
    assert cli.main(["diagnose", str(log)]) == 3
    assert "F02" in capsys.readouterr().out


def test_a_project_with_one_run_is_that_run(tmp_path):
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-5" / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": 5, "loss": 2.0, "epoch": 1.0}], "max_steps": 5, "global_step": 5})
    )
    for target in (tmp_path, tmp_path / "out", tmp_path / "out" / "checkpoint-5"):
        assert "1 logged step from" in solotune.diagnose(target, budget=0).found["steps"]


# --- a run of ours


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One finished run, copied by each test that changes it."""
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def run(trained, chat_config, tmp_path):
    if not trained.exists():
        solotune.train({**chat_config, "output_dir": str(trained)})
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def test_training_leaves_a_diagnosis_and_the_verb_replaces_it(run, capsys):
    left = json.loads((run / "diagnosis.json").read_text())
    assert left["verdict"] in ("healthy", "undecided", "fault") and left["skipped"]
    (run / "report.html").unlink()
    code = cli.main(["diagnose", str(run), "--json"])
    assert (run / "report.html").exists()
    found = json.loads(capsys.readouterr().out)
    assert code == (3 if found["verdict"] == "fault" else 0)
    assert json.loads((run / "diagnosis.json").read_text()) == found
    assert {"verdict", "culprits", "ruled_out", "next_experiment", "skipped", "unasked", "cost"} <= set(found)
    assert found["cost"]["rules"] < 10


def events(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write(run, events):
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_metrics_that_are_empty_torn_or_not_numbers_do_not_stop_it(run):
    whole = events(run)
    lines = "".join(json.dumps(event) + "\n" for event in whole)
    nan = [{**event, "loss": float("nan")} if event["event"] == "step" else event for event in whole]
    for text in ("", lines[: len(lines) // 2], "".join(json.dumps(event) + "\n" for event in nan), "not json\n[1]\n"):
        (run / "metrics.jsonl").write_text(text)
        found = solotune.diagnose(run, budget=0)
        assert found.verdict in ("healthy", "undecided", "fault")
    (run / "metrics.jsonl").unlink()
    found = solotune.diagnose(run, budget=0)
    assert found.verdict == "healthy" and "how the run learns" in found.not_checked[0]


def test_an_unfinished_run_is_diagnosed(run):
    write(run, [event for event in events(run) if event["event"] != "end"][:4])
    for name in ("adapter", "checkpoints"):
        shutil.rmtree(run / name)
    (run / "evaluation.json").unlink()
    found = solotune.diagnose(run, budget=0)
    assert found.skipped and found.verdict in ("healthy", "undecided", "fault")


def test_a_base_that_is_gone_leaves_the_rules_answer_and_says_so(run):
    text = (run / "config.yaml").read_text()
    base = load_config(run / "config.yaml").model_name_or_path
    (run / "config.yaml").write_text(text.replace(base, str(run / "gone")))
    found = solotune.diagnose(run)
    assert found.skipped and "gone" in next(iter(found.skipped.values()))
    assert "loading" not in found.cost


def test_a_run_of_a_newer_version_says_so(run):
    with open(run / "config.yaml", "a") as file:
        file.write("key_of_tomorrow: 1\n")
    environment = json.loads((run / "environment.json").read_text())
    environment["solotune"] = "99.0"
    (run / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(InputError, match=r"99\.0"):
        solotune.diagnose(run)


# --- a config


def test_a_config_is_diagnosed_before_it_runs(chat_config):
    found = solotune.diagnose(chat_config, budget=0)
    assert found.run_facts and found.skipped
    probed = solotune.diagnose(chat_config, budget=5)
    assert "loading" in probed.cost
    bad = solotune.diagnose(chat_config, budget=0, overrides=["warmup_ratio=0.95", "max_steps=40"])
    assert bad.verdict == "fault" and "F65" in [culprit.fault for culprit in bad.culprits]


def test_a_config_whose_base_is_missing_is_answered_by_rules(chat_config, tmp_path):
    found = solotune.diagnose({**chat_config, "model_name_or_path": str(tmp_path / "none")})
    assert found.verdict == "undecided" and "none" in str(found.next_experiment) + str(found.skipped)


def test_a_damaged_adapter_keeps_a_run_from_being_called_healthy(run):
    file = run / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    for budget in (0, 5):
        found = solotune.diagnose(run, budget=budget)
        assert found.verdict == "undecided" and "cannot be read" in str(found.next_experiment)


def test_another_base_in_the_runs_folder_is_named(run):
    from safetensors.torch import load_file, save_file

    file = Path(load_config(run / "config.yaml").model_name_or_path) / "model.safetensors"
    original = file.read_bytes()
    try:
        save_file({name: tensor * 1.01 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        found = solotune.diagnose(run, budget=0)
    finally:
        file.write_bytes(original)
    assert found.verdict == "fault" and found.culprits[0].fault == "F78"


def test_rows_that_a_door_refuses_are_named_by_their_fault(chat_config):
    shared = {key: value for key, value in chat_config.items() if key != "validation_size"}
    shared["eval_dataset"] = chat_config["dataset"]
    assert [c.fault for c in solotune.diagnose(shared, budget=0).culprits][:1] == ["F43"]
    cut = solotune.diagnose(chat_config, budget=0, overrides=["max_length=8"])
    assert cut.culprits[0].fault == "F25"
