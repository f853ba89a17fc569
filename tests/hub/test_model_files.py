"""One answer to "is this a path?", and a model that is looked for once in a run, whatever it is named by."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

import solotune
from solotune.config.load import load_config
from solotune.config.run_config import RunConfig
from solotune.errors import InputError
from solotune.hub.download import hub_id, is_local_path, local_path
from solotune.hub.model_files import ModelFiles, model_here, resolve_model
from solotune.training.trained_run import TunedRun

HUB_ID = "org/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("name", "is_local"),
    [
        ("/x", True),
        ("./x", True),
        ("../x", True),
        ("~/x", True),
        ("~nobody-here/x", True),
        ("a/b/c", True),
        ("a/b", True),  # there is such a folder
        ("alone", True),  # and such a link, which leads nowhere
        (".cache/model", True),
        (".cache", True),
        ("C:\\x", True),
        ("models\\x", True),
        ("a b", True),
        ("org/", True),
        ("", True),
        ("a\0b", True),
        ("x" * 5000, False),  # which the hub refuses
        ("org/name", False),
        ("meta-llama/Llama-3.1-8B", False),
        ("_org/_name", False),
        ("gpt2", False),
    ],
)
def test_what_is_a_path(name: str, is_local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a/b").mkdir(parents=True)
    Path("alone").symlink_to("nowhere")
    assert is_local_path(name) is is_local
    assert hub_id(name) == (None if is_local else name)
    assert (local_path(name) is not None) is is_local


def test_a_base_in_a_folder_is_not_named_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT takes a bare name for a hub id, under which another model may lie; an absolute path names the machine."""
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert [hub_id(name) for name in ("gpt2", "./gpt2", str(tmp_path / "gpt2"), "~/gpt2")] == [None] * 4


class Downloads(list[tuple[str, bool]]):
    """What was asked of `snapshot_download`: the name, and whether the weights were wanted."""


@pytest.fixture
def downloads(chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Downloads:
    """A hub with one model, `org/tiny`, of which nothing is in the cache yet."""
    seen, cache = Downloads(), tmp_path / "hub"
    look = huggingface_hub.snapshot_download

    def download(name: str, *, local_files_only: bool = False, **asked: Any) -> str:
        if local_files_only or name != HUB_ID:
            return look(name, local_files_only=local_files_only, **asked)
        wanted, unwanted = asked["allow_patterns"], asked["ignore_patterns"]
        seen.append((name, "*.safetensors" in wanted))
        made = cache / "models--org--tiny"
        (made / "snapshots" / COMMIT).mkdir(parents=True, exist_ok=True)
        (made / "refs").mkdir(exist_ok=True)
        (made / "refs/main").write_text(COMMIT)
        for path in chat_model.iterdir():
            if any(fnmatch(path.name, p) for p in wanted) and not any(fnmatch(path.name, p) for p in unwanted):
                shutil.copy(path, made / "snapshots" / COMMIT)
        return str(made / "snapshots" / COMMIT)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return seen


def of(name: str) -> RunConfig:
    return load_config({"model_name_or_path": name, "dataset": "x.jsonl"})


def test_a_hub_id_is_here_after_its_small_files_were_downloaded(downloads: Downloads) -> None:
    assert model_here(HUB_ID, "main") is None
    found = resolve_model(of(HUB_ID))
    assert (found.hub_id, found.is_local, found.folder.name) == (HUB_ID, False, COMMIT)
    assert found.config["model_type"] == "llama" and "eos_token_id" in found.generation_config
    assert not list(found.folder.glob("*.safetensors"))
    here = model_here(HUB_ID, "main")
    assert here is not None and (here.folder, here.hub_id) == (found.folder, HUB_ID)
    whole = found.with_weights()
    assert (
        whole.with_weights() is whole
        and whole.folder == found.folder
        and (found.folder / "model.safetensors").is_file()
    )
    assert downloads == [(HUB_ID, False), (HUB_ID, True)]
    assert all(model_here(name, "main") is None for name in ("org/other", "./nowhere", "x" * 200))


def test_a_local_folder_asks_nothing(chat_model: Path, downloads: Downloads) -> None:
    found = resolve_model(of(str(chat_model)))
    assert (found.hub_id, found.is_local, found.folder) == (None, True, chat_model)
    assert found.with_weights() is found and downloads == []


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1, "a": 2}', None])
def test_a_file_that_cannot_be_read_is_empty_or_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        for name in ("config.json", "generation_config.json"):
            (tmp_path / name).write_text(content)
    found = ModelFiles("m", "main", tmp_path, True)
    assert found.json_or_empty("config.json") == found.json_or_empty("../x") == {}
    with pytest.raises(InputError):
        _ = found.config
    if content is None:
        assert found.generation_config == {}
    else:
        with pytest.raises(InputError):
            _ = found.generation_config


def test_a_config_that_leads_to_code_is_refused_and_still_readable_as_it_is_written(tmp_path: Path) -> None:
    written = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(written))
    found = ModelFiles("m", "main", tmp_path, True)
    assert found.json_or_empty("config.json") == written
    with pytest.raises(InputError, match="auto_map"):
        _ = found.config


def test_a_run_looks_for_its_model_once(chat_config: dict[str, Any], downloads: Downloads) -> None:
    small, weights = (HUB_ID, False), (HUB_ID, True)
    keys = {**chat_config, "model_name_or_path": HUB_ID, "torch_compile": False, "max_steps": 2}
    solotune.plan(keys)
    assert downloads == [small]  # a plan needs no weights
    downloads.clear()
    solotune.train(keys)
    assert downloads == [small, weights]
    written = json.loads(Path("run/adapter/adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == (HUB_ID, "main")
    downloads.clear()
    TunedRun.open("run").load()
    assert downloads == [small, weights]
