"""Build `RowFacts` from the rows of a run of any trainer.

For other trainers, rows are as their collator made them, and most settings are unknown. Unknown settings get a value
with which rules that depend on them find nothing: without a known `max_length` no row counts as truncated, and without
a known loss mask every token may have a label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from solotune.dataset import DataReport, Example
from solotune.dataset.data_report import ANSWER_PAST_MAX_LENGTH
from solotune.dataset.example import lengths_of
from solotune.diagnosis.facts.row_facts import RowFacts, RowSettings, with_template
from solotune.diagnosis.run_facts import RunFacts


def facts_of(run_facts: RunFacts) -> RowFacts | None:
    """The facts on rows, tokenizer and template; None without rows or tokenizer."""
    train, validation = (_answered(rows) for rows in (examples_of(run_facts), run_facts.validation))
    if run_facts.tokenizer is None or not train:
        return None
    report = DataReport("messages" if train[0].messages else "text")
    report.num_train, report.num_validation = len(train), len(validation)
    report.labels.row_tokens.extend(lengths_of(train))
    report.dropped[ANSWER_PAST_MAX_LENGTH] = _rows_gone(run_facts)
    files = {"config.json": run_facts.model_config, "generation_config.json": run_facts.generation_config}
    settings = _settings(run_facts, max(lengths_of(train)))
    own = partial(with_template, run_facts.tokenizer, run_facts.base_template, report)
    return RowFacts(settings, run_facts.tokenizer, train, validation, report, files, own)


def _rows_gone(run_facts: RunFacts) -> int:
    """Rows that the trainer left out when it truncated, since no label was left."""
    read, left = run_facts.settings.get("rows_in"), run_facts.settings.get("rows_out")
    return max(read - left, 0) if isinstance(read, int) and isinstance(left, int) else 0


def _answered(rows: Sequence[Example]) -> list[Example]:
    """Rows as the rules expect them: a chat has an answer. A chat with other role names (F36) becomes a text."""
    return [
        row if any(m.get("role") == "assistant" for m in row.messages) else replace(row, messages=[]) for row in rows
    ]


def _settings(run_facts: RunFacts, longest: int) -> RowSettings:
    """The settings that rules on rows read; for unknown ones see the module."""
    get = run_facts.settings.get
    limit, overflow = get("max_length"), get("overflow")
    return RowSettings(
        max_length=limit if isinstance(limit, int) and limit >= 8 else max(longest + 1, 8),
        overflow=overflow if overflow in ("truncate", "drop", "split", "error") else "truncate",
        assistant_only_loss=get("assistant_only_loss") is True,
        chat_template_path=get("chat_template_path"),
    )


def examples_of(run_facts: RunFacts) -> list[Example]:
    """The training rows, with their conversations if known; else the rows of the batches."""
    rows = list(run_facts.train) or [row for batch in run_facts.batches for row in rows_of(batch)]
    chats = run_facts.conversations
    if len(chats) == len(rows) and not any(row.messages for row in rows):
        rows = [replace(row, messages=plain_messages(chat)) for row, chat in zip(rows, chats, strict=True)]
    return rows


def rows_of(batch: Mapping[str, Any]) -> list[Example]:
    """The rows of a padded batch without padding; every label other than -100 counts."""
    ids_BT = np.asarray(batch["input_ids"].cpu(), np.int32)
    labels = batch.get("labels")
    learned_BT = np.asarray(labels.cpu()) != -100 if labels is not None else np.zeros(ids_BT.shape, bool)
    mask = batch.get("attention_mask")
    real_BT = np.asarray(mask.cpu()).astype(bool) if mask is not None and mask.dim() == 2 else np.ones_like(learned_BT)
    return [
        Example(ids[real], learned[real], f"row {number + 1} of a batch", [])
        for number, (ids, learned, real) in enumerate(zip(ids_BT, learned_BT, real_BT, strict=True))
        if real.any()
    ]


def plain_messages(chat: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages with a role and a text as strings; other keys are kept."""
    return [
        {**message, "role": str(message.get("role", "")), "content": text_of(message.get("content"))}
        for message in chat
    ]


def text_of(content: Any) -> str:
    """The text of a content that is a string or a list of parts; empty for others."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""
