"""What a template takes, and which day it writes: the text is always that of `apply_chat_template`."""

from __future__ import annotations

import copy
import json
from datetime import date
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from solotune.dataset import render_prompt
from solotune.dataset.chat.template import Template
from tests.dataset.chat.test_answer_spans import learned, with_template
from tests.dataset.conftest import CHATML, chat, tiny_tokenizer

IN_PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'image' %}<image>{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>"
    "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FIRST_PART = IN_PARTS.replace("{% for part in m.content %}", "{% for part in [m.content[0]] %}{{ part['text'][:0] }}")


@pytest.mark.parametrize("source", [IN_PARTS, FIRST_PART])
def test_contents_as_parts_where_the_template_takes_nothing_else(source: str) -> None:
    tokenizer, rows = with_template(source), chat("Hi", " a\n", "<|im_end|>", "b", system="Be kind.")
    assert learned(tokenizer, rows) == [" a\n<|im_end|>", "b<|im_end|>"]
    parts = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in rows]
    assert Template(tokenizer).render("row", rows) == tokenizer.apply_chat_template(parts, tokenize=False)
    asked = tokenizer.apply_chat_template(parts[:2], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(render_prompt(tokenizer, rows[:2])) == asked


def test_contents_as_text_where_the_template_takes_both() -> None:
    tokenizer = with_template(CHATML.replace("m.content", "m.content if m.content is string else 'parts'"))
    assert "parts" not in Template(tokenizer).render("row", chat("Hi", "a"))


def calling(arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return [*chat("Hi"), {"role": "assistant", "content": "", "tool_calls": [call]}]


def calls(shown: str) -> PreTrainedTokenizerFast:
    """A template with tool calls whose arguments are written by this expression."""
    return with_template(
        CHATML.replace("{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %}{{ " + shown + " }}{% endfor %}")
    )


OBJECT = {"city": "Genève", "days": 2}
TEXT = json.dumps(OBJECT, ensure_ascii=False)
COMPACT = TEXT.replace(" ", "")


@pytest.mark.parametrize(
    ("shown", "arguments", "expected"),
    [
        ("c.function.arguments | tojson", OBJECT, TEXT),
        ("c.function.arguments | tojson", COMPACT, TEXT),  # quoted a second time otherwise
        ("c.function.arguments | tojson", "Paris", '"Paris"'),  # no JSON object: the template's business
        ("'' + c.function.arguments", OBJECT, TEXT),  # raises otherwise
        ("'' + c.function.arguments", COMPACT, COMPACT),
        ("c.function.arguments if c.function.arguments is string else c.function.arguments | tojson", OBJECT, TEXT),
        ("c.function.arguments if c.function.arguments is string else c.function.arguments | tojson", COMPACT, COMPACT),
    ],
)
def test_arguments_of_calls_come_out_once_quoted(shown: str, arguments: Any, expected: str) -> None:
    text = Template(calls(shown)).render("row", calling(arguments))
    assert text == f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{expected}<|im_end|>\n"


# as Llama 3.2 and gpt-oss ask for it: behind a test, and inside a macro
DATED = (
    "\n{%- if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}{% endif -%}\n"
    "{%- macro iso() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}"
    "<|im_start|>system\n{{ today }} = {{ iso() }}, {{ strftime_now('%A %-d. %B, %H:%M, %j %%') }}<|im_end|>\n" + CHATML
)


def test_the_date_is_the_runs() -> None:
    template = Template(with_template(DATED), date(2031, 2, 3))
    text = template.render("row", chat("Hi", "a"))
    assert text.startswith(
        "<|im_start|>system\n03 Feb 2031 = 2031-02-03, Monday 3. February, 00:00, 034 %<|im_end|>\n<|im_start|>user\nHi"
    )


def test_without_a_date_it_is_todays_and_the_text_is_that_of_transformers() -> None:
    tokenizer = with_template(DATED.replace(", %H:%M", ""))
    for rows in (chat("Hi", "a"), chat("Hi", "a\n\n", system="  x")):
        found = [(Template(tokenizer).render("row", rows), tokenizer.apply_chat_template(rows, tokenize=False))
                 for _ in range(2)]  # fmt: skip
        assert any(ours == theirs for ours, theirs in found)  # midnight comes within one pair at most


def test_named_templates_are_found_by_transformers_rule() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer("chatml"))
    tokenizer.chat_template = {"default": CHATML, "tool_use": "with tools on {{ strftime_now('%d %b') }}: " + CHATML}
    tools = [{"type": "function", "function": {"name": "f"}}]
    template = Template(tokenizer, date(2031, 2, 3))
    assert template.render("row", chat("Hi"), tools).startswith("with tools on 03 Feb: ")
    assert template.render("row", chat("Hi")).startswith("<|im_start|>user")
