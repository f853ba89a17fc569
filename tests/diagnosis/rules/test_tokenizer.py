"""S2: each fault of the tokenizer is found, and no other."""

from __future__ import annotations

import pytest

from tests.dataset.conftest import CHATML, FAMILIES, tiny_tokenizer
from tests.diagnosis.rules.rows import Bench, answered, each, talk, with_template


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
