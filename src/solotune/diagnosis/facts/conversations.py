"""The conversations of a run, as given or from its rows.

chats_of(run_facts)   answers_of(chats)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from solotune.diagnosis.facts.rows import plain_messages
from solotune.diagnosis.run_facts import RunFacts

NUM_CHATS = 2000


def chats_of(run_facts: RunFacts) -> list[list[dict[str, Any]]]:
    """Conversations as given, else those of the training rows; at most NUM_CHATS."""
    chats = [plain_messages(chat) for chat in list(run_facts.conversations)[:NUM_CHATS]]
    return chats or [row.messages for row in list(run_facts.train[:NUM_CHATS]) if row.messages]


def answers_of(chats: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    """The last answer of each chat."""
    named = ("assistant", "gpt", "model", "bot")
    last = ([m for m in chat if m["role"] in named] or list(chat[-1:]) for chat in chats)
    return [str(found[-1]["content"]) for found in last if found]
