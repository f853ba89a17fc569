"""What stands between messages, found by probes; texts are compared with training's renderer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny import CHATML, save_tokenizer

from solotune.errors import InputError
from solotune.exporters.turn_format import derive, engine_adds_bos

USER, ASSISTANT, SYSTEM = ({"role": role, "content": f" {role} \n"} for role in ("user", "assistant", "system"))
STRIPPED = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | trim }}")
LAST_SYSTEM = (
    "{% set s = messages | selectattr('role', 'equalto', 'system') | list %}"
    "{% set m = messages | rejectattr('role', 'equalto', 'system') | list %}{% for x in m %}"
    "{% if x.role == 'user' %}[INST] {% if loop.last and s %}{{ s[0].content }}\n\n{% endif %}{{ x.content }}[/INST]"
    "{% else %} {{ x.content }}</s>{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
THOUGHTS = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def with_template(tokenizer: Any, template: str) -> Any:
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [CHATML, STRIPPED, LAST_SYSTEM, NO_SYSTEM, THOUGHTS, DATED])
def test_prompts_are_those_of_training(tokenizer: Any, template: str) -> None:
    turns = derive(with_template(tokenizer, template))
    for opening in ([], [SYSTEM]) if turns.takes_system else ([],):
        for count in range(4):
            messages = [*opening, *[USER, ASSISTANT] * count, USER]
            assert turns.supports(messages)
            assert turns.render(messages) == turns.trained(messages) is not None


def test_what_is_found(tokenizer: Any) -> None:
    turns = derive(with_template(tokenizer, STRIPPED))
    assert turns.between["user", "assistant"] == turns.between["user", ""] == "<|im_end|>\n<|im_start|>assistant\n"
    assert turns.strips["user"] == (True, True) and not turns.has_date
    assert derive(with_template(tokenizer, DATED)).has_date
    assert derive(with_template(tokenizer, LAST_SYSTEM)).system_at_last == ("", "\n\n")
    assert not derive(with_template(tokenizer, NO_SYSTEM)).takes_system


def test_what_is_not_in_the_pieces_is_seen(tokenizer: Any) -> None:
    turns = derive(with_template(tokenizer, THOUGHTS))
    thought = {"role": "assistant", "content": "<think>x</think>y"}
    assert turns.differs([USER, thought, USER]) and not turns.differs([USER, ASSISTANT, USER])


@pytest.mark.parametrize(
    "messages",
    [
        [USER, USER],
        [ASSISTANT, USER],
        [USER, ASSISTANT],
        [USER, SYSTEM],
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        [USER, {**ASSISTANT, "tool_calls": []}, USER],
        [USER, ASSISTANT, {"role": "tool", "content": "x"}],
    ],
)
def test_other_conversations_are_not_supported(tokenizer: Any, messages: list[dict[str, Any]]) -> None:
    assert not derive(with_template(tokenizer, CHATML)).supports(messages)


def test_a_template_that_leaves_out_a_turn_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="leaves out, repeats or moves"):
        derive(with_template(tokenizer, "{{ messages[-1]['content'] }}"))
    with pytest.raises(InputError, match="refuses a question"):
        derive(with_template(tokenizer, "{{ raise_exception('no') }}"))


def test_bos_is_left_to_an_engine_only_if_the_tokenizer_adds_it(tokenizer: Any, tmp_path: Path) -> None:
    """SmolLM2's BOS is the first token of its template, and its tokenizer adds none."""
    assert not engine_adds_bos(with_template(tokenizer, CHATML), "chat")
    save_tokenizer(tmp_path)
    adds = transformers.AutoTokenizer.from_pretrained(tmp_path)
    from tokenizers.processors import TemplateProcessing

    adds.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    assert engine_adds_bos(with_template(adds, CHATML), "chat") and engine_adds_bos(adds, "text")
    assert not engine_adds_bos(with_template(adds, LAST_SYSTEM), "chat")
    turns = derive(with_template(adds, CHATML))
    assert turns.bos == "<|im_start|>" and turns.between["", "user"] == "user\n"
