"""S3, within a turn: each fault is found, and no other."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import pytest

from solotune.dataset import Example
from tests.dataset.conftest import CHATML, FAMILIES, chat, tiny_tokenizer
from tests.diagnosis.rules.rows import Bench, each, sentence, talk, with_template


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
    eos, end = (int(tokenizer.convert_tokens_to_ids(t)) for t in ("<|endoftext|>", "<|im_end|>"))
    model = bench.model(config={"vocab_size": 500}, generation_config={"eos_token_id": eos})
    found = bench.only("F14", talk(), tokenizer, model_name_or_path=model)
    assert found.fix.startswith(f"add {end} to eos_token_id")
    bench.model(generation_config={"eos_token_id": [eos, end]})
    assert bench.codes(talk(), tokenizer, model_name_or_path=model) == []


def test_f15_no_generation_prompt(bench: Bench) -> None:
    found = bench.only("F15", talk(), with_template("chatml", CHATML.partition("{% if add_generation")[0]))
    assert found.evidence["answers_with"] == 30
    assert "<|im_start|>" in found.message


def test_f16_the_generation_prompt_opens_what_answers_do_not_have(bench: Bench) -> None:
    found = bench.only("F16", talk(), "deepseek")
    assert found.evidence["template_differs"] == found.evidence["rows_read"]
    assert "<think>" in found.message


def test_f16_a_prompt_that_ends_inside_a_token(bench: Bench) -> None:
    pairs = [[sentence(random.Random(seed + n)) for seed in (0, 1000)] for n in range(40)]
    rows = [{"prompt": f"Q: {question} A: ", "completion": f"the {answer}"} for question, answer in pairs]
    assert tiny_tokenizer("gpt2").tokenize(": the")[-1] == "Ġthe"
    found = bench.only("F16", rows, "gpt2")
    assert found.fix == "move the space from the end of the prompts to the start of the completions"
    moved = [{"prompt": r["prompt"].rstrip(), "completion": " " + r["completion"]} for r in rows]
    assert bench.codes(moved, "gpt2") == []
