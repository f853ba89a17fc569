"""S2: each fault of the tokenizer is found, and no other."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest

from solotune.dataset import Example
from solotune.diagnosis.rules import ask_all
from solotune.diagnosis.run_facts import RunFacts, Settings
from tests.dataset.conftest import CHATML, FAMILIES, tiny_tokenizer
from tests.diagnosis.probed_models import moved, without_markers
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


def test_f04_ids_that_mean_other_pieces_than_to_the_base() -> None:
    base = tiny_tokenizer("chatml")
    made = [Example(np.array(base.encode("the cat sat"), np.int32), np.ones(3, bool), "a", [])]
    one = RunFacts("test", Settings({}), tokenizer=moved(base, 3), base_tokenizer=base, train=made)
    (found,) = [signal for signal in ask_all(one)[0] if signal.code == "F04"]
    assert (found.kind, found.affected) == ("invariant", 1.0)
    more = copy.deepcopy(base)
    more.add_tokens(["<|new|>"])
    for healthy in (more, copy.deepcopy(base)):
        assert not [s for s in ask_all(replace(one, tokenizer=healthy))[0] if s.code == "F04"]


def test_f07_markers_that_a_conversion_lost(bench: Bench) -> None:
    """By the base's tokenizer, or by an id at which the model stops that is no control token any more."""
    base, lost = tiny_tokenizer("chatml"), without_markers(tiny_tokenizer("chatml"), "<|im_start|>", "<|im_end|>")
    one = RunFacts("test", Settings({}), tokenizer=lost, base_tokenizer=base)
    (found,) = [signal for signal in ask_all(one)[0] if signal.code == "F07"]
    assert (found.kind, sorted(found.numbers["lost"])) == ("invariant", ["<|im_end|>", "<|im_start|>"])
    assert not [s for s in ask_all(replace(one, tokenizer=copy.deepcopy(base)))[0] if s.code == "F07"]

    for stop, severities in (("<|endoftext|>", ["error"]), ("<|im_end|>", [])):
        own = without_markers(tiny_tokenizer("chatml"), "<|im_start|>", *({stop} - {"<|im_end|>"}))
        model = bench.model(config={"eos_token_id": [id_of("chatml", "<|im_end|>"), id_of("chatml", stop)]})
        found = bench.find(talk(), own, model_name_or_path=model)
        assert [f.severity for f in found if f.code == "F07"] == severities, stop
