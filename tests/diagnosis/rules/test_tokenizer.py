"""S2: each fault of the tokenizer is found, and no other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import FAMILIES as FAMILIES_OF_MODELS

from solotune.dataset import Example
from solotune.diagnosis.rules import ask_all
from solotune.diagnosis.rules.tokenizer import untrained_rows
from solotune.diagnosis.run_facts import RunFacts, Settings
from tests.dataset.conftest import CHATML, FAMILIES, tiny_tokenizer
from tests.diagnosis.rules.rows import Bench, answered, each, id_of, talk, with_template


def test_f04_the_models_special_ids_are_words(bench: Bench) -> None:
    model = bench.model(config={"vocab_size": 500, "eos_token_id": 300, "bos_token_id": 301})
    found, stops = bench.find(talk(), model_name_or_path=model)
    assert (found.code, found.severity, stops.code) == ("F04", "error", "F14")  # the diagnosis lists F04 alone
    assert set(found.evidence["model_special_ids"]) == {"300", "301"}
    assert "tokenizer files of the same model" in found.fix


def test_f04_the_vocabulary_is_of_another_size(bench: Bench) -> None:
    size = len(tiny_tokenizer("chatml"))
    assert bench.only("F04", talk(), model_name_or_path=bench.model(config={"vocab_size": 3 * size}))
    assert bench.codes(talk(), model_name_or_path=bench.model(config={"vocab_size": size + 64})) == []
    found = bench.find(talk(), model_name_or_path=bench.model(config={"vocab_size": size // 2}))
    assert [f.code for f in found] == ["F04", "F05"]  # larger than the embedding, without any added token
    (hint,) = bench.find(talk(), model_name_or_path=bench.model(config={"vocab_size": 32000}))[:1]
    assert (hint.code, hint.severity) == ("F04", "error")  # less than half


def test_f04_text_that_the_tokenizer_cannot_spell(bench: Bench) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(
        models.BPE({c: i for i, c in enumerate(["<unk>", *"abcdefghijklmnopqrstuvwxyz?."])}, [], unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {{ eos_token if m.role == 'assistant' }}{% endfor %}"
    )
    rows = answered(talk(), lambda n, text: text.lower() + " очень хорошо")
    found = bench.only("F04", each(rows, lambda n, m: [{**x, "content": x["content"].lower()} for x in m]), tokenizer)
    assert "unknown" in found.message
    assert found.evidence["rows"][0].startswith("a.jsonl:")


def test_f05_a_token_beyond_the_embedding(bench: Bench) -> None:
    size = len(tiny_tokenizer("chatml"))
    # the last three tokens of the vocabulary are <|endoftext|>, <|im_end|> and <|im_start|>
    found = bench.only("F05", talk(), model_name_or_path=bench.model(config={"vocab_size": size - 1}))
    assert (found.severity, found.evidence["largest_id"], found.evidence["embedding_rows"]) == (
        "error",
        size - 1,
        size - 1,
    )


@pytest.mark.parametrize(
    ("family", "spellings", "severity"),
    [
        ("chatml", ("im_start", "im_begin"), "warning"),  # answers still end with a token
        ("chatml", ("im_", "chat_"), "error"),  # nothing to stop on
        ("llama3", ("header_id", "head"), "warning"),
    ],
)
def test_f07_markers_without_tokens(bench: Bench, family: str, spellings: tuple[str, str], severity: str) -> None:
    template = FAMILIES[family][0]
    assert template
    found = bench.only(
        "F07", talk(), with_template(family, template.replace(*spellings)), chat_template_path="my.jinja"
    )
    assert found.severity == severity
    assert found.fix.startswith("remove `chat_template_path: my.jinja`")
    assert all(number > 1 for number in found.evidence["ids_per_marker"].values())


def test_f07_a_base_model_with_chatml(bench: Bench) -> None:
    assert bench.only("F07", talk(), with_template("gpt2", CHATML)).severity == "error"


def test_f07_rows_that_spell_a_token_as_text(bench: Bench) -> None:
    """split_special_tokens: the tokenizer has the marker, and no row has it."""
    tokenizer = tiny_tokenizer("chatml")
    marker = id_of("chatml", "<|im_start|>")
    letters = tokenizer.encode("<|im_start", add_special_tokens=False) + tokenizer.encode("|>")

    def split(rows: list[Example]) -> list[Example]:
        made = []
        for row in rows:
            parts = [letters if i == marker else [i] for i in row.input_ids.tolist()]
            mask = np.repeat(row.loss_mask, [len(part) for part in parts])
            made.append(replace(row, input_ids=np.concatenate(parts).astype(np.int32), loss_mask=mask))
        return made

    (found,) = [f for f in bench.find(talk(), "chatml", split) if f.code == "F07"]
    assert (found.severity, found.evidence["token"]) == ("error", "<|im_start|>")
    assert "F07" not in bench.codes(talk(), "chatml")


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
    one = RunFacts("test", Settings({"base_tokens": 115}), model_config=config, train=made)
    (found,) = [s for s in ask_all(one)[0] if s.code == "F06"]
    assert (found.numbers["ids"], found.affected) == ([120], 1.0)
    for healthy in ({"base_tokens": 121}, {"base_tokens": 115, "trainable_token_indices": [120]}, {}):
        assert not [s for s in ask_all(replace(one, settings=Settings(healthy)))[0] if s.code == "F06"]
