"""S4, the loss mask, before there are batches: F17, F19, F20, F21 and F23, from the rows that solotune made.

Rows of other trainers are judged by their batches in `labels`, whose docstrings explain these faults.
"""

from __future__ import annotations

import numpy as np

from solotune.dataset.data_report import NOTHING_TO_LEARN
from solotune.diagnosis.facts.row_arrays import is_pattern, percent
from solotune.diagnosis.facts.row_facts import RowFacts
from solotune.diagnosis.facts.row_labels import open_answers, said_in_training
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import rule
from solotune.diagnosis.rules.labels import MOST, MUCH  # imported first, so that its docstrings are the first

FEW = 0.01
"""One row in a hundred, for faults that should never happen. 177 of dolly's 15,000 rows once were reported as a bug."""
SOME = 0.05
"""One row in twenty."""


@rule("F17", needs=("rows", "findings"))
def pad_masks_terminator(facts: RowFacts) -> Finding | None:
    """F17, from the rows: the end of turn follows the answers, is the padding token, and has no label anywhere."""
    return _masked(facts, by_pad=True)


@rule("F19", needs=("rows", "findings"))
def terminator_masked(facts: RowFacts) -> Finding | None:
    """F19, from the rows: the template's end of turn follows the answers (after spaces, if any) but is masked."""
    return _masked(facts, by_pad=False)


def _masked(facts: RowFacts, *, by_pad: bool) -> Finding | None:
    side = facts.train
    masked, follows, _ = facts.once(open_answers)
    rows = np.unique(side.row_of[masked])
    pad = facts.named_id("pad")
    is_pads = pad in facts.turn_end_ids and not np.any(side.loss_mask & (side.ids == pad))
    if is_pads is not by_pad or not is_pattern(len(rows), len(side.rows), FEW):
        return None
    evidence = {"answers_with": len(masked), "answers": len(side.begins), "rows": side.places(rows)}
    severity, share = "error" if len(rows) >= MUCH * len(side.rows) else "warning", len(rows) / len(side.rows)
    if by_pad:
        return Finding.of(
            "F17",
            severity,
            message=f"{facts.spelled(pad)} ends the answers and is always masked: it is also the padding token, "
            "and was masked by its id.",
            evidence={**evidence, "pad_id": pad},
            fix="mask padding by position, or set a separate pad_token in tokenizer_config.json",
            affected=share,
        )
    return Finding.of(
        "F19",
        severity,
        message=f"{percent(len(rows), len(side.rows))} of the rows have an answer whose end-of-turn token is "
        "masked: the model is not trained to stop.",
        evidence={**evidence, "followed_by": facts.spelled(side.ids[follows[0]])},
        fix="include the end-of-turn token after an answer in its mask",
        affected=share,
    )


@rule("F20", needs=("rows", "findings"))
def prompt_learned(facts: RowFacts) -> Finding | None:
    """F20, from the rows: the decoded labels contain text of user, system or tool messages, which no answer repeats."""
    prompted, inverted, judged = facts.once(said_in_training)
    if not facts.settings.assistant_only_loss or not is_pattern(len(prompted), judged, SOME):
        return None
    if len(inverted) >= MOST * len(prompted):
        return None
    return Finding.of(
        "F20",
        "error",
        message=f"Prompts are trained on too: their text is in the labels of {len(prompted)} of {judged} checked rows.",
        evidence={
            "rows_with": len(prompted),
            "rows_read": judged,
            "supervised_share": round(float(facts.train.loss_mask.mean()), 3),
            "rows": facts.train.places(prompted),
        },
        fix="assistant_only_loss: false to train on all tokens; or mask everything outside the answers",
        affected=len(prompted) / judged,
    )


@rule("F23", needs=("rows", "findings"))
def mask_inverted(facts: RowFacts) -> Finding | None:
    """F23, from the rows: as F20, and the text of the last answer is not in the labels."""
    prompted, inverted, judged = facts.once(said_in_training)
    if not is_pattern(len(inverted), judged, SOME) or len(inverted) < MOST * len(prompted):
        return None
    return Finding.of(
        "F23",
        "error",
        message=f"The mask is inverted: {len(inverted)} of {judged} rows train on the prompt and not on the answer.",
        evidence={"rows_with": len(inverted), "rows_read": judged, "rows": facts.train.places(inverted)},
        fix="invert the mask, or swap the roles user and assistant if the data has them swapped",
        affected=len(inverted) / judged,
    )


@rule("F21", needs=("rows", "findings"))
def nothing_learned(facts: RowFacts) -> Finding | None:
    """F21, from the rows: no token has a label although the row is not truncated; dropped rows count too."""
    side = facts.train
    rows = np.flatnonzero((side.num_labels == 0) & ~facts.is_cut(side))
    dropped = facts.dropped(NOTHING_TO_LEARN)
    total = len(side.rows) + dropped
    if not is_pattern(len(rows) + dropped, total, FEW):
        return None
    return Finding.of(
        "F21",
        "error" if len(rows) + dropped >= MUCH * total else "warning",
        message=f"{len(rows) + dropped:,} of {total:,} rows have no loss tokens although they fit into max_length.",
        evidence={"rows_without_labels": len(rows), "dropped": dropped, "rows": side.places(rows)},
        fix="move the space or newline from the end of the prompt to the start of the completion"
        if not facts.is_chat
        else "give these rows an answer, or remove them",
        affected=(len(rows) + dropped) / total,
    )
