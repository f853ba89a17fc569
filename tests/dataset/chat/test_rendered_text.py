"""Texts that are rendered already: trained on as if they had been given as messages."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from solotune.dataset import prepare
from solotune.dataset.chat.rendered_text import known_format
from tests.dataset.conftest import FAMILIES, Writer, chat, config_of, tiny_tokenizer

FAMILY_NAMES = [family for family, (template, *_) in FAMILIES.items() if template]
TALK = chat("Hello there, how?", "I am fine.", "And now?", "Bye then.")


def rows_of(write: Writer, tokenizer: PreTrainedTokenizerBase, *rows: dict[str, Any], **keys: Any) -> Any:
    config = config_of(write("a.jsonl", *rows), **keys)
    return prepare(config, tokenizer, use_cache=False)


def learned(prepared: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    pieces = prepared.train[0].pieces(tokenizer)
    return [piece["text"] for piece in pieces if piece["supervised"]]


def rendered(family: str, messages: list[dict[str, Any]] = TALK) -> str:
    return str(tiny_tokenizer(family).apply_chat_template(messages, tokenize=False))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_rendered_text_is_trained_on_as_its_messages_are(write: Writer, family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    chats = rows_of(write, tokenizer, {"messages": TALK})
    texts = rows_of(write, tokenizer, {"text": rendered(family)})
    assert texts.train[0].input_ids.tolist() == chats.train[0].input_ids.tolist()
    assert texts.train[0].loss_mask.tolist() == chats.train[0].loss_mask.tolist()
    assert texts.report.text_formats == {"this model's chat template": 1}
    assert (texts.report.prompt_format, chats.report.prompt_format) == ("chat", "chat")
    last = rows_of(write, tokenizer, {"text": rendered(family)}, train_on_last_turn=True)
    assert len(learned(last, tokenizer)) == 1
    whole = rows_of(write, tokenizer, {"text": rendered(family)}, assistant_only_loss=False)
    assert whole.train[0].loss_mask[1:].all()


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "mistral"])
@pytest.mark.parametrize("end", ["", "\n", " \n\n"])
def test_a_text_has_one_end(write: Writer, family: str, end: str) -> None:
    tokenizer = tiny_tokenizer(family)
    text = rendered(family).rstrip() + end
    ids = rows_of(write, tokenizer, {"text": text}).train[0].input_ids.tolist()
    assert tokenizer.decode(ids) == text
    (*_, mark) = tokenizer.tokenize(rendered(family).rstrip())
    broken_off = text.rstrip().removesuffix(mark)
    prepared = rows_of(write, tokenizer, {"text": broken_off})
    assert tokenizer.decode(prepared.train[0].input_ids) == broken_off + mark
    assert learned(prepared, tokenizer)[-1].endswith(mark)


def test_a_text_that_ends_with_a_question_gets_no_end(write: Writer) -> None:
    tokenizer = tiny_tokenizer("chatml")
    text = rendered("chatml", TALK[:3])
    prepared = rows_of(write, tokenizer, {"text": text})
    assert tokenizer.decode(prepared.train[0].input_ids) == text
    assert learned(prepared, tokenizer) == ["I am fine.<|im_end|>"]


@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral"])
def test_a_rendered_prompt_and_its_completion(write: Writer, family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    prompt = str(tokenizer.apply_chat_template(TALK[:3], tokenize=False, add_generation_prompt=True))
    completion = rendered(family).removeprefix(prompt)
    prepared = rows_of(write, tokenizer, {"prompt": prompt, "completion": completion + "\n"})
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>"}[family]
    assert "".join(learned(prepared, tokenizer)).lstrip() == f"Bye then.{end}"
    assert prepared.train[0].input_ids.tolist().count(tokenizer.convert_tokens_to_ids(end)) == rendered(family).count(
        end
    )


def test_a_result_between_a_call_and_the_answer_is_not_trained_on(write: Writer) -> None:
    """Llama 3.1 ends a call with another token than an answer."""
    tokenizer = tiny_tokenizer("llama3")
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    text = "<|begin_of_text|>" + head.format("user") + "Hot?<|eot_id|>" + head.format("assistant") + "call()<|eom_id|>"
    text += head.format("ipython") + "22<|eot_id|>" + head.format("assistant") + "Yes.<|eot_id|>"
    assert learned(rows_of(write, tokenizer, {"text": text}), tokenizer) == ["call()<|eom_id|>", "Yes.<|eot_id|>"]


@pytest.mark.parametrize(
    "text",
    [
        "A story about figs.",
        "In ChatML a chat is <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>, and so on.",
        "<|im_start|>user\nHi<|im_end|>\n",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    ],
)
def test_other_texts_are_trained_on_whole(write: Writer, text: str) -> None:
    tokenizer = tiny_tokenizer("chatml")
    prepared = rows_of(write, tokenizer, {"text": text})
    assert prepared.train[0].loss_mask[1:].all()
    assert prepared.report.prompt_format == "text"


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "<|endoftext|>", "<|endoftext|>\n"])
def test_a_plain_text_that_ends_with_an_end_token_gets_no_second(write: Writer, end: str) -> None:
    tokenizer = tiny_tokenizer("chatml")
    prepared = rows_of(write, tokenizer, {"text": "A story." + end}, {"text": "Another story."})
    assert [tokenizer.decode(row.input_ids) for row in prepared.train] == ["A story." + end, "Another story.<|im_end|>"]


KNOWN = {
    "ChatML": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb",
    "Llama 3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>",
    "Llama 2 and Mistral": "<s>[INST] <<SYS>>\nc\n<</SYS>>\n\na [/INST] b </s>",
    "Gemma": "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>",
    "Phi, Zephyr and GLM": "<|user|>\na<|end|>\n<|assistant|>\nb<|end|>",
    "gpt-oss": "<|start|>user<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>",
    "DeepSeek": "<｜begin▁of▁sentence｜><｜User｜>a<｜Assistant｜>b",
    "Alpaca": "Below is an instruction.\n\n### Instruction:\na\n\n### Response:\nb",
    "### Human": "### Human: a\n### Assistant: b",
    "Vicuna": "A chat between a user and an assistant. USER: a ASSISTANT: b</s>",
    "Human and Assistant": "\n\nHuman: a\n\nAssistant: b",
}


@pytest.mark.parametrize("name", KNOWN)
def test_well_known_formats_are_named(write: Writer, name: str) -> None:
    assert known_format(KNOWN[name]) == name
    prepared = rows_of(write, tiny_tokenizer("gpt2"), {"text": KNOWN[name]})
    assert prepared.report.to_json()["text_formats"] == {name: 1}
    assert prepared.report.prompt_format == "text"


@pytest.mark.parametrize(
    "text",
    ["", "A story.", "## Response:\nyes", "[/INST] [INST]", "The user: <b>Anna</b>. The assistant: Bob", "x < y ### z"],
)
def test_other_texts_have_no_known_format(text: str) -> None:
    assert known_format(text) is None
