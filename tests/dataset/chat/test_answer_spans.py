"""Rendering and masks: what is learned of a chat, by hand, for every family of templates."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inline_snapshot import snapshot
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from solotune.dataset import render_prompt
from solotune.dataset.chat.answer_spans import ChatTemplate
from solotune.dataset.chat.encode import Encoder
from solotune.errors import InputError
from tests.dataset.conftest import FAMILIES, chat, tiny_tokenizer
from tests.messages import stable

FAMILY_NAMES = [family for family, (template, *_) in FAMILIES.items() if template]


def encoded(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, str]:
    rendered = ChatTemplate(tokenizer).render("row", messages)
    encoded = Encoder(tokenizer).encode([rendered], ["row"])[0]
    ids, supervised = encoded.ids, encoded.mask()
    return ids, supervised, rendered.text


def learned(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> list[str]:
    """The runs of supervised tokens, decoded."""
    ids, supervised, _ = encoded(tokenizer, messages)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], supervised, [False])).astype(int)))
    return [tokenizer.decode(ids[begin:end]) for begin, end in zip(edges[::2], edges[1::2], strict=True)]


TWO = chat("Hello  there,\nhow?", "I am  fine.", "Bye", "Bye")
EXPECTED = {
    "chatml": ["I am  fine.<|im_end|>", "Bye<|im_end|>"],
    "llama3": ["I am  fine.<|eot_id|>", "Bye<|eot_id|>"],
    "gemma": ["I am  fine.<end_of_turn>", "Bye<end_of_turn>"],
    "qwen3": ["I am  fine.<|im_end|>", "<think>\n\n</think>\n\nBye<|im_end|>"],
    "mistral": [" I am  fine.</s>", " Bye</s>"],
    "glm": ["I am  fine.", "Bye"],
    "harmony": ["<|message|>I am  fine.<|end|>", "<|message|>Bye<|return|>"],
    "deepseek": ["I am  fine.<|eos|>", "Bye<|eos|>"],
}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_answers_are_learned_with_the_token_that_ends_them(family: str) -> None:
    assert learned(tiny_tokenizer(family), TWO) == EXPECTED[family]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_ids_are_those_of_the_plain_tokenizer(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    ids, _, text = encoded(tokenizer, TWO)
    assert text == tokenizer.apply_chat_template(TWO, tokenize=False)
    assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.dtype == np.int32


def test_real_tokenizer_where_pad_is_eos(smollm2: PreTrainedTokenizerBase) -> None:
    assert smollm2.pad_token_id == smollm2.eos_token_id
    assert learned(smollm2, TWO) == ["I am  fine.<|im_end|>", "Bye<|im_end|>"]
    ids, _, text = encoded(smollm2, TWO)
    assert ids.tolist() == smollm2(text, add_special_tokens=False)["input_ids"]


def test_one_bos() -> None:
    tokenizer = tiny_tokenizer("llama3")
    ids, _, _ = encoded(tokenizer, TWO)
    assert ids.tolist().count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_prompt_for_generation_is_the_beginning_of_the_row(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    ids, supervised, _ = encoded(tokenizer, TWO[:2])
    before = ids[: np.flatnonzero(supervised)[0]].tolist()
    prompt = render_prompt(tokenizer, TWO[:1])
    if family == "deepseek":  # its prompt opens a thinking block, which a row without thoughts does not have
        assert prompt[: len(before)] == before
        assert tokenizer.decode(prompt[len(before) :]) == "<think>\n"
    else:
        assert prompt == before


words = st.text(alphabet="ab.?! \n\té€漢", min_size=1, max_size=12).filter(lambda text: text.strip())


@pytest.mark.parametrize("family", FAMILY_NAMES)
@settings(max_examples=40, deadline=None)
@given(contents=st.lists(words, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
def test_any_contents(family: str, contents: list[str]) -> None:
    """The oracle writes the learned text by the family's rule; blanks at the edges are the template's to trim."""
    tokenizer = tiny_tokenizer(family)
    messages = chat(*contents)
    _, _, text = encoded(tokenizer, messages)
    answers = [text[begin:end] for begin, end in ChatTemplate(tokenizer).render("row", messages).answers]
    frame = [expected.replace("I am  fine.", "{}").replace("Bye", "{}") for expected in EXPECTED[family]]
    trims = family in ("llama3", "gemma")
    wanted = [
        frame[-1 if turn == len(contents) - 1 else 0].format(contents[turn].strip() if trims else contents[turn])
        for turn in range(1, len(contents), 2)
    ]
    assert answers == wanted


def test_thinking_of_the_last_answer_is_learned_and_of_earlier_ones_is_not_there() -> None:
    messages = chat("a", "<think>\nhm\n</think>\n\nb", "c", "<think>\noh\n</think>\n\nd")
    assert learned(tiny_tokenizer("qwen3"), messages) == ["b<|im_end|>", "<think>\noh\n</think>\n\nd<|im_end|>"]
    assert learned(tiny_tokenizer("deepseek"), messages)[0].strip() == "b<|eos|>"


def call(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": {"city": "Paris"}}}


TOOLS = [
    {"role": "user", "content": "Hot?"},
    {"role": "assistant", "content": "", "tool_calls": [call("get_weather")]},
    {"role": "tool", "content": "22"},
    {"role": "assistant", "content": "It is 22."},
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "fine"},
]


def test_tool_calls_are_learned_although_later_history_rewrites_them() -> None:
    learned_here = learned(tiny_tokenizer("qwen3"), TOOLS)
    assert learned_here == [
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
        "It is 22.<|im_end|>",
        "<think>\n\n</think>\n\nfine<|im_end|>",
    ]


def test_a_template_that_leaves_out_tool_calls_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        learned(tiny_tokenizer("chatml"), TOOLS)
    assert stable(caught.value) == snapshot("""\
