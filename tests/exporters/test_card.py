"""README.md and provenance.json: what a folder is made of, without a secret, a path of this machine or a user's name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from solotune.exporters.card import license_of, portable, write_card
from solotune.exporters.source import open_source
from solotune.run.atomic_io import whole_folder
from solotune.run.manifest import check_folder


@pytest.fixture
def written(run, export_base, tmp_path, monkeypatch):
    """The card of a run, in the folder of a user whose home has the run and the base."""
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.setenv("LOGNAME", "adalovelace")
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdefghij")
    (export_base / "README.md").write_text(
        "---\nlicense: llama3.1\nlicense_link: https://example.org/l\n---\nA base.\n"
    )
    scores = {"exact_match": {"base": 0.1, "tuned": 0.98, "stderr": {"base": 0.03, "tuned": 0.0165}}}
    evaluation = {
        "rows": 60,
        "base": {"loss": 2.3673, "stderr": 0.0216, "tokens": 9},
        "tuned": {"loss": 0.0042, "stderr": 0.00065, "tokens": 9},
        "scores": scores,
        "samples": [{"prompt": "a private text"}],
    }
    run = shutil.copytree(run, tmp_path / "run")
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    source = open_source(run)
    with whole_folder(tmp_path / "merged") as folder:
        folder.write("model.safetensors", b"weights")
        write_card(folder, source, "merged", {"parity": [{"engine": "transformers", "mean_kl": 1e-5}]})
    (export_base / "README.md").unlink()
    return source, tmp_path / "merged"


@pytest.fixture
def theirs(run, tmp_path):
    """An adapter folder without the run that it came from."""
    return shutil.copytree(run / "adapter", tmp_path / "theirs")


def test_the_card_says_what_it_is_how_it_was_made_and_how_good_it_is(written):
    source, folder = written
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "llama3.1" and data["license_link"] == "https://example.org/l"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert {"solotune", "lora"} <= set(data["tags"])
    assert "base_model" not in data  # a local folder is no id of the hub
    assert "complete model" in card.text and "> Be exact." in card.text
    assert "| loss | 2.367 ± 0.022 | 0.0042 ± 0.00065 |" in card.text
    assert "| exact match | 0.1 ± 0.03 | 0.98 ± 0.017 |" in card.text
    assert f"| `lora_r` | {source.adapter.config['r']} |" in card.text
    assert "AutoModelForCausalLM.from_pretrained(folder)" in card.text
    assert check_folder(folder) == []


def test_provenance_has_hashes_settings_and_versions_for_programs(written):
    source, folder = written
    made = json.loads((folder / "provenance.json").read_text())
    assert set(made["files"]) == {"model.safetensors", "README.md"}
    assert made["base"]["fingerprint"] == json.loads((source.run.path / "fingerprints.json").read_text())["base"]
    assert made["data"]["sha256"] == json.loads((source.run.path / "data.json").read_text())["sha256"]
    assert made["config"]["lora_r"] == source.adapter.config["r"]
    assert made["config"]["model_name_or_path"] == f"./{source.base.folder.name}"
    assert made["stop_ids"] == source.stop_ids
    assert made["parity"] == [{"engine": "transformers", "mean_kl": 1e-5}]
    assert made["versions"]["torch"] and "samples" not in made["evaluation"]


def test_no_secret_no_path_of_this_machine_and_no_user_name(written):
    source, folder = written
    text = "".join((folder / name).read_text() for name in ("README.md", "provenance.json"))
    for hidden in (
        str(Path.home()),
        "adalovelace",
        "hf_0123456789abcdefghij",
        str(source.base.folder.parent),
        "private",
    ):
        assert hidden not in text
    assert str(source.base.folder.parent) in (source.run.path / "config.yaml").read_text()  # it could have


def test_an_adapter_of_others_has_a_card_too(theirs, export_base, tmp_path):
    source = open_source(theirs, base=str(export_base))
    with whole_folder(tmp_path / "adapter") as folder:
        write_card(folder, source, "adapter", {})
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.to_dict()["library_name"] == "peft"
    assert "AutoPeftModelForCausalLM" in card.text and "Not measured" in card.text and "name no licence" in card.text


def test_a_hub_id_is_named_in_the_front_matter(theirs, export_base, tmp_path):
    source = open_source(theirs, base=str(export_base))
    source.base = replace(source.base, name="org/name", is_local=False, revision="abc123")
    with whole_folder(tmp_path / "merged") as folder:
        write_card(folder, source, "merged", {})
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert card.data.to_dict()["base_model"] == "org/name"
    assert "Base revision: `abc123`" in card.text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: apache-2.0\n---\n", {"license": "apache-2.0"}),
        ("---\nlicense: other\nlicense_name: own\n---\nx", {"license": "other", "license_name": "own"}),
        ("no front matter", {}),
        ("---\nlicense: [a\n---\n", {}),
        (None, {}),
    ],
)
def test_the_licence_of_a_base(tmp_path, text, found):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert license_of(tmp_path) == found


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/srv/data/chats.jsonl", "chats.jsonl"),
        ("~/models/base", "base"),
        ("../chats.jsonl", "chats.jsonl"),
        ("~", "."),
        ("/home/ada", "."),
        ("read /home/ada/a.txt:3 and ./b/c.txt", "read a.txt:3 and ./b/c.txt"),
        ("examples/tickets.jsonl", "examples/tickets.jsonl"),
        ("org/name at https://example.org/a/b, </s>", "org/name at https://example.org/a/b, </s>"),
        ({"api_key": "0123456789abcdef", "seed": 0}, {"seed": 0}),
        (["/srv/a", 1.5, None], ["a", 1.5, None]),
    ],
)
def test_what_may_be_passed_on(value, shown, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert portable(value) == shown
