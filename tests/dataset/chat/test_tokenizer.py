"""Loading a tokenizer: local folders without a network, and what is said when there is none."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from tokenizers import decoders

from solotune.dataset import load_tokenizer, render_prompt, token_texts
from solotune.dataset.chat.tokenizer import saved_files
from solotune.errors import InputError
from tests.dataset.conftest import CHATML, chat, config_of, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer("chatml").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def message_of(name: Path | str, **keys: str) -> str:
    with pytest.raises(InputError) as caught:
        load_tokenizer(config_of("x.jsonl", model_name_or_path=str(name), **keys))
    return str(caught.value)


def test_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("a local folder needs no network")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    tokenizer = load_tokenizer(config_of("x.jsonl", model_name_or_path=str(folder)))
    assert render_prompt(tokenizer, chat("a")) == render_prompt(tiny_tokenizer("chatml"), chat("a"))


@pytest.mark.parametrize("family", ["chatml", "mistral"])
def test_tokens_spelled_one_by_one(family: str) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer(family))
    if family == "mistral":  # as in Llama 2's, which takes the blank off whatever it decodes
        backend = tokenizer.backend_tokenizer
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    text = "The capital of France is Paris"
    in_words = "".join(token_texts(tokenizer, tokenizer.encode(text, add_special_tokens=False)))
    assert in_words == (" " + text if family == "mistral" else text)
    in_parts = token_texts(tokenizer, tokenizer.encode("é", add_special_tokens=False))
    assert in_parts and not any("\ufffd" in part for part in in_parts)


def test_a_template_of_ones_own(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(CHATML.replace("<|im_start|>{{ m.role }}", "<|im_start|>{{ m.role | upper }}"))
    config = config_of("x.jsonl", model_name_or_path=str(folder), chat_template_path=str(template))
    tokenizer = load_tokenizer(config)
    assert tokenizer.decode(render_prompt(tokenizer, chat("a"))).startswith("<|im_start|>USER\na")


def test_templates_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    message = message_of(folder, chat_template_path=str(template))
    assert message == f"chat_template_path: {template}: no such file\n  seen:    looked in {tmp_path}"
    template.write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    message = message_of(folder, chat_template_path=str(template))
    assert message.startswith(
        f"chat_template_path: {template}, line 2: not a valid Jinja template\n  seen:    unexpected"
    )
    template.write_bytes(b"\xff\xfe")
    assert message_of(folder, chat_template_path=str(template)).startswith(f"chat_template_path: {template}: not UTF-8")
    template.write_text(" \n")
    assert message_of(folder, chat_template_path=str(template)).endswith("the template is empty")


def test_no_such_model(tmp_path: Path) -> None:
    assert message_of(tmp_path / "nothing") == (
        f"python, model_name_or_path: no such folder: {tmp_path}/nothing\n"
        "  change:  check the path; a hub model is named owner/name"
    )
    message = message_of("owner/no-such-model-here")
    assert message.startswith(
        "python, model_name_or_path: owner/no-such-model-here is not in the cache and cannot be downloaded\n"
        "  seen:    HF_HUB_OFFLINE=1 is set, so nothing is downloaded\n"
    )
    assert message.endswith("  change:  unset HF_HUB_OFFLINE to download it once, or use a local folder")


def test_folders_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").touch()
    assert message_of(tmp_path / "weights") == (
        f"model_name_or_path: {tmp_path}/weights has no tokenizer files\n"
        "  seen:    model.safetensors\n"
        "  allowed: tokenizer.json, or the file that this model family uses (tokenizer.model, tekken.json)\n"
        "  change:  copy the tokenizer files of the base model into the folder"
    )
    assert message_of(folder / "tokenizer.json").startswith(
        f"python, model_name_or_path: {folder / 'tokenizer.json'} is a file\n"
    )
    (folder / "tokenizer.json").write_text("{")
    assert message_of(folder).startswith(f"model_name_or_path: no tokenizer could be loaded from {folder}\n")


def test_code_that_comes_with_a_tokenizer_does_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: ...\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # and nobody is asked
    message_of(folder)
    assert not canary.exists()


def test_a_tekken_tokenizer_gets_the_ends_it_does_not_name(tmp_path: Path) -> None:
    """transformers loads tekken.json without bos and eos, and templates would write neither."""
    tiny_tokenizer("mistral").save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    tokenizer = load_tokenizer(config_of("x.jsonl", model_name_or_path=str(tmp_path)))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert tokenizer.pad_token is None


def test_a_tekken_file_that_needs_a_library(tmp_path: Path) -> None:
    held = {"config": {"pattern": ".", "num_vocab_tokens": 256, "default_num_special_tokens": 1000}}
    (tmp_path / "tekken.json").write_text(json.dumps({**held, "vocab": []}))
    message = message_of(tmp_path)
    assert message.startswith(f"model_name_or_path: no tokenizer could be loaded from {tmp_path}\n")
    assert message.endswith("change:  pip install mistral-common, or use a copy of the model with a tokenizer.json")


def test_what_is_saved_is_read_by_transformers_4_too(tmp_path: Path) -> None:
    """4.57.6 does not know the class that 5 names, and fails on a list of `extra_special_tokens`."""
    from transformers import AutoTokenizer

    tokenizer = copy.deepcopy(tiny_tokenizer("chatml"))  # the tests share that one
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    (tmp_path / "saved").mkdir()
    for name, content in saved_files(tokenizer):
        (tmp_path / "saved" / name).write_bytes(content)
    config = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<think>"]
    assert not {"extra_special_tokens", "is_local", "local_files_only"} & config.keys()
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.all_special_tokens == tokenizer.all_special_tokens and again.get_vocab() == tokenizer.get_vocab()
    text = "<|im_start|>a<think>b<|im_end|>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"] and again.chat_template == tokenizer.chat_template
