"""Statistics of the labels in batches: which tokens have one, of which role, at turn ends, and equal to the token.

`LabelFacts.of(run_facts)` is the input of the rules of S4 to S7; it is computed once for each run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from solotune.diagnosis.facts.roles import ASSISTANT, OTHER, USER, Roles
from solotune.diagnosis.facts.texts import IGNORED, Batches, Document
from solotune.diagnosis.run_facts import RunFacts

SHIFTS = (1, -1, 2, -2, 3, -3, 4, -4)  # offsets of labels, in tokens, that are tested
NUM_READ = 256  # documents
_BLANKS = 3  # tokens of white space between an answer and its end
_MASK, _NEARLY_ALL = 0.05, 0.9  # share of the labels from which they are a mask; of them with one value
_STRETCH = 8  # tokens with labels in a row of a long turn: more than a mask that is off by a few


@dataclass
class LabelFacts:
    """Counts over the documents of some batches."""

    batches: Batches
    roles: Roles
    documents: list[Document]
    tokens: int = 0
    labels: int = 0
    unlearned: list[Document] = field(default_factory=list)  # documents without a label
    unlike: int = 0  # labels that differ from the token at their position
    unlike_values: Counter[int] = field(default_factory=Counter)
    shift: int | None = None  # label[t] == id[t + shift], if labels are shifted
    role_labels: Counter[int] = field(default_factory=Counter)  # role -> labels
    role_tokens: Counter[int] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)  # role -> turns
    turns_learned: Counter[int] = field(default_factory=Counter)  # role -> turns of which half or a stretch has labels
    ends_learned: int = 0  # answers whose end has a label
    ends_masked: Counter[int] = field(default_factory=Counter)  # id of an end after an answer, without a label
    ends_missing: int = 0  # answers without an end
    pads: int = 0  # positions of padding
    pads_learned: int = 0
    first_learned: int = 0  # first tokens after left padding that have a label
    longest: int = 0

    @classmethod
    @lru_cache(maxsize=1)
    def of(cls, run_facts: RunFacts) -> LabelFacts:
        """Statistics of a run's batches; cached for the last run."""
        batches = Batches.of(run_facts)
        facts = cls(batches, Roles(run_facts), batches.documents[:NUM_READ])
        shifts: Counter[int] = Counter()
        for document in facts.documents:
            facts._add(document, shifts)
        for lines in batches.sequences:
            for line in lines:
                pads_T = ~line.real_T
                facts.pads += int(pads_T.sum())
                facts.pads_learned += int((line.labels_T[pads_T] != IGNORED).sum())
        best = max(shifts, key=lambda k: shifts[k], default=None)
        if best is not None and shifts[best] >= 0.9 * facts.labels:
            facts.shift = best
        return facts

    @property
    def share(self) -> float:
        """Share of the documents' tokens that have a label."""
        return self.labels / max(self.tokens, 1)

    @property
    def answers(self) -> int:
        return self.ends_learned + sum(self.ends_masked.values()) + self.ends_missing

    @property
    def constant_label(self) -> tuple[int, int] | None:
        """(value, count) if nearly all labels that differ from their token have one value, in place of -100."""
        if self.unlike < _MASK * max(self.labels, 1) or self.shift is not None:
            return None
        (value, count), *_ = self.unlike_values.most_common(1)
        return (value, count) if count >= _NEARLY_ALL * self.unlike else None

    def _add(self, document: Document, shifts: Counter[int]) -> None:
        learned, ids, labels = document.learned, document.ids, document.labels
        self.tokens += len(ids)
        self.longest = max(self.longest, len(ids))
        self.labels += int(learned.sum())
        if not learned.any():
            self.unlearned.append(document)
            return
        unlike = learned & (labels != ids)
        self.unlike += int(unlike.sum())
        self.unlike_values.update(labels[unlike].tolist())
        if unlike.any():
            places = np.flatnonzero(learned)
            for shift in SHIFTS:
                inside = places[(places + shift >= 0) & (places + shift < len(ids))]
                shifts[shift] += int((labels[inside] == ids[inside + shift]).sum()) + len(places) - len(inside)
        self.first_learned += bool(document.start > 0 and learned[0] and self._is_padded_left(document))
        roles_T = self.roles.of(document)
        contents_T = None
        if roles_T is not None:
            contents_T = self._without_ends(roles_T, ids)
            self._add_roles(learned, contents_T)
        self._add_ends(document, roles_T, contents_T)

    def _without_ends(self, roles_T: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Roles of the contents alone: from the end of a turn on, its tokens are no one's (a mask may have them or not,
        and in a turn of two words they are the larger part)."""
        contents_T, is_end_T = roles_T.copy(), np.isin(ids, list(self.roles.ends))
        for begin, end in _runs(roles_T):
            if (ends := np.flatnonzero(is_end_T[begin:end])).size:
                contents_T[begin + ends[0] : end] = OTHER
        return contents_T

    def _add_roles(self, learned: np.ndarray, roles_T: np.ndarray) -> None:
        for role in (OTHER, USER, ASSISTANT):
            self.role_labels[role] += int((learned & (roles_T == role)).sum())
            self.role_tokens[role] += int((roles_T == role).sum())
        for begin, end in _runs(roles_T):
            role, count = int(roles_T[begin]), int(learned[begin:end].sum())
            self.turns[role] += 1
            self.turns_learned[role] += count >= min(_STRETCH, 0.5 * (end - begin)) and count > 0

    def _is_padded_left(self, document: Document) -> bool:
        line = self.batches.sequences[document.batch][document.sequence]
        return not line.real_T[document.start - 1]

    def _add_ends(self, document: Document, roles_T: np.ndarray | None, contents_T: np.ndarray | None) -> None:
        """Count the ends of labelled spans; a span up to the end of the longest document may have been truncated."""
        ids, ends = document.ids, self.roles.ends
        if not ends:
            return
        # shifted labels are judged by value
        values = document.labels
        for begin, end in document.spans():
            if contents_T is not None and not (contents_T[begin:end] == ASSISTANT).any():
                continue  # of the prompt, or behind an answer
            tail = [int(v) for v in values[max(begin, end - 1 - _BLANKS) : end]]
            if any(v in ends for v in tail):
                self.ends_learned += 1
                continue
            following = [int(i) for i in ids[end : self._last_of_turn(roles_T, end, len(ids))]]
            behind = next((i for i in following if i in ends), None)
            if behind is not None:
                self.ends_masked[behind] += 1
            elif end < len(ids) or len(ids) < self.longest:
                self.ends_missing += 1

    @staticmethod
    def _last_of_turn(roles_T: np.ndarray | None, at: int, length: int) -> int:
        """Where the turn of the answer before `at` ends; without known roles a few tokens later."""
        if roles_T is None or at >= length or roles_T[at] != ASSISTANT:
            return at + 1 + _BLANKS
        others = np.flatnonzero(roles_T[at:] != ASSISTANT)
        return at + int(others[0]) if others.size else length

    def decoded(self, count: int = 1) -> list[dict[str, Any]]:
        """The first documents as text pieces with and without labels, for the HTML page."""
        if self.roles.tokenizer is None:
            return []
        shown = []
        for document in self.documents[:count]:
            edges = np.flatnonzero(np.diff(document.learned.astype(np.int8))) + 1
            pieces = np.split(document.ids, edges)
            flags = [bool(part[0]) for part in np.split(document.learned, edges) if len(part)]
            texts = [self.roles.tokenizer.decode(piece.tolist()) for piece in pieces if len(piece)]
            shown.append({"pieces": [{"text": t, "learned": f} for t, f in zip(texts, flags, strict=True)]})
        return shown

    def measurements(self) -> dict[str, Any]:
        """The numbers in diagnosis.json."""
        return {
            "documents": len(self.documents),
            "tokens": self.tokens,
            "labels": self.labels,
            "share_learned": round(self.share, 4),
            "documents_without_labels": len(self.unlearned),
            "labels_unlike_their_token": self.unlike,
            "labels_by_role": {name: self.role_labels[role] for name, role in _NAMES.items() if self.role_tokens[role]},
            "tokens_by_role": {name: self.role_tokens[role] for name, role in _NAMES.items() if self.role_tokens[role]},
            "ends": {
                "learned": self.ends_learned,
                "masked": sum(self.ends_masked.values()),
                "missing": self.ends_missing,
            },
            "pads": self.pads,
            "pads_learned": self.pads_learned,
            "left_padded_sequences": self.batches.left_padded,
            "packed": self.batches.is_packed,
            "shown": self.decoded(),
        }


_NAMES = {"other": OTHER, "user": USER, "assistant": ASSISTANT}


def _runs(values_T: np.ndarray) -> list[tuple[int, int]]:
    """Stretches of equal values: (first, one past the last)."""
    edges = np.flatnonzero(np.diff(values_T)) + 1
    return list(zip([0, *edges.tolist()], [*edges.tolist(), len(values_T)], strict=True)) if len(values_T) else []
