"""The folder in which a reader of the documentation works, with small models under the names that the pages use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from tiny import FAMILIES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from solotune import cli
from solotune.config.run_config import RunConfig
from solotune.hub.model_files import ModelFiles
from solotune.planning import plan_inputs
from solotune.planning.layer_profile import ModelShape
from tests.docs.pages import DOCS, ROOT, blocks
from tests.exporters.conftest import in_this_process

__all__ = ["in_this_process"]

HUB_MODELS = (
    *("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.3-70B-Instruct"),
    *("Qwen/Qwen3-8B", "HuggingFaceTB/SmolLM2-135M-Instruct"),
)
RUNS = ("first", "demo", "solotune-20260101-120000")
TOOLS_AND_THOUGHTS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['reasoning_content'] %}<think>{{ m['reasoning_content'] }}</think>{% endif %}{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}<call>{{ call['function'] | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Of a model that renders tools and reasoning, as Qwen3's does."""


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB = 1200


def save_small_model(folder: Path) -> None:
    """A random Llama whose tokenizer knows the words of the demo's data, so that rows are as short as they should be."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    rows = (ROOT / "examples" / "tickets.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    tokenizer.train_from_iterator(rows, trainer)
    end, start = SPECIAL[2], SPECIAL[1]
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=end, bos_token=start
    )
    fast.chat_template = TOOLS_AND_THOUGHTS
    fast.save_pretrained(folder)

    config = FAMILIES["llama"]()
    config.vocab_size, config.max_position_embeddings = VOCAB, 40_000
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def readers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout's examples, the files that pages name without showing them, and a run; beside it the hub's cache."""
    top = tmp_path_factory.mktemp("reader")
    model = top / "home" / ".cache" / "solotune" / "smollm2-135m-instruct"  # where scripts/demo makes it
    save_small_model(model)
    for name in HUB_MODELS:
        snapshot = top / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / "0123456789"
        shutil.copytree(model, snapshot)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name, encoding="utf-8")

    folder = top / "folder"
    for name in ("examples", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for file in (DOCS / "migrate").glob("*.yaml"):
        shutil.copy(file, folder)
    shown = {block.file: block.text for page in ("data.md", "tutorial.md") for block in blocks(DOCS / page)}
    for shown_as, file in (("tools.jsonl", "tool_calls.jsonl"), ("chats.jsonl", "chats.jsonl")):
        (folder / file).write_text(shown[shown_as], encoding="utf-8")
    config = {
        "model_name_or_path": HUB_MODELS[0],
        "dataset": "chats.jsonl",
        "validation_size": 1,
        "max_length": 256,
        "max_new_tokens": 8,
    }
    (folder / "solotune.yaml").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _one_shape_for_all_plans() -> Iterator[None]:
    """Each plan looks at the layers of its model for seconds; here all models are one, and it is looked at once."""
    look = plan_inputs.model_shape
    found: list[ModelShape] = []

    def model_shape(config: RunConfig, model_files: ModelFiles | None = None) -> ModelShape:
        if not found:
            found.append(look(config.model_copy(update={"torch_compile": False}), model_files))
        return found[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_inputs, "model_shape", model_shape)
        yield


@pytest.fixture(scope="module")
def folder_with_runs(
    _one_shape_for_all_plans: None, readers_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The reader's folder after a training, under the names that pages use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(readers_folder)
        patch.setattr(constants, "HF_HUB_CACHE", str(readers_folder.parent / "hub"))
        assert cli.main(["train", "solotune.yaml", "output_dir=runs/first"]) == 0
    for name in RUNS[1:]:
        shutil.copytree(readers_folder / "runs" / "first", readers_folder / "runs" / name)
    trainer = readers_folder / "out" / "checkpoint-2"  # what transformers' Trainer leaves
    trainer.mkdir(parents=True)
    history = [{"step": step, "loss": 2.4 - 0.1 * step, "learning_rate": 1e-4, "epoch": step / 2} for step in (1, 2)]
    state = {"global_step": 2, "max_steps": 2, "logging_steps": 1, "log_history": history}
    (trainer / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    return readers_folder


@pytest.fixture
def at_work(folder_with_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Go to a copy of the reader's folder."""

    def begin() -> Path:
        folder = tmp_path / "folder"
        shutil.copytree(folder_with_runs, folder)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("HOME", str(folder_with_runs.parent / "home"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder_with_runs.parent / "hub"))
        return folder

    return begin
