"""`solotune verify`: what is damaged is named, and nothing else is."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from click.testing import CliRunner

import solotune
from bench import faults
from bench.faults_verify import clean_copies
from solotune import cli
from solotune.cli import commands
from solotune.errors import InputError, IntegrityError
from solotune.run.manifest import read_manifest
from solotune.training.trained_run import TunedRun
from solotune.training.verify_run import verify


@pytest.fixture(scope="module")
def finished(workload, tmp_path_factory):
    """A finished run, elsewhere."""
    workload.clear()
    assert workload.once(False).code == 0
    folder = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(workload.run, folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def called(*arguments):
    result = CliRunner().invoke(commands.solotune, ["verify", *map(str, arguments)])
    return result.exit_code, result.output


def test_clean_copies_are_whole(finished, tmp_path):
    assert [problem for _, problem in clean_copies(finished, 10, tmp_path) if problem] == []


def test_a_whole_run(run):
    code, said = called(run)
    assert code == 0
    assert "30 files" in said and "2 checkpoints" in said


def test_damage_is_named_and_exit_5(run):
    file = run / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (run / "plan.json").unlink()
    (run / "adapter" / "extra.py").write_text("")
    code, said = called(run)
    assert code == 5
    assert "adapter/adapter_model.safetensors" in said and "plan.json" in said and "adapter/extra.py" in said
    assert "3 problems" in said


def test_json_says_the_same(run, capsys):
    (run / "data.json").write_text("{}")
    assert cli.main(["verify", str(run), "--json"]) == 5
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False and found["finished"] is True and found["checkpoints"] == 2
    assert [problem["file"] for problem in found["problems"]] == ["data.json"]
    assert solotune.verify(run).to_json() == found


def test_an_adapter_of_another_rank(run):
    """Files and manifests agree, but not with the run's config."""
    text = (run / "config.yaml").read_text()
    assert "lora_r: 2 " in text
    (run / "config.yaml").write_text(text.replace("lora_r: 2 ", "lora_r: 3 "))
    problems = {file for file, problem in verify(run).problems if "rank 3" in problem}
    assert problems == {f"{folder}/adapter_model.safetensors" for folder in
                        ("adapter", "checkpoints/step-000006", "checkpoints/step-000008")}  # fmt: skip


def test_without_its_seal_a_finished_run_is_not_whole(run):
    (run / "manifest.json").unlink()
    assert [problem.file for problem in verify(run).problems] == ["manifest.json"]


def test_a_changed_hash_is_the_manifests_damage_not_the_files(run):
    text = (run / "manifest.json").read_text()
    digit = text.index('"sha256": "', text.index("data.json")) + len('"sha256": "')
    changed = text[:digit] + ("0" if text[digit] != "0" else "1") + text[digit + 1 :]
    (run / "manifest.json").write_text(changed)
    assert [problem.file for problem in verify(run).problems] == ["manifest.json"]


def test_a_run_that_has_not_finished(work):
    faults.until_step(work, 6)
    found = verify(work.run)
    assert found.ok and not found.finished and found.num_checkpoints == 2
    assert "not finished" in found.notes[0]
    (work.run / "metrics.jsonl").write_text("")
    assert {problem.file for problem in verify(work.run).problems} == {"metrics.jsonl"}


def test_no_run_is_bad_input(tmp_path):
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        verify(tmp_path)


def test_evaluating_again_seals_again(finished, run, monkeypatch):
    monkeypatch.setattr("solotune.hardware.device_memory.peak_bytes", lambda device: 1)
    before = read_manifest(run / "manifest.json")
    (run / "evaluation.json").write_text("{}")
    (run / "split.json").write_text("{}")
    solotune.evaluate(run)
    after = read_manifest(run / "manifest.json")
    assert after.keys() == before.keys()
    # the same figures again; the page says the minute in which it was written
    assert {name for name in before if after[name] != before[name]} <= {"report.html"}
    assert [problem.file for problem in verify(run).problems] == ["split.json"]  # still


def test_a_damaged_adapter_and_another_base_are_refused_where_they_are_used(run, workload):
    weights = workload.folder / "model" / "model.safetensors"
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-4096] + bytes(4096))
        for use in (solotune.evaluate, solotune.chat):
            with pytest.raises(IntegrityError, match="this adapter was trained on another base model"):
                use(run)
    finally:
        weights.write_bytes(content)
    file = run / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors: "):
        TunedRun.open(run).load()
