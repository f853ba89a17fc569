"""S3, the format of the rows: what is a fault, and what is a remark."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest

from solotune.dataset import Example
from solotune.diagnosis.rules import rules
from solotune.diagnosis.run_facts import RunFacts, Settings
from tests.dataset.conftest import CHATML, tiny_tokenizer
from tests.diagnosis.rules.rows import Bench, each, sentence, talk, with_own_template, with_template

FOREIGN = "### Human: {}\n### Assistant: {}"


def test_f12_texts_in_another_format(bench: Bench) -> None:
    rows = [{"text": FOREIGN.format(*(m["content"] for m in row["messages"]))} for row in talk()]
    found = bench.only("F12", rows)
    assert "### Human" in found.message
    assert found.evidence["expected"] == "<|im_end|>\n<|im_start|>assistant"
    assert (found.severity, found.is_statistic, found.affected) == ("error", True, 1.0)
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
    asked = bench.only("F12", [{"prompt": q + "\n", "completion": a} for q, a in pairs])
    assert (asked.severity, "asked as it stands" in asked.message) == ("warning", True)
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
    found = bench.only("F12", rows)
    assert "once more" in found.message
    assert found.severity == "error"  # every turn has its header twice
    rows = each(talk(), lambda n, m: [{**m[0], "content": "Human: " + m[0]["content"]}, m[1]])
    assert bench.only("F12", rows, "llama3")


FORMS = {
    "in one line": "A chat between a user and an assistant. USER: {} ASSISTANT: {}",
    "alpaca": "Below is an instruction.\n\n### Instruction:\n{}\n\n### Response:\n{}",
    "letters": "Q: {}\nA: {}",
    "words": "Question: {}\n\nAnswer: {}",
    "another family": "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
    "\n\n{}<|eot_id|>",
}


@pytest.mark.parametrize("form", FORMS)
def test_f12_other_forms(bench: Bench, form: str) -> None:
    rows = [{"text": FORMS[form].format(*(m["content"] for m in row["messages"]))} for row in talk()]
    assert bench.only("F12", rows).severity == "error"


def test_f12_texts_that_are_no_chats(bench: Bench) -> None:
    """Control: documents, and texts of which some quote the labels of a chat."""
    texts = [sentence(random.Random(n), 20) for n in range(40)]
    assert bench.codes([{"text": text} for text in texts]) == []
    quoted = [{"text": f"{text} USER: hi ASSISTANT: hello" if n % 4 == 0 else text} for n, text in enumerate(texts)]
    assert bench.codes(quoted) == []
    asked = each(talk(), lambda n, m: [{**m[0], "content": m[0]["content"] + " USER: hi ASSISTANT: yes"}, m[1]])
    assert [f.severity for f in bench.find(asked) if f.code == "F12"] == ["warning"]  # a task about conversations


def test_f12_a_template_file_that_is_another_models(bench: Bench) -> None:
    model = with_own_template(bench, copy.deepcopy(tiny_tokenizer("chatml")), "<|im_end|>")
    foreign = "{% for m in messages %}{{ '### ' + m.role + ':\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    foreign += "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    keys = {"model_name_or_path": model, "chat_template_path": "my.jinja"}
    found = bench.only("F12", talk(), with_template("chatml", foreign), **keys)
    assert "my.jinja" in found.message and found.evidence["with_the_template"] == 0
    assert found.severity == "error"  # plain labels instead of control tokens
    chosen = CHATML.replace("<|im_start|>", "<|endoftext|>")
    assert bench.find(talk(), with_template("chatml", chosen), **keys)[0].severity == "warning"  # may be meant
    assert bench.codes(talk(), "chatml", **keys) == []  # the model's own, copied
    base = copy.deepcopy(tiny_tokenizer("chatml"))
    base.eos_token = "<|endoftext|>"  # a base model that carries a template
    with_own_template(bench, base, "<|endoftext|>")
    base.chat_template = foreign
    assert "F12" not in bench.codes(talk(), base, **keys)


def of_another_trainer(template: str, base: str) -> list[str]:
    """Kinds of the F12 signals on chats that it rendered by this template, where the base's own is another."""
    tokenizer = with_template("chatml", template)
    texts = [str(tokenizer.apply_chat_template(row["messages"], tokenize=False)) for row in talk()]
    made = [np.array(tokenizer.encode(text, add_special_tokens=False), np.int32) for text in texts]
    rows = [Example(ids, np.arange(len(ids)) > 9, "row", []) for ids in made]
    chats = [row["messages"] for row in talk()]
    stops = {"eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>")}
    one = RunFacts("test", Settings({}), tokenizer, {}, stops, rows, conversations=chats, base_template=base)
    return [s.kind for r in rules()["F12"] if not r.reads_rows for s in r.signals(one)]


def test_f12_of_another_trainer() -> None:
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert of_another_trainer(plain, CHATML) == ["measured"]
    assert of_another_trainer(CHATML.replace("im_start", "endoftext"), CHATML) == ["remark"]  # may be chosen
    assert of_another_trainer(CHATML.replace("<|im_end|>", ""), CHATML) == []  # F10
    assert of_another_trainer(CHATML, "") == []


def test_f12_documents_whose_first_token_has_no_label_are_no_chats() -> None:
    tokenizer = with_template("chatml", CHATML)
    stops = {"eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>")}
    made = [np.array(tokenizer.encode(row["messages"][1]["content"]), np.int32) for row in talk()]
    for prompt, kind in ((1, "remark"), (4, "measured")):
        rows = [Example(ids, np.arange(len(ids)) >= prompt, "row", []) for ids in made]
        one = RunFacts("test", Settings({}), tokenizer, {}, stops, rows)
        assert [s.kind for r in rules()["F12"] if not r.reads_rows for s in r.signals(one)] == [kind]
