"""Modelfiles as text; `pytest -m export` renders their templates in Go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from exporters.test_turn_format import LAST_SYSTEM, STRIPPED, THOUGHTS, with_template
from inline_snapshot import snapshot
from tiny import CHATML, save_tokenizer

from solotune.errors import InputError
from solotune.exporters import ollama
from solotune.exporters.turn_format import derive
from solotune.run.atomic_io import whole_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def modelfile(folder: Path, tokenizer: Any, **changes: Any) -> tuple[str, list[str]]:
    given = {"gguf_name": "model-q8_0.gguf", "prompt_format": "chat", "system_prompt": None, "stops": ["<|im_end|>"]}
    with whole_folder(folder) as target:
        notes = ollama.write_modelfile(target, tokenizer=tokenizer, **{**given, **changes})
    return (folder / "Modelfile").read_text(), notes


def test_chatml_with_a_system_prompt_and_an_adapter(tokenizer: Any, tmp_path: Path) -> None:
    given = {"system_prompt": 'Answer in "plain" words.\nBriefly.', "adapter_name": "adapter.gguf"}
    text, notes = modelfile(tmp_path / "out", with_template(tokenizer, CHATML), **given)
    assert text == snapshot('''\
FROM ./model-q8_0.gguf
ADAPTER ./adapter.gguf
TEMPLATE """{{ $before := "" }}{{ range $i, $message := .Messages }}{{ if eq .Role "system" }}<|im_start|>system
{{ .Content }}{{ $before = .Role }}{{ else if eq .Role "user" }}{{ if eq $before "" }}<|im_start|>user
{{ else }}<|im_end|>
<|im_start|>user
{{ end }}{{ .Content }}{{ $before = .Role }}{{ else if eq .Role "assistant" }}<|im_end|>
<|im_start|>assistant
{{ .Content }}{{ $before = .Role }}{{ end }}{{ end }}<|im_end|>
<|im_start|>assistant
"""
SYSTEM """Answer in "plain" words.
Briefly."""
PARAMETER stop """<|im_end|>"""
''')
    assert notes == snapshot(["tools, and two messages of one role in a row, are not rendered as in training"])


def test_a_run_on_text_passes_it_through(tokenizer: Any, tmp_path: Path) -> None:
    text, notes = modelfile(tmp_path / "out", tokenizer, prompt_format="text", stops=["<|endoftext|>"])
    assert text == snapshot('''\
FROM ./model-q8_0.gguf
TEMPLATE """{{ .Prompt }}"""
PARAMETER stop """<|endoftext|>"""
''')
    assert notes == []


def test_a_model_of_ollama_is_no_file(tokenizer: Any, tmp_path: Path) -> None:
    text, _ = modelfile(tmp_path / "out", with_template(tokenizer, CHATML), gguf_name="llama3.2:1b")
    assert text.startswith("FROM llama3.2:1b\nTEMPLATE")


def test_a_system_prompt_before_the_last_question(tokenizer: Any) -> None:
    assert ollama.go_template(derive(with_template(tokenizer, LAST_SYSTEM))) == snapshot("""\
{{ $before := "" }}{{ range $i, $message := .Messages }}{{ if eq .Role "user" }}{{ if eq $before "assistant" }}</s>[INST] {{ else }}[INST] {{ end }}{{ if and $.System (eq (len (slice $.Messages $i)) 1) }}{{ $.System }}

{{ end }}{{ .Content }}{{ $before = .Role }}{{ else if eq .Role "assistant" }}[/INST] {{ .Content }}{{ $before = .Role }}{{ end }}{{ end }}[/INST]\
""")


def test_stripping_comes_with_its_function(tokenizer: Any) -> None:
    written = ollama.go_template(derive(with_template(tokenizer, STRIPPED)))
    assert written.count('{{- define "strip" -}}') == 1 and '{{ template "strip" .Content }}' in written
    assert "strip" not in ollama.go_template(derive(with_template(tokenizer, CHATML)))


def test_braces_and_invisible_characters_of_a_template_are_quoted(tokenizer: Any) -> None:
    odd = CHATML.replace("<|im_start|>", "{{ '{{' }}\u200b")
    assert '{{ "{" }}{{ "{" }}{{ "\\U0000200b" }}' in ollama.go_template(derive(with_template(tokenizer, odd)))


def test_thoughts_that_training_takes_out_are_noted(tokenizer: Any) -> None:
    notes = ollama.notes_of(derive(with_template(tokenizer, THOUGHTS)))
    assert any("takes thoughts out" in note for note in notes)


def test_a_template_that_strips_one_side_is_refused(tokenizer: Any) -> None:
    left = CHATML.replace("{{ m['content'] }}", "{{ m['content'].lstrip() }}")
    with pytest.raises(InputError, match="strips one side of the system's texts"):
        ollama.go_template(derive(with_template(tokenizer, left)))


@pytest.mark.parametrize(("text", "seen"), [('say """', "three quotes"), ("a\u200bb", "u200b")])
def test_a_system_prompt_that_ollama_would_change_is_refused(
    tokenizer: Any, tmp_path: Path, text: str, seen: str
) -> None:
    with pytest.raises(InputError, match="cannot be written into a Modelfile") as caught:
        modelfile(tmp_path / "out", with_template(tokenizer, CHATML), system_prompt=text)
    assert seen in str(caught.value.seen)
    assert not (tmp_path / "out").exists()
