"""Render chats with the tokenizer of a run, as they would be served, and decode its rows.

rendered(run_facts, messages)   frame(run_facts)   decoded(run_facts)   marked_ids(tokenizer, messages)
is_chat_model(run_facts, ending)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from solotune.dataset.chat.template import render_chat, render_marked
from solotune.dataset.chat.template_sandbox import TemplateRefusal, TemplateSyntax
from solotune.diagnosis.facts.rows import examples_of
from solotune.diagnosis.run_facts import RunFacts

NUM_ROWS = 100
"""Rows that are decoded, evenly spaced."""


def rendered(
    run_facts: RunFacts, messages: Sequence[dict[str, Any]], prompt: bool = False, template: str | None = None
) -> str | None:
    """Messages rendered by the tokenizer's template (or `template`), as they would be served; None if there is none
    or it fails.

    Raises:
        TemplateLimitError: it needs too much time or memory.
    """
    tokenizer = run_facts.tokenizer
    if tokenizer is None or not tokenizer.chat_template:
        return None
    return rendered_by(tokenizer, messages, prompt, template)


def rendered_by(
    tokenizer: Any, messages: Sequence[dict[str, Any]], prompt: bool = False, template: str | None = None
) -> str | None:
    """The same with a tokenizer, which may have no template of its own."""
    try:
        return render_chat(tokenizer, list(messages), is_prompt=prompt, template=template)
    except (TemplateRefusal, TemplateSyntax):
        return None


def marked_ids(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """Ids of a rendered chat, and for each whether it lies in a `{% generation %}` block, as transformers counts them.

    Raises:
        TemplateRefusal, TemplateSyntax, TemplateLimitError: the template fails.
        ValueError: a tokenizer that does not know where its tokens lie in the text.
    """
    text, spans = render_marked(tokenizer, list(messages))
    encoded = tokenizer(text, add_special_tokens=False)
    if not tokenizer.is_fast:
        raise ValueError("a tokenizer without offsets")
    mask, place = [], 0
    for begin, end in encoded.encodings[0].offsets:  # tokens and spans are both in order
        while place < len(spans) and begin >= spans[place][1]:
            place += 1
        mask.append(place < len(spans) and end > spans[place][0])
    return encoded["input_ids"], mask


def frame(run_facts: RunFacts, template: str | None = None) -> tuple[str, str, str] | None:
    """The template's text before a question, between question and answer, and after the answer; None if it fails."""
    chat = [{"role": "user", "content": "quvwxq"}, {"role": "assistant", "content": "zwvuyz"}]
    text = rendered(run_facts, chat, template=template)
    match = re.fullmatch(r"(.*)quvwxq(.*)zwvuyz(.*)", text, re.DOTALL) if text else None
    return (match[1], match[2], match[3]) if match else None


def own_frame(run_facts: RunFacts) -> tuple[str, str, str] | None:
    """`frame` by the template that the base came with: the template of the run may be the fault."""
    return frame(run_facts, run_facts.base_template or None)


def is_chat_model(run_facts: RunFacts, ending: str) -> bool:
    """Whether generation, by the base's files, ends with the text that the template writes after answers."""
    tokenizer = run_facts.tokenizer
    if tokenizer is None or not ending.strip():
        return False
    ends = tokenizer.encode(ending.strip(), add_special_tokens=False)[:1]
    stops: set[int] = set()
    for config in (run_facts.generation_config, run_facts.model_config):
        found = config.get("eos_token_id")
        stops |= {one for one in (found if isinstance(found, list) else [found]) if isinstance(one, int)}
    return bool(ends) and (ends[0] in stops or ends[0] == tokenizer.eos_token_id)


def decoded(run_facts: RunFacts) -> list[str]:
    """Some training rows as text, special tokens included."""
    if run_facts.tokenizer is None:
        return []
    rows = examples_of(run_facts)
    chosen = [rows[int(i)] for i in np.linspace(0, len(rows) - 1, min(NUM_ROWS, len(rows))).astype(int)]
    return [
        str(run_facts.tokenizer.decode(row.input_ids.tolist(), clean_up_tokenization_spaces=False)) for row in chosen
    ]
