"""Find rows whose labels miss the end of an answer, or include the prompt.

facts.once(open_answers)   facts.once(said_in_training)   said_in_labels(facts, facts.validation)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from solotune.diagnosis.facts.row_arrays import Side, squeezed
from solotune.diagnosis.facts.row_facts import RowFacts

TAIL = 24
"""Squeezed characters that are searched: as long as a short sentence, so that they do not match by chance."""


class OpenAnswers(NamedTuple):
    """Answers (indices, int64) that do not end with a stop id, though they were not truncated."""

    masked: np.ndarray
    """followed by an end of turn"""
    follows: np.ndarray
    """position of that end in the ids"""
    missing: np.ndarray
    """followed by none"""


def open_answers(facts: RowFacts) -> OpenAnswers:
    """The open answers of the training rows."""
    side = facts.train
    last = side.ids[facts.last_of_answers(side)]
    is_open = ~np.isin(last, list(facts.stop_ids)) & ~facts.is_blank(last)  # not the line break behind a masked end
    was_cut = facts.is_cut(side)[side.row_of] & (side.ends == side.starts[side.row_of + 1])
    answers = np.flatnonzero(is_open & ~was_cut)
    row_end, follows = side.starts[side.row_of[answers] + 1], side.ends[answers].copy()
    for _ in range(4):
        inside = np.flatnonzero(follows < row_end)
        follows[inside] += facts.is_blank(side.ids[follows[inside]])
    inside = np.minimum(follows, len(side.ids) - 1)
    masked = (follows < row_end) & np.isin(side.ids[inside], list(facts.turn_end_ids))
    return OpenAnswers(answers[masked], follows[masked], answers[~masked])


def said_in_labels(facts: RowFacts, side: Side) -> tuple[list[int], list[int], int]:
    """Sampled rows with labels on the prompt, those of them without labels on the answer, and the number judged.

    Compares text, so that it does not depend on a mask: the tail of a message of another role that no answer repeats.
    """
    prompted, inverted, judged = [], [], 0
    for row in facts.sample(side):
        example = side.rows[row]
        answers = [m for m in example.messages if m["role"] == "assistant"]
        if not answers:  # roles of other names: F36
            continue
        said = (m.get(key, "") for m in answers for key in ("reasoning_content", "content", "tool_calls"))
        answered = squeezed(" ".join(map(str, said)))
        tails = [squeezed(m["content"])[-TAIL:] for m in example.messages if m["role"] != "assistant"]
        tails = [tail for tail in tails if len(tail) >= TAIL // 2 and tail not in answered]
        if not tails:
            continue
        judged += 1
        learned = squeezed(facts.decode(example.input_ids[example.loss_mask]))
        if any(tail in learned for tail in tails):
            prompted.append(row)
            last = squeezed(answers[-1]["content"].rpartition("</think>")[2])[-TAIL:]
            if last and last not in learned:
                inverted.append(row)
    return prompted, inverted, judged


def said_in_training(facts: RowFacts) -> tuple[list[int], list[int], int]:
    """`said_in_labels` of the training rows; for `facts.once`."""
    return said_in_labels(facts, facts.train)
