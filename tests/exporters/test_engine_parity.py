"""GGUF files and Modelfiles against training: bounds of the formats, token ids, what the user's own rows make of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exporters.test_turn_format import CHATML, THOUGHTS, with_template
from tiny import save_tokenizer
from tokenizers import normalizers

from solotune.exporters import engine_parity
from solotune.exporters.conversations import Conversation
from solotune.exporters.engine_parity import gguf_parity, ollama_parity
from solotune.exporters.template_parity import TrainedIds


class Engine:
    """llama.cpp's answers, made from training's."""

    def __init__(self, tokenizer: Any, off_by: float) -> None:
        self.trained, self.off_by = TrainedIds(tokenizer), off_by

    def __call__(self, path: Path, **_: Any) -> Engine:
        return self

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def token_ids(self, messages: Any, tools: Any, *, is_prompt: bool) -> list[int]:
        return self.trained(Conversation("", messages, tools, {"add_generation_prompt": is_prompt}))

    def log_probs(self, ids: Any, positions: Any) -> torch.Tensor:
        logits = torch.zeros(len(positions), 5)
        logits[:, 0] = torch.tensor([float(position) for position in positions]) + self.off_by
        return logits.log_softmax(-1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(("off_by", "kind", "ok"), [(0, "f32", True), (0.1, "f32", False), (0.1, "q8_0", True)])
def test_bounds_are_those_of_the_format(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, off_by: float, kind: str, ok: bool
) -> None:
    monkeypatch.setattr(engine_parity, "LlamaCpp", Engine(with_template(tokenizer, CHATML), off_by))
    logits = torch.zeros(3, 5)
    logits[:, 0] = torch.arange(3)
    parity, problems, notes = gguf_parity(Path("x"), kind, tokenizer, "chat", [([1, 2, 3], logits)])
    assert parity.positions == 3 and parity.token_ids_equal and parity.conversations >= 200 and notes == []
    assert (problems == []) is ok and all("log-probabilities differ" in text or "mean KL" in text for text in problems)


def test_a_template_for_ollama_is_compared_with_training(tokenizer: Any) -> None:
    parity, problems, notes = ollama_parity(with_template(tokenizer, CHATML), [["e\u0301"]])
    assert parity.token_ids_equal and parity.conversations >= 150 and problems == notes == []
    composing = copy.deepcopy(with_template(tokenizer, THOUGHTS))
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    parity, (problem,), notes = ollama_parity(composing, [["caf\u00e9"], ["x", "e\u0301"]])
    assert not parity.token_ids_equal and "thought in tags before" in notes[0]
    assert problem.startswith(
        "Ollama does not compose characters as this tokenizer does (NFC); 1 of the 2 rows has text"
    )
