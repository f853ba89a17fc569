"""Token boundaries: what a token that reaches across the edge of an answer means, with and without offsets."""

from __future__ import annotations

import numpy as np
import pytest
from inline_snapshot import snapshot
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from solotune.dataset.chat.answer_spans import Rendered
from solotune.dataset.chat.encode import Encoder
from solotune.errors import InputError
from tests.dataset.conftest import tiny_tokenizer
from tests.messages import stable


def letters() -> PreTrainedTokenizerFast:
    """One token a character, but `ab`, `bb` and a blank with its letter are one."""
    vocabulary = {token: index for index, token in enumerate(["a", "b", "Ġ", "Ċ", "ab", "bb", "Ġa"])}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("b", "b"), ("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    ("text", "answer", "learned"),
    [
        ("a a", (1, 3), [" a"]),  # a token that begins with the answer's blank is whole, though GPT-2 trims offsets
        ("a a", (2, 3), []),  # ... and not the answer's if only its letter is
        ("aab", (2, 3), []),  # `ab` begins before the answer
        ("aba", (2, 3), ["a"]),
        ("aab", (1, 2), ["ab"]),  # `ab` begins inside
        ("a\na\n", (2, 3), ["a"]),  # not the newline after it
        ("aa", (0, 0), []),
    ],
)
def test_a_token_belongs_to_the_answer_it_begins_in(text: str, answer: tuple[int, int], learned: list[str]) -> None:
    tokenizer = letters()
    encoded = Encoder(tokenizer).encode([Rendered(text, [], [answer])], ["row"])[0]
    ids, supervised = encoded.ids, encoded.mask()
    assert ids.tolist() == tokenizer(text)["input_ids"]
    assert [tokenizer.decode([index]) for index in ids[supervised]] == learned


def test_several_answers_and_an_empty_text() -> None:
    rows = [Rendered("abba", [], [(0, 1), (3, 4)]), Rendered("", [], [])]
    first, empty = Encoder(letters()).encode(rows, ["a", "b"])
    assert first.mask().tolist() == [True, False, True]
    assert first.mask([1]).tolist() == [False, False, True]
    assert (empty.ids.tolist(), empty.mask().tolist()) == ([], [])
    assert (empty.ids.dtype, empty.mask().dtype) == (np.int32, bool)


def test_without_offsets_a_token_across_the_edge_is_an_error() -> None:
    tokenizer = ByT5Tokenizer()
    encoded = Encoder(tokenizer).encode([Rendered("aéb</s>c", [], [(1, 7)])], ["row"])[0]
    ids, supervised = encoded.ids, encoded.mask()
    assert ids.tolist() == tokenizer("aéb</s>c", add_special_tokens=False)["input_ids"]
    assert supervised.tolist() == [False, True, True, True, True, False]
    with pytest.raises(InputError) as caught:
        Encoder(tokenizer).encode([Rendered("b</s>", [], [(3, 5)])], ["row"])
    assert stable(caught.value) == snapshot("""\
row: this tokenizer merges an answer and the text next to it into one token
  seen:    'b</s>'
  allowed: tokens that belong to the answer or to the text around it, not to both
  change:  use the model's fast tokenizer (tokenizer.json)\
""")


def test_the_tokenizer_is_not_changed() -> None:
    tokenizer = tiny_tokenizer("chatml")
    before = tokenizer.backend_tokenizer.to_str()
    Encoder(tokenizer).encode([Rendered("a<|im_end|>", [(1, 11)], [])], ["row"])
    assert tokenizer.backend_tokenizer.to_str() == before


def test_a_control_token_that_ordinary_text_makes_too_cannot_be_told_from_text() -> None:
    tokenizer = letters()
    tokenizer.add_special_tokens({"eos_token": "ab"})  # `a` and `b` merge into the very same id
    with pytest.raises(InputError) as caught:
        Encoder(tokenizer).encode([Rendered("b ab", [(2, 4)], [])], ["row"])
    assert stable(caught.value) == snapshot("""\
row: the text contains a control token, and this tokenizer cannot encode its spelling as text
  seen:    ab
  change:  change the spelling in the row, or remove the row\
""")