row: message 2: the chat template leaves out this answer or a part of it
  seen:    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "functi
  allowed: a template that renders every assistant message, with its tool calls
  change:  set chat_template_path to a template that does, or remove the row\
""")


def test_first_and_consecutive_assistant_messages() -> None:
    messages = [{"role": role, "content": role[0] * 3} for role in ("assistant", "user", "assistant", "assistant")]
    assert learned(tiny_tokenizer("chatml"), messages) == ["aaa<|im_end|>"] * 3


def test_answers_that_repeat_each_other_and_the_template() -> None:
    messages = chat("assistant\n", "assistant\n", "x", "user\n")
    assert learned(tiny_tokenizer("chatml"), messages) == ["assistant\n<|im_end|>", "user\n<|im_end|>"]


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer("chatml").backend_tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}",  # no answers
        "{% for m in messages %}{{ m.content[:3] }}<|im_end|>{% endfor %}",  # cuts them
        "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}",  # changes them
    ],
)
def test_a_template_that_does_not_keep_an_answer_is_refused(template: str) -> None:
    with pytest.raises(InputError) as caught:
        learned(with_template(template), chat("Hello", "Hello there, Paris"))
    assert stable(caught.value) == snapshot("""\
row: message 2: the chat template leaves out this answer or a part of it
  seen:    {"role": "assistant", "content": "Hello there, Paris"}
  allowed: a template that renders every assistant message, with its tool calls
  change:  set chat_template_path to a template that does, or remove the row\
""")


def test_an_answer_rendered_twice_is_refused_or_learned_whole() -> None:
    template = "{% for m in messages %}{{ m.content }}{{ m.content }}<|im_end|>{% endfor %}"
    # by the prefix method all of it is what the model has to write
    assert learned(with_template(template), chat("a", "b")) == ["bb<|im_end|>"]


def test_the_templates_own_refusal_names_the_row() -> None:
    with pytest.raises(InputError) as caught:
        learned(tiny_tokenizer("gemma"), chat("a", "b", system="c"))
    assert stable(caught.value) == snapshot("""\
row: the model's chat template refuses this row
  seen:    System role not supported; the roles are system, user, assistant
  change:  change the row to what the template accepts, or set chat_template_path\
