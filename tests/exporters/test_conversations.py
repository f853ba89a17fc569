"""Conversations for the comparison of token ids: enough of them, all different, the same on each machine."""

import unicodedata

import pytest
import transformers
from tiny import save_tokenizer

from solotune.errors import InputError
from solotune.exporters.conversations import TEXTS, conversations, split_by_template

STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LEFT_OUT = "answer left out by the chat template"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_more_than_200_conversations_that_all_differ(tokenizer):
    accepted, refused = split_by_template(tokenizer)
    assert len(accepted) == 370
    assert len(accepted) + len(refused) == 397
    assert set(refused.values()) == {LEFT_OUT}  # ChatML shows no tool call
    assert len({one.name for one in accepted}) == len(accepted)
    assert len({repr((one.messages, one.tools, one.kwargs)) for one in accepted}) == len(accepted)
    assert conversations(tokenizer) == accepted


def test_a_strict_template_has_more_than_200_too_and_says_why_it_refuses_the_rest(tokenizer):
    strict = transformers.AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    strict.chat_template = STRICT
    accepted, refused = split_by_template(strict)
    assert len(accepted) > 200
    assert len(accepted) + len(refused) == 397
    assert set(refused.values()) == {"no system prompt", "roles must alternate", LEFT_OUT}
    assert refused["two questions in a row"] == "roles must alternate"


def test_they_cover_what_engines_differ_in(tokenizer):
    accepted = conversations(tokenizer)
    contents = [m["content"] for one in accepted for m in one.messages]
    roles = {m["role"] for one in accepted for m in one.messages}
    assert roles == {"system", "user", "assistant", "tool"}
    assert {one.is_prompt for one in accepted} == {True, False}
    assert {one.messages[-1]["role"] == "assistant" for one in accepted if not one.is_prompt} == {True}
    assert any(len(one.messages) > 15 for one in accepted) and any(len(text) > 5000 for text in contents)
    assert any(one.tools for one in accepted) and any("tool_calls" in m for one in accepted for m in one.messages)
    assert any(m.get("reasoning_content") for one in accepted for m in one.messages)
    directions = {unicodedata.bidirectional(c) for text in contents for c in text}
    assert {"R", "AL", "NSM"} <= directions  # Hebrew, Arabic, marks that combine
    assert any(text != unicodedata.normalize("NFC", text) for text in TEXTS.values())
    assert {text for text in contents if text != text.strip()} and "" in contents
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):  # the tokenizer's own
        assert {f"{token} asked", f"{token} answered"} <= {one.name for one in accepted}


def test_a_tokenizer_without_a_template_has_none(tokenizer):
    plain = transformers.AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    plain.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        conversations(plain)
