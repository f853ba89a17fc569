"""Find the role of each token in a document, by the headers of the chat template or the contents of conversations.

A document is decoded token by token, so that each token has a position in the text. Then every header (the text that
the template writes between a user's message and the answer, and between an answer and the next user message) starts a
span. If the tokenizer has no template, the messages of the document's conversation are searched in its text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from solotune.dataset.chat.answer_spans import ChatTemplate
from solotune.diagnosis.facts.texts import Document
from solotune.diagnosis.run_facts import RunFacts
from solotune.errors import SolotuneError

UNKNOWN, OTHER, USER, ASSISTANT = -1, 0, 1, 2
_SENTINELS = ("\ufdd0", "\ufdd1", "\ufdd2")
_SHORTEST = 3  # characters: shorter contents are not searched


class Roles:
    """Roles and turn ends, from the tokenizer's template and the conversations."""

    def __init__(self, run_facts: RunFacts) -> None:
        self.tokenizer = run_facts.tokenizer
        self._conversations = run_facts.conversations or [row.messages for row in run_facts.train[:500] if row.messages]
        self._generation = run_facts.generation_config

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The chat template; None if there is none."""
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            return None
        try:
            return ChatTemplate(self.tokenizer)
        except SolotuneError:
            return None

    @cached_property
    def ends(self) -> frozenset[int]:
        """Ids that end a turn or a text: those that the template writes after answers, and eos."""
        if self.tokenizer is None:
            return frozenset()
        spelled = [] if self.template is None else [self.encode(text) for text in self.template.terminators]
        eos: Any = self.tokenizer.eos_token_id
        named = eos if isinstance(eos, list) else [] if eos is None else [eos]
        return frozenset({ids[-1] for ids in spelled if ids} | set(named))

    @cached_property
    def headers(self) -> dict[int, str]:
        """Role -> the text before a message of it, with trailing white space; empty without a template."""
        if self.template is None:
            return {}
        user, answer, after = _SENTINELS
        turns = [("user", user), ("assistant", answer), ("user", after)]
        try:
            text = self.template.raw("", [{"role": role, "content": content} for role, content in turns])
        except (SolotuneError, ValueError):
            return {}
        before, _, rest = text.partition(user)
        middle, _, rest = rest.partition(answer)
        between, found, _ = rest.partition(after)
        if not found:
            return {}
        for end in self.template.terminators:
            between = between.lstrip().removeprefix(end)
        headers = {ASSISTANT: middle.lstrip(), USER: between.lstrip() if between.strip() else before.lstrip()}
        bare = {header.strip() for header in headers.values()}
        return headers if len(bare) == 2 and all(bare) else {}

    def decode(self, ids: np.ndarray) -> str:
        """The text of some ids, without special tokens."""
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added."""
        assert self.tokenizer is not None
        return self.tokenizer.encode(text, add_special_tokens=False)

    def text_of(self, document: Document) -> tuple[str, np.ndarray]:
        """The text, and int64 (T,): position of each token's first character in it."""
        pieces = [self._piece(int(i)) for i in document.ids]
        for begin, end in _split_characters(pieces):  # their text belongs to the last of their tokens
            whole = self._decoded(document.ids[begin:end].tolist())
            pieces[begin:end] = [""] * (end - begin - 1) + [whole]
        return "".join(pieces), np.concatenate(([0], np.cumsum([len(p) for p in pieces])))[:-1].astype(np.int64)

    @lru_cache(maxsize=1 << 16)  # noqa: B019 (an instance lives as long as a diagnosis)
    def _piece(self, index: int) -> str:
        return self._decoded([index])

    def _decoded(self, ids: list[int]) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def of(self, document: Document, turns: Sequence[Mapping[str, Any]] | None = None) -> np.ndarray | None:
        """int8 (T,): role of each token (headers count as `OTHER`); None if it is not known.

        Args:
            turns: messages that the text is known to have; by default the headers or a conversation of the data.
        """
        if self.tokenizer is None:
            return None
        text, begins_T = self.text_of(document)
        if turns is not None:
            spans = _spans_of(turns, text)
        else:
            spans = self._spans_by_headers(text) or _spans_of(self.conversation_in(text) or (), text)
        if not spans:
            return None
        roles_T = np.zeros(len(document.ids), np.int8)
        for begin, end, role in spans:
            roles_T[(begins_T >= begin) & (begins_T < end)] = role
        return roles_T

    def _spans_by_headers(self, text: str) -> list[tuple[int, int, int]]:
        """Spans (begin, end, role) in characters, by the template's headers."""
        found = []
        for role, header in self.headers.items():
            bare = header.rstrip()
            place = text.find(bare)
            while place >= 0:
                end = place + len(header if text.startswith(header, place) else bare)
                found.append((place, end, role))
                place = text.find(bare, end)
        found.sort()
        if not found:
            return []
        nexts = [*(begin for begin, _, _ in found[1:]), len(text)]
        return [(end, following, role) for (_, end, role), following in zip(found, nexts, strict=True)]

    def conversation_in(self, text: str) -> Sequence[Mapping[str, Any]] | None:
        """The conversation whose longer contents are all in this text; of several the longest."""
        best, most = None, 0
        for conversation in self._conversations:
            contents = [str(message.get("content") or "").strip() for message in conversation]
            size = sum(map(len, contents))
            if size > most and all(c in text for c in contents) and any(len(c) >= _SHORTEST for c in contents):
                best, most = conversation, size
        return best


def _split_characters(pieces: Sequence[str]) -> list[tuple[int, int]]:
    """Stretches (first, one past the last) of tokens that are each a part of a character, as byte-level tokenizers
    split the characters of many scripts."""
    is_part = ["\ufffd" in piece for piece in pieces]
    edges = [n for n in range(len(pieces) + 1) if (n < len(pieces) and is_part[n]) != (n > 0 and is_part[n - 1])]
    return [(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if end - begin > 1]


def _spans_of(turns: Sequence[Mapping[str, Any]], text: str) -> list[tuple[int, int, int]]:
    """Spans (begin, end, role) of the turns' contents in the text; empty if one is not there."""
    place, spans = 0, []
    for message in turns:
        content = str(message.get("content") or "")
        role = {"user": USER, "assistant": ASSISTANT}.get(str(message.get("role")), OTHER)
        begin = text.find(content, place)
        if begin < 0:
            return []
        place = begin + len(content)
        spans.append((begin, place, role))
    return spans
