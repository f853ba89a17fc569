"""The label budget counts what is in the ids, also where a setting would have us believe otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from solotune.dataset import prepare
from solotune.dataset.chat.answer_spans import Rendered
from solotune.dataset.chat.encode import Encoder
from solotune.dataset.token_counts import LabelBudget
from tests.dataset.conftest import FAMILIES, Writer, chat, config_of, tiny_tokenizer


def labels_of(path: Path, tokenizer: PreTrainedTokenizerBase, **keys: Any) -> dict[str, Any]:
    return prepare(config_of(path, **keys), tokenizer).report.to_json()["labels"]


@pytest.mark.parametrize("family", [family for family, (template, *_) in FAMILIES.items() if template])
def test_ends_and_bos_of_each_family(write: Writer, family: str) -> None:
    path = write("a.jsonl", {"messages": chat("Hello there", "I am fine", "how", "thanks")})
    labels = labels_of(path, tokenizer := tiny_tokenizer(family))
    assert labels["answers"] == 2
    has_end = family != "glm"
    assert labels["rows_with_end_supervised"] == has_end
    assert labels["rows_with_end_not_supervised"] == (not has_end)
    assert labels["rows_without_end_token"] == (not has_end)
    begins_with_bos = family in ("llama3", "gemma", "mistral", "deepseek")
    assert labels["rows_by_leading_bos"] == {str(int(begins_with_bos)): 1}
    assert tokenizer.bos_token_id is not None


def test_two_bos_are_counted(write: Writer) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer("llama3"))
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    path = write("a.jsonl", {"messages": chat("a", "b")}, {"messages": chat("c", "d")})
    assert labels_of(path, tokenizer)["rows_by_leading_bos"] == {"2": 2}


def test_an_end_that_is_cut_off_or_not_learned_is_not_there(write: Writer) -> None:
    path = write("a.jsonl", {"messages": chat("a", "b")}, {"messages": chat("a", "word " * 50)})
    tokenizer = tiny_tokenizer("chatml")
    for keys, counts in (
        ({}, (2, 0)),
        ({"max_length": 40}, (1, 1)),
        ({"max_length": 40, "overflow": "split"}, (2, 0)),
        ({"assistant_only_loss": False}, (2, 0)),
    ):
        labels = labels_of(path, tokenizer, **keys)
        assert (labels["rows_with_end_supervised"], labels["rows_with_end_not_supervised"]) == counts, keys


def test_an_answer_cut_away_whole_does_not_count_as_unfinished(write: Writer) -> None:
    path = write("a.jsonl", {"messages": chat("a", "b", "word " * 50, "c")})
    labels = labels_of(path, tiny_tokenizer("chatml"), max_length=40)
    assert (labels["rows_with_end_supervised"], labels["rows_with_end_not_supervised"]) == (1, 0)
    assert labels["supervised_tokens_cut"] > 0


# --- F16


def letters() -> PreTrainedTokenizerFast:
    """One token a character, but `ab`, `aa` and `ba` are one; merged in this order, `aa` first."""
    vocabulary = {token: index for index, token in enumerate(["a", "b", "ab", "aa", "ba"])}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "a"), ("a", "b"), ("b", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    ("text", "begin", "is_prefix", "num_crossing"),
    [
        ("bb", 1, True, 0),
        ("aab", 2, True, 0),
        ("ab", 1, False, 1),  # the token reaches into the answer
        ("baa", 2, False, 1),
        ("bab", 2, False, 1),  # alone `ba`, in the row `b ab`
        ("babb", 0, True, 0),
    ],
)
def test_a_prompt_that_is_no_prefix(text: str, begin: int, is_prefix: bool, num_crossing: int) -> None:
    encoded = Encoder(letters()).encode([Rendered(text, [], [(begin, len(text))])], ["row"])[0]
    assert (encoded.is_prefix, encoded.num_crossing) == ([is_prefix], num_crossing)


@pytest.mark.parametrize("family", [family for family, (template, *_) in FAMILIES.items() if template])
def test_the_short_way_to_ask_agrees_with_the_long_one(family: str) -> None:
    """Against tokenising the whole prompt, over contents that merge with what stands before them."""
    from solotune.dataset.chat.answer_spans import ChatTemplate

    tokenizer = tiny_tokenizer(family)
    template, encoder = ChatTemplate(tokenizer), Encoder(tokenizer)
    contents = ["a", "\n", "\n\nthe", " the", "Hello <|im_end|> there", "  x"]
    rows = [template.render("row", chat(q, a, a, q)) for q in contents for a in contents if q.strip() and a.strip()]
    assert rows
    for row, encoded in zip(rows, encoder.encode(rows, ["row"] * len(rows)), strict=True):
        for (begin, _), span, said in zip(row.answers, encoded.spans, encoded.is_prefix, strict=True):
            prompt = Rendered(row.text[:begin], [one for one in row.forged if one[1] <= begin], [])
            alone = encoder.encode([prompt], ["row"])[0].ids
            assert said == (alone.tolist() == encoded.ids[: span[0]].tolist())


def test_prompts_and_completions_that_merge_are_counted(write: Writer) -> None:
    path = write(
        "a.jsonl",
        {"prompt": "a", "completion": "b"},
        {"prompt": "b", "completion": "b"},
        {"prompt": "a", "completion": "bb"},
    )
    labels = labels_of(path, letters())
    assert labels["rows_where_prompt_is_not_a_prefix"] == labels["tokens_across_the_begin_of_an_answer"] == 1
    dropped = prepare(config_of(path), letters()).report.dropped
    assert dropped == {"no supervised token": 1}  # `ab` is the prompt's, and nothing is left of the answer


# --- for a page


def test_histograms() -> None:
    budget = LabelBudget(row_tokens=[8, 9, 11, 500, 70_000], shares=[0.0, 0.5, 1.0])
    histograms = budget.histograms()
    for histogram, total in ((histograms["row_tokens"], 5), (histograms["supervised_share"], 3)):
        edges, counts = histogram["edges"], histogram["counts"]
        assert len(edges) == len(counts) + 1
        assert edges == sorted(set(edges))
        assert sum(counts) == total
    assert histograms["row_tokens"]["edges"][0] <= 8
    assert histograms["row_tokens"]["edges"][-1] >= 70_000
    assert histograms["supervised_share"]["counts"][0] == histograms["supervised_share"]["counts"][-1] == 1
    assert LabelBudget().histograms()["row_tokens"] == {"edges": [0, 1], "counts": [0]}


@pytest.mark.parametrize("lengths", [[1], [2, 2], [3, 1000], list(range(1, 300))])
def test_no_length_falls_out_of_the_histogram(lengths: list[int]) -> None:
    histogram = LabelBudget(row_tokens=lengths).histograms()["row_tokens"]
    assert histogram["edges"][0] <= min(lengths) and max(lengths) <= histogram["edges"][-1]
    assert histogram["counts"] == np.histogram(lengths, histogram["edges"])[0].tolist()


def test_examples_are_whole_rows(write: Writer) -> None:
    path = write("a.jsonl", *({"messages": chat(f"q{n}", f"a{n}")} for n in range(5)))
    tokenizer = tiny_tokenizer("chatml")
    result = prepare(config_of(path), tokenizer)
    shown = json.loads(json.dumps(result.report.to_json()))["examples"]
    assert len(shown) == 3
    for one, example in zip(shown, result.train, strict=False):
        assert (one["where"], one["tokens"]) == (example.where, len(example.input_ids))
        assert "".join(piece["text"] for piece in one["pieces"]) == tokenizer.decode(example.input_ids)
        learned = "".join(piece["text"] for piece in one["pieces"] if piece["supervised"])
        assert learned == example.messages[1]["content"] + "<|im_end|>"