""")


def test_no_template() -> None:
    with pytest.raises(InputError) as caught:
        ChatTemplate(tiny_tokenizer("gpt2"))
    assert str(caught.value).startswith("the tokenizer has no chat template, but the rows are chats\n")
    assert "set chat_template_path" in str(caught.value)


def test_what_ends_a_turn_is_read_off_the_template() -> None:
    ends = {family: set(ChatTemplate(tiny_tokenizer(family)).terminators) for family in FAMILY_NAMES}
    assert ends == {
        "chatml": {"<|im_end|>"},
        "llama3": {"<|eot_id|>"},
        "gemma": {"<end_of_turn>"},
        "qwen3": {"<|im_end|>"},
        "mistral": {"</s>"},
        "glm": set(),
        "harmony": {"<|end|>", "<|return|>"},
        "deepseek": {"<|eos|>"},
    }


def test_two_tokens_that_end_a_turn_are_both_learned() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}"
        "{{ '<|im_end|><|endoftext|>' if m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    assert learned(with_template(template), TWO) == [
        "I am  fine.<|im_end|><|endoftext|>",
        "Bye<|im_end|><|endoftext|>",
    ]


def test_an_end_only_after_the_last_answer_does_not_make_the_next_header_one() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% else %}<|im_end|>{% endif %}"
    )
    assert learned(with_template(template), TWO) == ["I am  fine.", "Bye<|im_end|>"]


def test_a_prompt_that_opens_what_a_row_does_not_have_in_plain_text() -> None:
    template = (
        "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}A: (thinking){% endif %}"
    )
    rendered = ChatTemplate(with_template(template)).render("row", TWO)
    assert [rendered.text[begin:end] for begin, end in rendered.answers] == ["I am  fine.", "Bye"]


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma"])
def test_two_renderings_a_row_are_enough_for_most_templates(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(tiny_tokenizer(family))
    template.render("row", TWO)  # the probes of a template are rendered once
    rendered = []
    raw = template.raw
    monkeypatch.setattr(template, "raw", lambda *args, **keys: rendered.append(1) or raw(*args, **keys))
    template.render("row", chat(" a ", " b\n", "\nc", "\n d") * 10)
    assert len(rendered) == 2


# --- templates that write a history otherwise than they wrote the turns

# system and tools stand before the last question, tool calls are JSON, results are quoted: Mistral v3
MISTRAL_V3 = """{{- bos_token }}{% set ns = namespace(last=0, system='') %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if messages[0].role == 'system' %}{% set ns.system = messages[0].content + '\n\n' %}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{{- '[INST] ' + ((tools | tojson) if tools and loop.index0 == ns.last else '') }}
{{- (ns.system if loop.index0 == ns.last else '') + m.content + '[/INST]' }}
{%- elif m.role == 'tool' %}
{%- if not messages[loop.index0 - 1].tool_calls %}{{ raise_exception('no call') }}{% endif %}
{{- '[INST] ' + m.content | tojson + '[/INST]' }}
{%- elif m.role == 'assistant' and m.tool_calls %}
{{- ' ' + m.tool_calls | map(attribute='function') | list | tojson + eos_token }}
{%- elif m.role == 'assistant' %}
{%- if messages[loop.index0 - 1].role != 'assistant' %}{{ ' ' }}{% endif %}{{ m.content }}
{{- '\n\n' if not loop.last and messages[loop.index0 + 1].role == 'assistant' else eos_token }}
{%- endif %}{% endfor %}"""


def mistral_v3() -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tiny_tokenizer("mistral"))
    tokenizer.chat_template = MISTRAL_V3
    return tokenizer


def answers_of(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: Any = None) -> list[str]:
    rendered = ChatTemplate(tokenizer).render("row", messages, tools)
    return [rendered.text[begin:end] for begin, end in rendered.answers]


def test_a_system_message_that_moves_to_the_last_question() -> None:
    messages = chat("Hi", "Hello.", "And?", " Nothing. ", "Bye", "Bye.", system="Be kind.")
    assert answers_of(mistral_v3(), messages) == [" Hello.</s>", "  Nothing. </s>", " Bye.</s>"]


def test_tools_that_move_to_the_last_question() -> None:
    tools = [{"type": "function", "function": {"name": "get_weather"}}]
    asked = '[{"name": "get_weather", "arguments": {"city": "Paris"}}]'
    assert answers_of(mistral_v3(), TOOLS, tools) == [f" {asked}</s>", " It is 22.</s>", " fine</s>"]


def test_two_answers_that_the_template_joins_to_one_turn() -> None:
    messages = [*chat("Hi", "Hello."), {"role": "assistant", "content": "And?"}, *chat("No", "Bye.")]
    for system in ([], [{"role": "system", "content": "Be kind."}]):
        assert answers_of(mistral_v3(), [*system, *messages]) == [" Hello.", "\n\nAnd?</s>", " Bye.</s>"]


def test_a_call_whose_reasoning_a_later_answer_takes_away() -> None:
    """gpt-oss: reasoning stays until the final answer, and a tool's result must follow a call."""
    template = """{% for m in messages %}{% if m.role == 'assistant' %}
{%- if m.reasoning_content and loop.last %}<|im_start|>assistant:thinks {{ m.reasoning_content }}<|im_end|>{% endif %}
{%- for call in m.tool_calls %}<|im_start|>assistant:{{ call.function.name }}<|endoftext|>{% endfor %}
{%- if m.content %}<|im_start|>assistant:{{ m.content }}<|im_end|>{% endif %}
{%- else %}
{%- if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}{{ raise_exception('no call') }}{% endif %}
{{- '<|im_start|>' + m.role + ':' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant{% endif %}"""
    messages = [TOOLS[0], {**TOOLS[1], "reasoning_content": "Let me see."}, *TOOLS[2:4]]
    assert answers_of(with_template(template), messages) == [":get_weather<|endoftext|>", ":It is 22.<|im_end|>"]


def test_a_result_put_between_calls_and_text_of_an_answer_is_never_learned() -> None:
    """Gemma 4 renders the calls, then what the tool answered, then the text that the model wrote with the calls."""
    template = """{% for m in messages if m.role != 'tool' %}<|im_start|>{{ m.role + ':' }}
{%- for call in m.tool_calls %}{{ call.function.name }}({{ messages[2].content }}){% endfor %}
{{- m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"""
    with pytest.raises(InputError) as caught:
        answers_of(with_template(template), [TOOLS[0], {**TOOLS[1], "content": "I look."}, *TOOLS[2:4]])
    assert stable(caught.value) == snapshot("""\
row: message 2: the chat template puts the tool's result inside this answer
  seen:    get_weather(22)I look.<|im_end|>
  allowed: with this template: an answer that calls tools and has no text
  change:  remove the text of this answer, set chat_template_path to another template, or remove the row\
""")
