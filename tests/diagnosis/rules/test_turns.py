"""S3, within a turn: each fault is found, and no other."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from solotune.dataset import Example
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import ask_all
from solotune.diagnosis.run_facts import RunFacts, Settings
from tests.dataset.conftest import CHATML, FAMILIES, chat, tiny_tokenizer
from tests.diagnosis.rules.rows import Bench, answered, each, id_of, sentence, talk, with_own_template, with_template


@pytest.mark.parametrize(
    ("family", "end"), [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("mistral", "eos_token")]
)
def test_f10_answers_without_an_end(bench: Bench, family: str, end: str) -> None:
    template = str(FAMILIES[family][0])
    if family == "mistral":
        template = template.replace("{{ eos_token }}", "")
    else:  # only the assistant's
        after = template.index(end)
        template = template[:after] + "{{ '" + end + "' if m.role != 'assistant' }}" + template[after + len(end) :]
    found = bench.only("F10", talk(), with_template(family, template), chat_template_path="my.jinja")
    assert (found.severity, found.suspect) == ("error", "S3")
    assert "my.jinja" in found.fix
    assert found.evidence["answers_without"] == len(talk()) * 3 // 4


def test_f10_is_a_warning_where_the_models_own_template_ends_no_turn(bench: Bench) -> None:
    assert bench.only("F10", talk(), "glm").severity == "warning"


def test_f10_two_rows_are_a_pattern_where_they_are_all(bench: Bench) -> None:
    assert bench.only("F10", talk(3), "glm", validation_size=1).evidence["rows_with"] == 2


def test_f10_texts(bench: Bench) -> None:
    def without_eos(rows: list[Example]) -> list[Example]:
        return [replace(r, input_ids=r.input_ids[:-1], loss_mask=r.loss_mask[:-1]) for r in rows]

    rows = [
        {"prompt": sentence(random.Random(n)) + "\n", "completion": sentence(random.Random(1000 + n))}
        for n in range(40)
    ]
    assert bench.only("F10", rows, "gpt2", without_eos).fix == "end the texts with <|endoftext|>"


@pytest.mark.parametrize("role", ["system", "tool"])
def test_f13_a_role_is_dropped(bench: Bench, role: str) -> None:
    def change(n: int, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        told = {"role": role, "content": sentence(random.Random(1000 + n))}
        call = {"role": "assistant", "content": f'<tool_call>{{"name": "f{n}"}}</tool_call>'}
        return [told, *messages] if role == "system" else [messages[0], call, told, messages[1]]

    template = CHATML.replace("for m in messages", f"for m in messages if m.role != '{role}'")
    found = bench.only("F13", each(talk(), change), with_template("chatml", template))
    assert (found.severity, found.evidence["lost"], found.evidence["of"]) == ("error", 40, 40)
    assert bench.codes(each(talk(), change)) == []


def test_f13_and_f16_do_not_look_at_rows_that_were_cut_behind_a_stop(bench: Bench) -> None:
    """Every row ends with its first turn, so it looks complete although its second turn was truncated."""
    same = chat("Are you there?", "I am. What is it?")
    rows = each(talk(), lambda n, m: [*same, *m])
    (whole,) = {
        len(e.input_ids)
        for e in bench.prepared([{"messages": same}], tiny_tokenizer("chatml"), validation_size=0)[1].train
    }
    num_newline = 1
    found = bench.codes(rows, max_length=whole - num_newline)
    assert not {"F13", "F16"} & set(found), found


def test_f13_a_result_that_the_template_quotes_is_there(bench: Bench) -> None:
    """Llama 3.1 writes a tool's text with `tojson`."""

    def change(n: int, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        call = {"role": "assistant", "content": f'<tool_call>{{"name": "f{n}"}}</tool_call>'}
        return [
            messages[0],
            call,
            {"role": "tool", "content": f'{{"temperature": "{n}", "wind": "none"}}'},
            messages[1],
        ]

    template = CHATML.replace("{{ m.content }}", "{{ m.content | tojson if m.role == 'tool' else m.content }}")
    assert bench.codes(each(talk(), change), with_template("chatml", template)) == []


def test_f13_tools_are_dropped(bench: Bench) -> None:
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
    found = bench.only("F13", [{**row, "tools": tools} for row in talk()])
    assert "tools definitions" in found.message
    template = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + CHATML
    assert bench.codes([{**row, "tools": tools} for row in talk()], with_template("chatml", template)) == []


def test_f14_generation_stops_elsewhere(bench: Bench) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer("chatml"))
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    eos, end = (id_of("chatml", t) for t in ("<|endoftext|>", "<|im_end|>"))
    model = bench.model(config={"vocab_size": 500}, generation_config={"eos_token_id": eos})
    found = bench.only("F14", talk(), tokenizer, model_name_or_path=model)
    assert found.fix.startswith(f"add {end} to eos_token_id in generation_config.json")
    assert (found.severity, found.affected) == ("error", 1.0)
    bench.model(generation_config={"eos_token_id": [eos, end]})  # one of several is right
    assert bench.codes(talk(), tokenizer, model_name_or_path=model) == []


