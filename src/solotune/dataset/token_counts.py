"""Label budget: which tokens of the rows are trained on, counted on the final ids and loss mask.

The counts come from the ids and the mask that training gets, not from the settings, because these faults look right in
every setting: an end of turn that is in the text but not among the labels (the model never stops), a prompt whose ids
at inference differ from those before the answer in training, two BOS tokens, an answer cut in the middle.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from solotune.dataset.chat.encode import Encoded

_SHARE_BINS = 20


@dataclass(slots=True)
class LabelBudget:
    """Counts over the rows of both sides; a row that `overflow: split` splits counts as one row."""

    num_answers: int = 0
    num_answers_left_out: int = 0
    """Answers that are context only, not trained on: weight 0, or not the last turn."""
    num_terminated: int = 0
    """Rows in which every answer that is trained on ends with an end token that is a label."""
    num_unterminated: int = 0
    num_without_end_token: int = 0
    """Rows whose template (or, for plain text, tokenizer) has no end token at all."""
    num_not_prefix: int = 0
    """Rows with an answer whose prompt has other ids when it is tokenised alone (F16)."""
    num_crossing: int = 0
    """Tokens that start in a prompt and reach into an answer; they are not trained on."""
    num_tokens_cut: int = 0
    num_labels_cut: int = 0
    num_ends_cut: int = 0
    """Answers that are trained on up to `max_length` only: they lose their end."""
    num_answers_beyond: int = 0
    """Answers of kept rows that begin beyond `max_length`."""
    num_answers_dropped: int = 0
    """Answers of the rows that `overflow: drop` dropped."""
    leading_bos: Counter[int] = field(default_factory=Counter)
    """Number of leading BOS tokens -> rows; always 0 if the tokenizer has no BOS."""
    row_tokens: array[int] = field(default_factory=partial(array, "i"))
    """Length of each row as rendered, before `max_length`."""
    shares: array[float] = field(default_factory=partial(array, "d"))
    """Share of loss tokens in each kept row."""

    def add(
        self,
        encoded: Encoded,
        trained: Sequence[int],
        loss_mask: np.ndarray,
        num_kept: int,
        *,
        end_ids: frozenset[int],
        bos_id: int | None,
    ) -> None:
        """Add a kept row to the counts.

        Args:
            encoded: the whole row.
            trained: numbers of the answers that are trained on.
            loss_mask: bool (T,), the mask of the whole row.
            num_kept: tokens that are left after truncation.
            end_ids: ids that end an answer.
        """
        ends = [encoded.spans[number][1] for number in trained if encoded.spans[number][0] < num_kept]
        is_ended = [e <= num_kept and encoded.ids[e - 1] in end_ids and loss_mask[e - 1] for e in ends]
        self.num_answers += len(trained)
        self.num_answers_left_out += len(encoded.spans) - len(trained)
        self.num_terminated += all(is_ended)
        self.num_unterminated += not all(is_ended)
        self.num_without_end_token += not end_ids
        self.num_not_prefix += not all(encoded.is_prefix[number] for number in trained)
        self.num_crossing += encoded.num_crossing
        self.num_tokens_cut += len(encoded.ids) - num_kept
        self.num_labels_cut += int(np.count_nonzero(loss_mask[num_kept:]))
        self.num_ends_cut += sum(end > num_kept for end in ends)
        self.num_answers_beyond += len(trained) - len(ends)
        is_bos = encoded.ids[:num_kept] == bos_id if bos_id is not None else np.zeros(1, bool)
        self.leading_bos[int(np.argmin(is_bos)) if not is_bos.all() else len(is_bos)] += 1
        self.shares.append(float(loss_mask[:num_kept].mean()))

    def to_json(self) -> dict[str, Any]:
        """Return the part `labels` of `data.json`."""
        return {
            "answers": self.num_answers,
            "answers_left_out": self.num_answers_left_out,
            "rows_with_end_supervised": self.num_terminated,
            "rows_with_end_not_supervised": self.num_unterminated,
            "rows_without_end_token": self.num_without_end_token,
            "rows_where_prompt_is_not_a_prefix": self.num_not_prefix,
            "tokens_across_the_begin_of_an_answer": self.num_crossing,
            "tokens_cut": self.num_tokens_cut,
            "supervised_tokens_cut": self.num_labels_cut,
            "answers_without_their_end": self.num_ends_cut,
            "answers_beyond_max_length": self.num_answers_beyond,
            "answers_dropped": self.num_answers_dropped,
            "rows_by_leading_bos": {str(number): self.leading_bos[number] for number in sorted(self.leading_bos)},
        }

    def histograms(self) -> dict[str, Any]:
        """Return histograms for a page: `edges` (one more than `counts`); the last bin includes its upper edge."""
        share_edges = np.linspace(0, 1, _SHARE_BINS + 1)
        return {
            "row_tokens": _histogram(self.row_tokens, _length_edges(self.row_tokens)),
            "supervised_share": _histogram(self.shares, share_edges.round(2)),
        }


def _length_edges(lengths: Sequence[int]) -> np.ndarray:
    """Half powers of two, rounded: row lengths go from 10 to 100,000 tokens, and equal steps would show one bar."""
    if not lengths:
        return np.array([0, 1])
    first = math.floor(2 * math.log2(max(min(lengths), 1)))
    last = math.floor(2 * math.log2(max(max(lengths), 1))) + 1
    return np.unique(np.round(2 ** (np.arange(first, last + 1) / 2)).astype(int))


def _histogram(values: Sequence[float], edges: np.ndarray) -> dict[str, Any]:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}
