"""Batches made by hand for rules on labels, padding and packing: chats of several turns, and labels by a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.rules import rules
from solotune.diagnosis.run_facts import RunFacts, Settings
from tests.diagnosis.probed_models import WORDS

END, PAD, IGNORED = 2, 0, -100  # <|im_end|>, which is also eos; <|endoftext|>
ABOUT_BATCHES = [f"F{n}" for n in (17, 18, 19, 20, 21, 22, 23, 27, 28, 29, 30, 31, 32, 33)]
Token = tuple[int, str, str, int]
"""(id, role, part of the turn: header, text, end or line, number of the turn)."""
Row = list[Token]
Batch = dict[str, torch.Tensor]


def chat(number: int, turns: int = 2, roles: Sequence[str] = ("user", "assistant")) -> list[dict[str, str]]:
    """A chat whose answers are one to four words."""
    found = []
    for turn in range(turns):
        for role in roles:
            words = [WORDS[(number + 3 * turn + k * k) % 10] for k in range(1 + (number + turn) % 4)]
            found.append({"role": role, "content": " ".join(words) + ("?" if role == "user" else ".")})
    return found


def tokens_of(tokenizer: Any, messages: Sequence[dict[str, str]]) -> Row:
    """The chat in ChatML, each token with its place."""
    row: Row = []
    for turn, message in enumerate(messages):
        header = [1, *tokenizer.encode(f"{message['role']}\n", add_special_tokens=False)]
        text = tokenizer.encode(message["content"], add_special_tokens=False)
        line = tokenizer.encode("\n", add_special_tokens=False)
        for part, ids in (("header", header), ("text", text), ("end", [END]), ("line", line)):
            row += [(i, message["role"], part, turn) for i in ids]
    return row


def answers(row: Row, at: int) -> bool:
    """The usual mask: the answers with their ends."""
    _, role, part, _ = row[at]
    return role == "assistant" and part in ("text", "end")


def labelled(rows: Sequence[Row], has_label: Callable[[Row, int], bool]) -> list[tuple[list[int], list[int]]]:
    """Ids and labels."""
    return [([t[0] for t in row], [t[0] if has_label(row, at) else IGNORED for at, t in enumerate(row)])
            for row in rows]  # fmt: skip


def padded(pairs: Sequence[tuple[list[int], list[int]]], left: bool = False, pad: int = PAD, fill: int = IGNORED,
           size: int = 4) -> list[Batch]:  # fmt: skip
    """Batches, padded to their longest row; `fill` is the label of the padding."""
    batches = []
    for first in range(0, len(pairs), size):
        chosen = pairs[first : first + size]
        longest = max(len(ids) for ids, _ in chosen)

        def filled(values: list[int], by: int, longest: int = longest) -> list[int]:
            gap = [by] * (longest - len(values))
            return gap + values if left else values + gap

        batches.append({
            "input_ids": torch.tensor([filled(ids, pad) for ids, _ in chosen]),
            "labels": torch.tensor([filled(labels, fill) for _, labels in chosen]),
            "attention_mask": torch.tensor([filled([1] * len(ids), 0) for ids, _ in chosen]),
        })  # fmt: skip
    return batches


def run_facts_of(tokenizer: Any, batches: Sequence[Batch], chats: Sequence[Any] = (), **settings: Any) -> RunFacts:
    values = {"assistant_only_loss": True, "max_length": 512, **settings}
    return RunFacts("a run", Settings(values), tokenizer=tokenizer, batches=batches, conversations=chats)


def told(run_facts: RunFacts) -> dict[str, str]:
    """Code -> "fault" or "remark", of the rules on batches."""
    found: dict[str, str] = {}
    for code in ABOUT_BATCHES:
        for rule in rules()[code]:
            if rule.reads_rows or rule.lacks(run_facts) is not None:
                continue
            for signal in rule.signals(run_facts):
                assert isinstance(signal, Signal) and 0 < (signal.affected or 1) <= 1
                found[code] = "remark" if signal.kind == "remark" else "fault"
    return found
