"""S2: tokens without an embedding, or with one that nothing trained, are found."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import FAMILIES as FAMILIES_OF_MODELS

from solotune.dataset import Example
from solotune.diagnosis.rules import ask_all
from solotune.diagnosis.rules.embedding import untrained_embedding, untrained_rows
from solotune.diagnosis.run_facts import LiveModel, RunFacts, Settings
from tests.dataset.conftest import tiny_tokenizer
from tests.diagnosis.rules.rows import Bench, answered, id_of, talk


def test_f05_a_token_beyond_the_embedding(bench: Bench) -> None:
    size = len(tiny_tokenizer("chatml"))
    # the last three tokens of the vocabulary are <|endoftext|>, <|im_end|> and <|im_start|>
    found = bench.only("F05", talk(), model_name_or_path=bench.model(config={"vocab_size": size - 1}))
    assert (found.severity, found.evidence["largest_id"], found.evidence["embedding_rows"]) == (
        "error",
        size - 1,
        size - 1,
    )


def weights(size: int = 400, width: int = 64) -> torch.Tensor:
    """An embedding whose rows were trained: larger than fresh ones, and of all directions."""
    return torch.randn(size, width, generator=torch.Generator().manual_seed(0)) * 0.3


@pytest.mark.parametrize("kind", ["zero", "mean", "fresh", "like the padding"])
def test_f06_rows_that_nothing_trained(kind: str) -> None:
    tokenizer, embedding = tiny_tokenizer("chatml"), weights()
    end, ordinary = id_of("chatml", "<|im_end|>"), np.arange(40, 100)
    assert untrained_rows(embedding, np.append(ordinary, end), tokenizer) == []
    noise = torch.randn(400, 64, generator=torch.Generator().manual_seed(1))
    if kind == "like the padding":
        embedding[len(tokenizer) :] = noise[len(tokenizer) :] * 0.005
    values = {"zero": 0 * noise[0], "mean": embedding.mean(0), "fresh": 0.02 * noise[0]}
    embedding[end] = values.get(kind, 0.005 * noise[end])
    assert untrained_rows(embedding, np.append(ordinary, end), tokenizer) == [end]


def test_f06_fresh_rows_that_look_like_all_others_tell_nothing() -> None:
    tokenizer, embedding = tiny_tokenizer("chatml"), weights() / 15  # as small as fresh ones
    end = id_of("chatml", "<|im_end|>")
    assert untrained_rows(embedding, np.append(np.arange(40, 100), end), tokenizer) == []


def test_f06_tokens_that_the_bases_tokenizer_does_not_have() -> None:
    """In the padding of the embedding, which was not resized."""
    config = {**FAMILIES_OF_MODELS["llama"]().to_dict(), "vocab_size": 128}
    made = [Example(np.array([1, 5, 9, 120, 2], np.int32), np.arange(5) > 2, f"row {n}", []) for n in range(8)]
    base: Any = range(115)  # as many tokens
    one = RunFacts("test", Settings({}), model_config=config, train=made, base_tokenizer=base)
    (found,) = [s for s in ask_all(one)[0] if s.code == "F06"]
    assert (found.numbers["ids"], found.affected) == ([120], 1.0)
    larger: Any = range(121)
    trains = Settings({"trainable_token_indices": [120]})
    for healthy in (replace(one, base_tokenizer=larger), replace(one, settings=trains)):
        assert not [s for s in ask_all(healthy)[0] if s.code == "F06"]


def test_f05_messages_that_spell_a_token_beyond_the_embedding(bench: Bench) -> None:
    """As text here; what serves the model makes the token of it."""
    tokenizer = copy.deepcopy(tiny_tokenizer("chatml"))
    model = bench.model(config={"vocab_size": len(tokenizer)})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|form|>"]})
    rows = answered(talk(), lambda n, text: f"<|form|> {text}" if n % 3 else text)
    (found,) = [f for f in bench.find(rows, tokenizer, model_name_or_path=model) if f.code == "F05"]
    assert (found.severity, found.evidence["token"]) == ("error", "<|form|>")
    assert "F05" not in bench.codes(talk(), tokenizer, model_name_or_path=model)


def in_one_direction(size: int, width: int = 64) -> torch.Tensor:
    """A head whose rows of ids that training never saw lie close together."""
    return torch.randn(size, width, generator=torch.Generator().manual_seed(3)) * 0.05 + 1


def test_f06_the_row_of_the_head_tells() -> None:
    """Where the embedding's rows all have one size; a token that the model was taught to write is no new one."""
    tokenizer, embedding = tiny_tokenizer("chatml"), weights()
    end, ordinary = id_of("chatml", "<|im_end|>"), np.arange(40, 100)
    head = weights()
    head[len(tokenizer) :] = in_one_direction(400)[len(tokenizer) :]
    chosen = np.append(ordinary, end)
    assert untrained_rows(embedding, chosen, tokenizer, head_VD=head) == []
    head[end] = in_one_direction(400)[0]
    assert untrained_rows(embedding, chosen, tokenizer, head_VD=head) == [end]
    embedding[end], head[end] = 0.02 * embedding[end], weights(1)[0]  # small, but taught
    assert untrained_rows(embedding, chosen, tokenizer, head_VD=head) == []
    assert untrained_rows(embedding, chosen, tokenizer, head_VD=in_one_direction(400)) == []  # nothing is known


def test_f06_an_end_that_was_never_trained_is_no_f14() -> None:
    """And the padding's own row is zero by design."""
    tokenizer, embedding = tiny_tokenizer("chatml"), torch.nn.Embedding(400, 64)
    end = id_of("chatml", "<|im_end|>")
    embedding.weight = torch.nn.Parameter(weights(), requires_grad=False)
    embedding.weight[end] = 0
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(initializer_range=0.02))
    model: Any = SimpleNamespace(
        get_input_embeddings=lambda: embedding, get_output_embeddings=lambda: None, config=config
    )
    ids = np.array([*range(40, 60), end], np.int32)
    made = [Example(ids, np.arange(21) > 9, f"row {n}", []) for n in range(8)]
    one = RunFacts("test", Settings({}), tokenizer, train=made, live=lambda: LiveModel(model, []))
    assert [(s.code, s.against) for s in untrained_embedding(one)] == [("F06", False), ("F14", True)]
    embedding.padding_idx = end
    assert untrained_embedding(one) == []
