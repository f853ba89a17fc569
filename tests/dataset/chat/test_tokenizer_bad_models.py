"""Tokenizers and chat templates that are damaged or missing: entries 90 to 93 of the corpus of bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from inline_snapshot import snapshot

from tests.dataset.chat.test_formats_bad_rows import GOOD, write
from tests.dataset.conftest import CHATML, Door, tiny_tokenizer

# --- 90 to 93: tokenizers and templates


@pytest.fixture
def model(model_folders: Path, tmp_path: Path) -> Callable[..., str]:
    """model(name=text, ...) -> a model folder with these files changed; None removes one."""

    def make(**files: str | None) -> str:
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(model_folders / "chatml", folder)
        for name, text in files.items():
            path = folder / name.replace("__", ".")
            path.unlink(missing_ok=True)
            if text is not None:
                path.write_text(text)
        return "model"

    return make


RUNS = '{"auto_map": {"AutoTokenizer": ["own.Own", null]}, "tokenizer_class": "Own"}'
MODELS: dict[str, tuple[dict[str, str | None], str]] = {
    "no tokenizer.json": (
        {"tokenizer__json": None},
        snapshot("""\
model_name_or_path: no tokenizer could be loaded from model
  seen:    Couldn't instantiate the backend tokenizer from one of:
  allowed: a model folder or a hub model with tokenizer files that transformers can read
  change:  check the folder's tokenizer files\
"""),
    ),
    "a cut tokenizer.json": (
        {"tokenizer__json": "{"},
        snapshot("""\
model_name_or_path: no tokenizer could be loaded from model
  seen:    Expecting property name enclosed in double quotes: line 1 column 2 (char 1)
  allowed: a model folder or a hub model with tokenizer files that transformers can read
  change:  check the folder's tokenizer files\
"""),
    ),
    "another JSON": (
        {"tokenizer__json": "{}"},
        snapshot("""\
model_name_or_path: no tokenizer could be loaded from model
  seen:    'added_tokens'
  allowed: a model folder or a hub model with tokenizer files that transformers can read
  change:  check the folder's tokenizer files\
"""),
    ),
    "a list as its config": (
        {"tokenizer_config__json": "[]"},
        snapshot("""\
model/tokenizer_config.json: not a JSON object
  seen:    list\
"""),
    ),
    "code of its own": (
        {"tokenizer_config__json": RUNS, "own__py": "open('ran', 'w')"},
        snapshot("""\
model/tokenizer_config.json: auto_map can make a loader run code from the model folder or from elsewhere
  seen:    auto_map: {'AutoTokenizer': ['own.Own', None]}
  allowed: architectures of the installed transformers
  change:  remove auto_map if the model has such an architecture; otherwise use another model\
"""),
    ),
    "a broken config": (
        {"config__json": "{"},
        snapshot("""\
model/config.json, line 1: not valid JSON
  seen:    Expecting property name enclosed in double quotes\
"""),
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_90_models_without_a_usable_tokenizer(door: Door, model: Callable[..., str], case: str) -> None:
    files, message = MODELS[case]
    door.refuses(write(*GOOD), message, model_name_or_path=model(**files))
    assert not Path("ran").exists()


def test_90_no_tokenizer_no_template(door: Door) -> None:
    Path("nothing").mkdir()
    door.refuses(
        write(*GOOD),
        snapshot("""\
model_name_or_path: nothing has no tokenizer files
  seen:    an empty folder
  allowed: tokenizer.json, or the file that this model family uses (tokenizer.model, tekken.json)
  change:  copy the tokenizer files of the base model into the folder\
"""),
        model_name_or_path="nothing",
    )
    door.refuses(
        "a.jsonl",
        snapshot("""\
config.yaml line 1, model_name_or_path: no such folder: ./gone
  seen:    looked in <tmp>
  change:  check the path; a hub model is named owner/name\
"""),
        model_name_or_path="./gone",
    )
    door.refuses(
        "a.jsonl",
        snapshot("""\
config.yaml line 1, model_name_or_path: no such folder: ~nobody-here/model
  seen:    looked in <tmp>
  change:  check the path; a hub model is named owner/name\
"""),
        model_name_or_path="~nobody-here/model",
    )
    door.refuses(
        "a.jsonl",
        snapshot("""\
the tokenizer has no chat template, but the rows are chats
  seen:    <tmp>/gpt2 (a base model?)
  allowed: a model with a chat template, or rows of plain text or prompt + completion texts
  change:  use the instruct model, or set chat_template_path to a Jinja file such as the instruct model's\
"""),
        family="gpt2",
    )


def test_91_ids_beyond_the_embedding(door: Door, model: Callable[..., str]) -> None:
    name = model(config__json='{"model_type": "llama", "vocab_size": 100}')
    found = door(write(*GOOD), model_name_or_path=name)
    assert (found.code, found.finding("F05")["severity"]) == (3, "error")
    assert "the embedding has 100 rows" in found.finding("F05")["message"]


@pytest.mark.parametrize(
    "names", [{"pad_token": "<|im_end|>"}, {"pad_token": None}, {"pad_token": None, "eos_token": None}]
)
def test_92_no_pad_no_eos(door: Door, model: Callable[..., str], names: dict[str, str | None]) -> None:
    """The end of turn is learned whatever the tokenizer calls pad and eos: labels go by position."""
    config = json.dumps({"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", **names})
    found = door(write(*GOOD), model_name_or_path=model(tokenizer_config__json=config))
    assert found.code == 0
    assert found.content["labels"]["rows_with_end_supervised"] == 4


def test_92_eos_that_the_template_never_writes(door: Door, model: Callable[..., str]) -> None:
    config = json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"})
    numbers = json.dumps({"eos_token_id": tiny_tokenizer("chatml").convert_tokens_to_ids("<|endoftext|>")})
    name = model(tokenizer_config__json=config, generation_config__json=numbers)
    assert door(write(*GOOD), model_name_or_path=name).finding("F14")["severity"] == "error"


TEMPLATES = {
    "raises": (
        "{{ raise_exception('not so') }}",
        snapshot("""\
a.jsonl:1: the model's chat template refuses this row (one of 4 bad rows; 4 were read)
  seen:    not so; the roles are user, assistant; also a.jsonl:2; a.jsonl:3; ...
  change:  change the row to what the template accepts, or set chat_template_path\
"""),
    ),
    "calls what is not there": (
        "{{ foo() }}",
        snapshot("""\
a.jsonl:1: the model's chat template refuses this row (one of 4 bad rows; 4 were read)
  seen:    'foo' is undefined; the roles are user, assistant; also a.jsonl:2; a.jsonl:3; ...
  change:  change the row to what the template accepts, or set chat_template_path\
"""),
    ),
    "looks around": (
        "{{ ''.__class__.__mro__ }}",
        snapshot("""\
a.jsonl:1: the model's chat template refuses this row (one of 4 bad rows; 4 were read)
  seen:    access to attribute '__class__' of 'str' object is unsafe.; the roles are user, assistant; also a.jsonl:2; a.jsonl:3; ...
  change:  change the row to what the template accepts, or set chat_template_path\
"""),
    ),
    "reads files": (
        "{% include '/etc/passwd' %}",
        snapshot("""\
a.jsonl:1: the model's chat template refuses this row (one of 4 bad rows; 4 were read)
  seen:    no loader for this environment specified; the roles are user, assistant; also a.jsonl:2; a.jsonl:3; ...
  change:  change the row to what the template accepts, or set chat_template_path\
"""),
    ),
    "calls itself": (
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        snapshot("""\
a.jsonl:1: the model's chat template refuses this row (one of 4 bad rows; 4 were read)
  seen:    maximum recursion depth exceeded; the roles are user, assistant; also a.jsonl:2; a.jsonl:3; ...
  change:  change the row to what the template accepts, or set chat_template_path\
"""),
    ),
    "counts far": (
        "{% for i in range(10000000) %}x{% endfor %}",
        snapshot("""\
a.jsonl:1: the model's chat template refuses this row (one of 4 bad rows; 4 were read)
  seen:    Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000).; the roles are user, assistant; also a.jsonl:2; a.jsonl:3; ...
  change:  change the row to what the template accepts, or set chat_template_path\
"""),
    ),
    "says always the same": (
        "hello",
        snapshot("""\
a.jsonl:1: message 2: the chat template leaves out this answer or a part of it (one of 4 bad rows; 4 were read)
  seen:    {"role": "assistant", "content": "It is 0."}; also a.jsonl:2; a.jsonl:3; ...
  allowed: a template that renders every assistant message, with its tool calls
  change:  set chat_template_path to a template that does, or remove the row\
"""),
    ),
    "drops answers": (
        CHATML.replace("messages %}", "messages if m.role != 'assistant' %}", 1),
        snapshot("""\
a.jsonl:1: message 2: the chat template leaves out this answer or a part of it (one of 4 bad rows; 4 were read)
  seen:    {"role": "assistant", "content": "It is 0."}; also a.jsonl:2; a.jsonl:3; ...
  allowed: a template that renders every assistant message, with its tool calls
  change:  set chat_template_path to a template that does, or remove the row\
"""),
    ),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_93_templates(door: Door, model: Callable[..., str], case: str) -> None:
    template, message = TEMPLATES[case]
    door.refuses(write(*GOOD), message, model_name_or_path=model(chat_template__jinja=template))
    Path("own.jinja").write_text(template)
    door.refuses(write(*GOOD), message, chat_template_path="own.jinja")


def test_93_templates_that_render_something_else(door: Door) -> None:
    Path("own.jinja").write_text(CHATML.replace("messages %}", "messages if m.role != 'user' %}", 1))
    found = door(write(*GOOD), chat_template_path="own.jinja")
    assert (found.code, found.finding("F13")["severity"]) == (3, "error")
    Path("own.jinja").write_text("{{ bos_token }}{{ bos_token }}" + CHATML)
    assert door("a.jsonl", chat_template_path="own.jinja").finding("F08")["severity"] == "error"
    Path("own.jinja").write_text("{% for %}")
    door.refuses(
        "a.jsonl",
        snapshot("""\
chat_template_path: own.jinja, line 1: not a valid Jinja template
  seen:    Expected an expression, got 'end of statement block'\
"""),
        chat_template_path="own.jinja",
    )
