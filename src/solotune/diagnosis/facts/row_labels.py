"""Where the labels of rows stand: answers without their end, and prompts among what is learned.

facts.once(open_answers)   facts.once(said_in_training)   said_in_labels(facts, facts.validation)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from solotune.diagnosis.facts.row_arrays import Side, squeezed
from solotune.diagnosis.facts.row_facts import RowFacts

TAIL = 24
"""Squeezed characters that are looked for: as long as a short sentence, so that they do not recur by chance."""


class OpenAnswers(NamedTuple):
    """Answers (their numbers, int64) that do not end with a stop, though nothing was cut off."""

    masked: np.ndarray
    """... that the end of turn follows"""
    follows: np.ndarray
    """... at this position in the ids"""
    missing: np.ndarray
    """... that none follows"""


def open_answers(facts: RowFacts) -> OpenAnswers:
    """Those of the training rows."""
    side = facts.train
    is_open = ~np.isin(side.ids[facts.last_of_answers(side)], list(facts.stop_ids))
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
    """Sampled rows whose prompt is learned, those of them whose answer is not, and how many could be judged.

    By text, so that it depends on no mask: the tail of a user, system or tool message that no answer repeats.
    """
    prompted, inverted, judged = [], [], 0
    for row in facts.sample(side):
        example = side.rows[row]
        answers = [m for m in example.messages if m["role"] == "assistant"]
        said = (m.get(key, "") for m in answers for key in ("reasoning_content", "content", "tool_calls"))
        told = squeezed(" ".join(map(str, said)))
        tails = [squeezed(m["content"])[-TAIL:] for m in example.messages if m["role"] != "assistant"]
        tails = [tail for tail in tails if len(tail) >= TAIL // 2 and tail not in told]
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
    """The same of the training rows; for `facts.once`."""
    return said_in_labels(facts, facts.train)
