"""`solotune init`: whatever the model and the data file are called, the config that is written gives them back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import solotune
from solotune.config.load import load_config
from solotune.config.write import to_yaml, yaml_value
from solotune.config.yaml_reader import parse, plain
from solotune.errors import InputError

YAML_WORDS = ["a  # b.jsonl", "a: b", "true", "1e5", "12:30", "null", "~", "- a", "'", '"', "\\", "{a: b}", "[a]", "&a",
              "*a", "!!int 1", "%d", "---", "...", "? a", "@a", "`a", "a\nb: c", " a ", "a\n\n  b\n", "\ufeffa", "\x85",
              "\u2028", "\t", "\x7f", "0o7", "2001-01-01", "=", "<<"]  # fmt: skip
texts = st.one_of(st.text(), st.text(alphabet="ab:#-'\"\\ \n\t{}[],&*!%@`?|>~0"), st.sampled_from(YAML_WORDS))


def test_the_text_of_an_ordinary_config_is_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written = solotune.init("some/model", "chats.jsonl").read_text(encoding="utf-8")
    assert written.startswith("# solotune train solotune.yaml\n# Keys behind a # have their defaults")
    given_lines = [line for line in written.splitlines() if line and not line.startswith("#")]
    assert given_lines == ["model_name_or_path: some/model", "dataset: chats.jsonl"]
    assert "\n# lora_target_modules: [q_proj, k_proj, v_proj, o_proj]\n" in written
    assert "\n# dataset_config:\n" in written


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts, texts)
@example("org/m", "a  # b.jsonl")
@example("a\nb: c", "'\n\n x")
def test_every_text_survives(tmp_path: Path, model: str, dataset: str) -> None:
    try:
        config = load_config({"model_name_or_path": model, "dataset": dataset})
    except InputError:  # empty, NUL, a token: no config may hold it
        assume(False)
    for path in (tmp_path / "init.yaml", tmp_path / "saved.yaml"):
        if path.name == "init.yaml":
            solotune.init(model, dataset, path, force=True)
        else:
            path.write_text(to_yaml(config), encoding="utf-8", newline="")
        loaded = load_config(path)
        assert (loaded.model_name_or_path, loaded.dataset) == (model, dataset)
        assert loaded.model_dump() == config.model_dump()


def test_a_files_name_writes_no_keys(tmp_path: Path) -> None:
    path = solotune.init("m", "d", tmp_path / "a\nlora_r: 3\n.yaml")
    assert load_config(path).lora_r == 16


@settings(deadline=None, max_examples=200)
@given(texts)
@example("\x85")  # in single quotes a blank
@example("?a")  # in a list a key
@example(": 0")  # a key too
def test_every_value_is_read_back(text: str) -> None:
    written = f"a: {yaml_value(text)}\nb: {yaml_value([text, text])}  # a note\n"
    assert plain(parse(written, "here")) == {"a": text, "b": [text, text]}
