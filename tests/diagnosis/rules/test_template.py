"""S3, the format: each fault is found, and no other."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from tests.dataset.conftest import FAMILIES, tiny_tokenizer
from tests.diagnosis.rules.rows import Bench, each, sentence, talk, with_template


def test_f08_bos_twice(bench: Bench) -> None:
    template = "{{ bos_token }}" + str(FAMILIES["llama3"][0])
    found = bench.only("F08", talk(), with_template("llama3", template), chat_template_path="my.jinja")
    assert found.fix == "write <|begin_of_text|> once in my.jinja"
    assert bench.only("F08", [{"text": "<s><s>" + sentence(random.Random(n))} for n in range(40)], "mistral")


def adding_bos(family: str, template: str) -> PreTrainedTokenizerBase:
    from tokenizers import processors

    tokenizer = with_template(family, template)
    bos = (str(tokenizer.bos_token), tokenizer.bos_token_id)
    backend: Any = tokenizer
    backend.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", pair=f"{bos[0]} $A $B", special_tokens=[bos]
    )
    return tokenizer


def test_f09_no_bos(bench: Bench) -> None:
    template = str(FAMILIES["llama3"][0])
    tokenizer = adding_bos("llama3", template.replace("{{ bos_token }}", ""))
    found = bench.only("F09", talk(), tokenizer, chat_template_path="my.jinja")
    assert "<|begin_of_text|>" in found.message
    assert bench.codes(talk(), tokenizer) == []  # the model's own, then served without it too
    assert bench.codes(talk(), adding_bos("llama3", template), chat_template_path="my.jinja") == []


FOREIGN = "### Human: {}\n### Assistant: {}"


def test_f12_texts_in_another_format(bench: Bench) -> None:
    rows = [{"text": FOREIGN.format(*(m["content"] for m in row["messages"]))} for row in talk()]
    found = bench.only("F12", rows)
    assert "### Human" in found.message
    assert found.evidence["expected"] == "<|im_end|>\n<|im_start|>assistant"
    remark = bench.only("F12", rows, "gpt2")  # a base model
    assert (remark.slug, remark.signal) == ("already-rendered", None)
    assert "in the format ### Human" in remark.message
    tokenizer = copy.deepcopy(tiny_tokenizer("chatml"))
    tokenizer.eos_token = "<|endoftext|>"  # a base model that carries a template (Qwen)
    assert bench.only("F12", rows, tokenizer).signal is None
    # what the remark advises
    marks = FOREIGN.partition(" {}\n### Assistant:")
    pairs = [[m["content"] for m in row["messages"]] for row in talk()]
    prompts = [{"prompt": f"{marks[0]} {q}\n### Assistant:", "completion": f" {a}"} for q, a in pairs]
    assert bench.codes(prompts, "gpt2") == []
    assert bench.codes(talk()) == []


def test_f12_prompt_and_completion_of_a_chat_model(bench: Bench) -> None:
    pairs = [[m["content"] for m in row["messages"]] for row in talk()]
    assert bench.only("F12", [{"prompt": q + "\n", "completion": a} for q, a in pairs])
    own = [{"text": f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>"} for q, a in pairs]
    said = bench.only("F12", own)
    assert (said.slug, said.signal) == ("already-rendered", None)
    assert "40 of 40 texts are already rendered by this model's chat template" in said.message
    assert "only their assistant turns" in said.message


def test_f12_a_few_texts_that_are_not_rendered_are_a_fault(bench: Bench) -> None:
    own = [{"text": f"<|im_start|>user\n{n}?<|im_end|>\n<|im_start|>assistant\n{n}.<|im_end|>"} for n in range(30)]
    plain = [{"text": sentence(random.Random(n))} for n in range(10)]
    (found,) = [one for one in bench.find([*own, *plain]) if one.code == "F12"]
    assert (found.severity, "The other 10 are trained on as plain text" in found.message) == ("warning", True)


@pytest.mark.parametrize("form", ["<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}", "[INST] {} [/INST] {}"])
def test_f12_a_whole_chat_in_one_message(bench: Bench, form: str) -> None:
    rows = each(talk(), lambda n, m: [{**m[0], "content": form.format("a", "b") + m[0]["content"]}, m[1]])
    rows[4:] = talk(seed=1)[4:]  # in one row of ten
    found = bench.only("F12", rows)
    assert "once more" in found.message
    assert "whole turns" in found.message
    assert found.fix.endswith("the whole text under text")


def test_f12_messages_that_were_rendered_before(bench: Bench) -> None:
    rows = each(talk(), lambda n, m: [{**x, "content": f"<|im_start|>{x['role']}\n{x['content']}"} for x in m])
    assert "once more" in bench.only("F12", rows).message
    rows = each(talk(), lambda n, m: [{**m[0], "content": "Human: " + m[0]["content"]}, m[1]])
    assert bench.only("F12", rows, "llama3")


def with_own_template(bench: Bench, own: PreTrainedTokenizerBase, eos: str) -> str:
    """A model folder whose tokenizer has its own template, and whose generation stops at `eos`."""
    folder = bench.model(generation_config={"eos_token_id": own.convert_tokens_to_ids(eos)})
    own.save_pretrained(folder)
    return folder


def test_f12_a_template_file_that_is_another_models(bench: Bench) -> None:
    model = with_own_template(bench, copy.deepcopy(tiny_tokenizer("chatml")), "<|im_end|>")
    foreign = "{% for m in messages %}{{ '### ' + m.role + ':\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    foreign += "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    keys = {"model_name_or_path": model, "chat_template_path": "my.jinja"}
    found = bench.only("F12", talk(), with_template("chatml", foreign), **keys)
    assert "my.jinja" in found.message and found.evidence["with_the_template"] == 0
    assert bench.codes(talk(), "chatml", **keys) == []  # the model's own, copied
    base = copy.deepcopy(tiny_tokenizer("chatml"))
    base.eos_token = "<|endoftext|>"  # a base model that carries a template
    with_own_template(bench, base, "<|endoftext|>")
    base.chat_template = foreign
    assert "F12" not in bench.codes(talk(), base, **keys)


def test_f09_a_template_file_without_what_the_models_own_begins_with(bench: Bench) -> None:
    model = with_own_template(bench, copy.deepcopy(tiny_tokenizer("llama3")), "<|eot_id|>")
    without = with_template("llama3", str(FAMILIES["llama3"][0]).replace("{{ bos_token }}", ""))
    keys = {"model_name_or_path": model, "chat_template_path": "my.jinja"}
    assert "the model's own template begins with" in bench.only("F09", talk(), without, **keys).message
    assert bench.codes(talk(), "llama3", **keys) == []
