"""Render chats with the tokenizer of a run, as they would be served, and decode its rows.

rendered(run_facts, messages)   frame(run_facts)   decoded(run_facts)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from solotune.diagnosis.facts.rows import examples_of
from solotune.diagnosis.run_facts import RunFacts

NUM_ROWS = 100
"""Rows that are decoded, evenly spaced."""


def rendered(
    run_facts: RunFacts, messages: Sequence[dict[str, Any]], prompt: bool = False, template: str | None = None
) -> str | None:
    """Messages rendered by the tokenizer's template (or `template`), as they would be served; None if there is none
    or it fails."""
    tokenizer = run_facts.tokenizer
    if tokenizer is None or not tokenizer.chat_template:
        return None
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt, chat_template=template
            )
        )
    except Exception:  # templates can raise any error, not only Jinja's
        return None


def frame(run_facts: RunFacts, template: str | None = None) -> tuple[str, str, str] | None:
    """The template's text before a question, between question and answer, and after the answer; None if it fails."""
    chat = [{"role": "user", "content": "quvwxq"}, {"role": "assistant", "content": "zwvuyz"}]
    text = rendered(run_facts, chat, template=template)
    match = re.fullmatch(r"(.*)quvwxq(.*)zwvuyz(.*)", text, re.DOTALL) if text else None
    return (match[1], match[2], match[3]) if match else None


def decoded(run_facts: RunFacts) -> list[str]:
    """Some training rows as text, special tokens included."""
    if run_facts.tokenizer is None:
        return []
    rows = examples_of(run_facts)
    chosen = [rows[int(i)] for i in np.linspace(0, len(rows) - 1, min(NUM_ROWS, len(rows))).astype(int)]
    return [
        str(run_facts.tokenizer.decode(row.input_ids.tolist(), clean_up_tokenization_spaces=False)) for row in chosen
    ]