@pytest.mark.parametrize("name", ["generation_config", "config"])
def test_f14_the_tokenizers_own_end_does_not_help(bench: Bench, name: str) -> None:
    """`generate` reads generation_config.json, and without it config.json; the tokenizer's eos_token is right here."""
    tokenizer = tiny_tokenizer("chatml")
    other = id_of("chatml", "<|endoftext|>")
    files = {"config": {"vocab_size": 500, "eos_token_id": tokenizer.eos_token_id}, name: {"eos_token_id": other}}
    found = bench.only("F14", talk(), model_name_or_path=bench.model(**files))
    assert f"by {name}.json generation stops at" in found.message
    assert "the tokenizer's eos_token is right" in found.message


def test_f14_text_with_an_end_of_text_and_rows_of_another_source(bench: Bench) -> None:
    tokenizer = tiny_tokenizer("gpt2")
    model = bench.model(config={"vocab_size": 500, "eos_token_id": tokenizer.eos_token_id})
    texts = [{"text": sentence(random.Random(n))} for n in range(40)]
    assert bench.codes(texts, "gpt2", model_name_or_path=model) == []  # a base model on plain text

    def some_end_otherwise(rows: list[Example]) -> list[Example]:
        other = id_of("chatml", "<|endoftext|>")
        last = [row.loss_mask.nonzero()[0][-1] for row in rows]
        ids = [
            np.where(np.arange(len(r.input_ids)) == at, other, r.input_ids) for r, at in zip(rows, last, strict=True)
        ]
        return [replace(r, input_ids=i) if n % 3 == 0 else r for n, (r, i) in enumerate(zip(rows, ids, strict=True))]

    model = bench.model(generation_config={"eos_token_id": tiny_tokenizer("chatml").eos_token_id})
    found = [f for f in bench.find(talk(), "chatml", some_end_otherwise, model_name_or_path=model) if f.code == "F14"]
    assert [f.severity for f in found] == ["warning"]


def test_f15_no_generation_prompt(bench: Bench) -> None:
    without = with_template("chatml", CHATML.partition("{% if add_generation")[0])
    found = bench.only("F15", talk(), without)
    assert found.evidence["answers_with"] == 30
    assert "<|im_start|>" in found.message
    assert found.severity == "warning"  # this model's own
    model = with_own_template(bench, copy.deepcopy(tiny_tokenizer("chatml")), "<|im_end|>")
    keys = {"model_name_or_path": model, "chat_template_path": "my.jinja"}
    assert bench.only("F15", talk(), without, **keys).severity == "error"


def test_f14_the_file_beside_the_run_counts_before_the_bases() -> None:
    """The base's generation_config.json, which the findings were made with, stops elsewhere; the run's does not."""
    ids, mask = np.array([5, 6, 7, 2], np.int32), np.array([False, True, True, True])
    wrong = Finding.of("F14", "error", message="elsewhere", evidence={}, fix="")
    one = RunFacts("test", Settings({}), findings=[wrong], train=[Example(ids, mask, f"row {n}", []) for n in range(4)])
    assert [s.code for s in ask_all(one)[0] if s.code == "F14"] == ["F14"]
    for right in (
        replace(one, generation_config={"eos_token_id": [9, 2]}),
        replace(one, settings=Settings({"serving_stop_ids": [2]})),
    ):
        assert not [s for s in ask_all(right)[0] if s.code == "F14"]


