"""The conversations of a run, as given or from its rows.

chats_of(run_facts)   answers_of(chats)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from solotune.diagnosis.facts.rows import plain_messages
from solotune.diagnosis.run_facts import RunFacts

NUM_CHATS = 2000


def chats_of(run_facts: RunFacts) -> list[list[dict[str, Any]]]:
    """Conversations as given, else those of the training rows; at most NUM_CHATS."""
    chats = [plain_messages(chat) for chat in list(run_facts.conversations)[:NUM_CHATS]]
    return chats or [row.messages for row in list(run_facts.train[:NUM_CHATS]) if row.messages]


def answers_of(chats: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    """The last answer of each chat; of an answer that only calls functions, its calls as JSON."""
    named = ("assistant", "gpt", "model", "bot")
    last = ([m for m in chat if m["role"] in named] or list(chat[-1:]) for chat in chats)
    return [_said(found[-1]) for found in last if found]


def calls_of(message: Mapping[str, Any]) -> Any:
    """The function calls of a message, in the present or the older form of the API; None without."""
    return message.get("tool_calls") or message.get("function_call") or None


def _said(message: Mapping[str, Any]) -> str:
    text, calls = str(message["content"]), calls_of(message)
    return text if text.strip() or not calls else json.dumps(calls, sort_keys=True, default=str)
