"""Texts to measure an export with if there are no rows: questions and answers, rendered as the model is asked."""

from __future__ import annotations

import numpy as np

from solotune import dataset
from solotune.dataset import Example
from solotune.errors import InputError
from solotune.exporters.source import MAX_TOKENS, ExportSource

TURNS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Write two lines about the sea.", "Waves come and go home,\nsalt wind writes upon the sand."),
    (
        "Explain why the sky is blue, in two sentences.",
        "Air scatters short wavelengths of sunlight far more than long ones. So blue light reaches us from every part "
        "of the sky, while red light mostly passes straight through.",
    ),
    ("Sum the numbers 12, 7 and 30.", "12 + 7 + 30 = 49"),
    ("Translate into German: Good morning, how are you?", "Guten Morgen, wie geht es Ihnen?"),
    ("Write a Python function that reverses a string.", "def reverse(text):\n    return text[::-1]\n"),
    ("Give me three ideas for a present.", "1. A good book\n2. A plant for the window\n3. Tickets for a concert"),
    ('Return JSON with the keys "name" and "city": Ada lives in London.', '{"name": "Ada", "city": "London"}'),
)


def probe_rows(source: ExportSource) -> list[Example]:
    """The turns as rows whose answers are compared; as plain text for a model that was trained on it."""
    rows = []
    for number, (question, answer) in enumerate(TURNS, start=1):
        prompt = _prompt(source, question)
        ids = [*prompt, *source.tokenizer.encode(answer, add_special_tokens=False)][:MAX_TOKENS]
        ids = np.array(ids, dtype=np.int32)
        rows.append(Example(ids, np.arange(len(ids)) >= len(prompt), f"built-in text {number}", []))
    return [row for row in rows if row.loss_mask[1:].any()]


def _prompt(source: ExportSource, question: str) -> list[int]:
    if source.prompt_format == "chat":
        system = [{"role": "system", "content": source.system_prompt}] if source.system_prompt else []
        try:
            return list(dataset.render_prompt(source.tokenizer, [*system, {"role": "user", "content": question}]))
        except InputError:  # a template may want other messages
            pass
    return list(dataset.text_prompt(source.tokenizer, f"{question}\n"))