@pytest.mark.parametrize("role", ["system", "tool"])
def test_f13_of_another_trainer_asks_with_the_datas_own_chats(role: str) -> None:
    """A template that renders a result only after its call drops nothing."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    question, answer = chat("Who?", "Me.")
    messages = [{"role": "system", "content": "Be kind."}, question, answer]
    if role == "tool":
        messages = [question, call, {"role": "tool", "content": "22"}, answer]
    after_a_call = "{% if m.role != 'tool' or messages[loop.index0 - 1].tool_calls %}{{ m.content }}{% endif %}"
    for content, found in ((after_a_call, []), ("{{ m.content if m.role != '" + role + "' }}", ["F13"])):
        tokenizer = with_template("chatml", CHATML.replace("{{ m.content }}", content))
        one = RunFacts("test", Settings({}), tokenizer=tokenizer, conversations=[messages] * 4)
        assert [s.code for s in ask_all(one)[0] if s.code == "F13"] == found


def test_f15_the_header_twice_in_the_prompt(bench: Bench) -> None:
    """And not F16, which the prompts show too."""
    twice = CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<|im_start|>assistant\n{% endif")
    found = bench.only("F15", talk(), with_template("chatml", twice))
    assert (found.severity, found.affected) == ("error", 1.0)
    assert "twice" in found.message


def test_f15_a_mask_that_begins_at_the_header(bench: Bench) -> None:
    """Of another trainer: the prompt of serving ends with the header, and the loss begins before it."""
    header = len(tiny_tokenizer("chatml").encode("<|im_start|>assistant\n"))

    def earlier(rows: list[Example]) -> list[Example]:
        return [replace(row, loss_mask=row.loss_mask | np.roll(row.loss_mask, -header)) for row in rows]

    found = bench.only("F15", talk(), "chatml", earlier)
    assert found.severity == "error" and "in the prompt already" in found.message


def test_f10_a_template_that_another_trainer_has_set(bench: Bench) -> None:
    """The base's own ends its answers; a base without a template has no header that could end them."""
    model = with_own_template(bench, copy.deepcopy(tiny_tokenizer("chatml")), "<|im_end|>")
    without = with_template("chatml", CHATML.replace("<|im_end|>", ""))
    found = [f for f in bench.find(talk(), without, model_name_or_path=model) if f.code == "F10"]
    assert [f.severity for f in found] == ["error"]
    assert bench.only("F10", talk(), without).severity == "warning"


def test_f10_a_models_own_template_that_was_edited(bench: Bench) -> None:
    """Control: generation stops at the header of the next turn, which the rows have (GLM)."""
    edited = with_template("chatml", CHATML.replace("<|im_end|>", ""))
    for own, stop, severity in ((edited, "<|im_end|>", "error"), (tiny_tokenizer("glm"), "<|user|>", "warning")):
        model = with_own_template(bench, own, stop)
        found = [f for f in bench.find(talk(), own, model_name_or_path=model) if f.code == "F10"]
        assert [f.severity for f in found] == [severity], stop


def test_f10_an_end_that_only_questions_have(bench: Bench) -> None:
    """The model stops at a token that is in the rows and is no header: it ends the questions."""
    edited = with_template("chatml", CHATML.replace("<|im_end|>", "{% if m.role == 'user' %}<|im_end|>{% endif %}"))
    model = with_own_template(bench, edited, "<|im_end|>")
    found = [f for f in bench.find(talk(turns=2), edited, model_name_or_path=model) if f.code == "F10"]
    assert [f.severity for f in found] == ["error"]


def test_f10_of_a_base_without_a_template_for_which_one_was_written(bench: Bench) -> None:
    base = copy.deepcopy(tiny_tokenizer("chatml"))
    base.chat_template = None
    model = with_own_template(bench, base, "<|im_end|>")
    without = with_template("chatml", CHATML.replace("<|im_end|>", ""))
    found = [f for f in bench.find(talk(), without, model_name_or_path=model) if f.code == "F10"]
    assert [f.severity for f in found] == ["error"]


def test_f10_is_an_error_where_the_template_ends_turns_with_eos_and_the_rows_do_not(bench: Bench) -> None:
    def without_end(rows: list[Example]) -> list[Example]:
        end = id_of("mistral", "</s>")
        return [
            replace(r, input_ids=r.input_ids[r.input_ids != end], loss_mask=r.loss_mask[r.input_ids != end])
            for r in rows
        ]

    assert bench.only("F10", talk(), "mistral", without_end).severity == "error"


def test_f15_answers_that_were_exported_with_the_header(bench: Bench) -> None:
    header = "<|im_start|>assistant\n"
    rows = answered(talk(), lambda n, text: header + text)
    (found,) = (f for f in bench.find(rows) if f.code == "F15")
    assert (found.severity, found.affected) == ("error", 1.0)
    some = answered(talk(), lambda n, text: header + text if n % 9 == 0 else text)  # texts about the format
    assert "F15" not in bench.codes(some)
