"""Tiny tokenizers with the chat templates of several families, made here so that no test needs a network."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from functools import cache as cached
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from solotune import cli
from solotune.config.load import load_config
from solotune.config.run_config import RunConfig
from solotune.dataset import cache
from tests.messages import error_in

ROOT = Path(__file__).parents[2]

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

# thinking is cut out of all answers before the last user message, and an empty block is put into later ones
QWEN3 = """{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set answer = m.content.split('</think>')[-1].lstrip('\\n') if '</think>' in m.content else m.content %}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in m.content else '' %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
{{- answer }}
{%- for call in m.tool_calls or [] %}{{ '\\n' if answer or not loop.first }}
{{- '<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# the blank before an answer is the template's, and the generation prompt is empty
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)

# no token ends a turn: the next header does
GLM = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# the last answer ends with another token than the earlier ones; a system message of the template's own begins the chat
HARMONY = (
    "<|start|>system<|message|>Be kind.<|end|>{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

# the generation prompt opens a thinking block that history does not have
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)

# family -> template, special tokens (bos first, eos second), other added tokens
FAMILIES: dict[str, tuple[str | None, list[str], list[str]]] = {
    "chatml": (CHATML, ["<|endoftext|>", "<|im_end|>", "<|im_start|>"], []),
    "llama3": (LLAMA3, ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"], []),
    "gemma": (GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], ["\n\n", "<table>", "<unused0>"]),
    "qwen3": (
        QWEN3,
        ["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
        ["<think>", "</think>", "<tool_call>", "</tool_call>"],
    ),
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], []),
    "glm": (GLM, ["<sop>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>"], []),
    "harmony": (HARMONY, ["<|startoftext|>", "<|return|>", "<|start|>", "<|message|>", "<|end|>"], []),
    "deepseek": (DEEPSEEK, ["<|bos|>", "<|eos|>", "<|User|>", "<|Assistant|>"], ["<think>", "</think>"]),
    "gpt2": (None, ["<|endoftext|>", "<|endoftext|>"], []),
}

# newlines stay together whatever follows; GPT-2's expression splits them differently at the end of a text
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_TEXT = """system user assistant tool model Be kind. What is the capital of France? The capital is Paris. Hello there,
how are you? I am fine, thanks. {"name": "get_weather", "arguments": {"city": "Paris"}} It is 22 degrees.\n\n\n"""


@cached
def tiny_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of some 400 tokens with a family's special tokens and template; Mistral's has Metaspace."""
    template, special, other = FAMILIES[family]
    if family == "mistral":
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *(f"<0x{i:02X}>" for i in range(256))])
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        # offsets are trimmed, as in GPT-2 and Llama 3
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet)
    backend.train_from_iterator([_TEXT], trainer)
    if family == "mistral":  # the trainer calls the byte tokens special; in real vocabularies they are not
        state = json.loads(backend.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] == "<unk>"]
        backend = Tokenizer.from_str(json.dumps(state))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in dict.fromkeys(special)])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in other])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=special[0], eos_token=special[1])
    tokenizer.pad_token = special[1]  # pad = eos, the case that id-based masking gets wrong
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_kept() -> Iterator[None]:
    """Tests leave nothing in the cache of whoever runs them, however slow the machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "MIN_SECONDS", float("inf"))
        yield


@pytest.fixture(params=[family for family, (template, *_) in FAMILIES.items() if template])
def chat_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Each family that has a template."""
    return tiny_tokenizer(request.param)


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedTokenizerBase:
    """The tokenizer of the demo's model; the folder is made if it is not there yet."""
    spec = importlib.util.spec_from_file_location("smollm2", ROOT / "examples" / "smollm2.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return AutoTokenizer.from_pretrained(module.ensure(), trust_remote_code=False)


Writer = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """write("chats.jsonl", rows...) -> a file with one JSON object a line; bytes and text are written as they are."""

    def make(name: str, *rows: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(rows) == 1 and isinstance(rows[0], (bytes, str)):
            path.write_bytes(rows[0] if isinstance(rows[0], bytes) else rows[0].encode())
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return make


def config_of(dataset: Path | str | list[str], **keys: Any) -> RunConfig:
    """A config with this dataset and no validation part unless asked for."""
    plain = {"model_name_or_path": "unused", "dataset": str(dataset) if isinstance(dataset, Path) else dataset}
    if "eval_dataset" not in keys:
        plain["validation_size"] = 0
    return load_config({**plain, **keys})


def chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """user, assistant, user, assistant, ..."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


# --- the corpus of bad input goes through the real door: the command line


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of model folders with a tokenizer each, named after their families."""
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        tiny_tokenizer(family).save_pretrained(folder / family)
    return folder


class Answer(NamedTuple):
    """What `solotune data --json` left behind."""

    code: int
    content: dict[str, Any]
    """The JSON object of stdout."""
    shown: str
    """What stderr has for a person."""

    def finding(self, code: str, slug: str | None = None) -> dict[str, Any]:
        return next(f for f in self.content["findings"] if f["code"] == code and slug in (None, f["slug"]))


class Door:
    """`solotune data` on a config in an empty working folder, held to what it promises for every input."""

    MAX_SECONDS, MAX_KIB = 10, 1 << 20

    def __init__(self, model_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._models, self._capsys = model_folders, capsys

    def __call__(self, dataset: str | list[str], family: str = "chatml", **keys: Any) -> Answer:
        config = {"model_name_or_path": str(self._models / family), "dataset": dataset, "validation_size": 0, **keys}
        if "eval_dataset" in keys:
            del config["validation_size"]
        Path("config.yaml").write_text(json.dumps(config))
        before, started, peak = sorted(Path().rglob("*")), processor_seconds(), peak_kib(reset=True)
        code = cli.main(["data", "config.yaml", "--json"])
        taken, grown = processor_seconds() - started, peak_kib() - peak
        out, shown = self._capsys.readouterr()
        assert code != 1, shown
        assert "Traceback" not in shown
        assert sorted(Path().rglob("*")) == before, "nothing is written"
        assert taken <= self.MAX_SECONDS and grown <= self.MAX_KIB, (taken, grown)
        return Answer(code, json.loads(out), shown)

    def text(self, dataset: str) -> str:
        """What a person sees on stdout."""
        cli.main(["data", "config.yaml", f"dataset={dataset}"])
        return self._capsys.readouterr().out

    def refuses(self, dataset: str | list[str], message: str, *, code: int = 2, **keys: Any) -> None:
        """With the whole message (`messages.stable`)."""
        found = self(dataset, **keys)
        assert error_in(found.shown) == message
        assert found.code == code


def processor_seconds() -> float:
    """Of this process and of children that have ended: what else runs on the machine does not count."""
    return sum(os.times()[:4])


def peak_kib(*, reset: bool = False) -> int:
    """The most memory that this process has had, since the last reset; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    if reset:
        with contextlib.suppress(OSError):  # not as another user
            Path("/proc/self/clear_refs").write_text("5")
    return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])


@pytest.fixture
def door(
    model_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Door:
    monkeypatch.chdir(tmp_path)
    return Door(model_folders, capsys)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache of prepared rows, in which every result is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "MIN_SECONDS", 0.0)
    return tmp_path / "cache" / "solotune" / "data"
