"""Tokens whose text llama.cpp takes for an end token: renamed if no text gives them in training, else left."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from solotune.exporters.engine_vocabulary import END_SPELLING, renamed_tokens

HTML = {"<": 0, "/": 1, "s": 2, ">": 3, "</": 4, "</s": 5, "</s>": 6, "[EOS]": 7}


def tokenizer(vocabulary: dict[str, int], *, splits: bool, added: tuple[str, ...] = ()) -> Any:
    merges = [("<", "/"), ("</", "s"), ("</s", ">")]
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    if splits:
        made.pre_tokenizer = pre_tokenizers.Punctuation("contiguous")
    made.add_tokens(list(added))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


def test_a_token_that_no_text_gives_gets_another_text() -> None:
    assert renamed_tokens(tokenizer(HTML, splits=True)) == {6: "</s_>", 7: "[EOS_]"}
    taken = {**HTML, "</s_>": 8}
    assert renamed_tokens(tokenizer(taken, splits=True))[6] == "</s__>"


def test_a_token_that_texts_are_split_into_keeps_its_text() -> None:
    assert 6 not in renamed_tokens(tokenizer(HTML, splits=False))


def test_a_token_that_the_tokenizer_adds_keeps_its_text() -> None:
    assert renamed_tokens(tokenizer(HTML, splits=True, added=("</s>", "[EOS]"))) == {}


def test_the_longest_spelling_is_found() -> None:
    assert END_SPELLING.sub("x", "a</s> <|end_of_text|> _<EOT> <end>") == "ax x x <end>"
