"""S6, padding, attention mask and positions: F27 to F30, from the batches; P2 tests the effect on the model."""

from __future__ import annotations

import numpy as np

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import is_ours
from solotune.diagnosis.facts.labels import LabelFacts
from solotune.diagnosis.facts.row_arrays import is_pattern
from solotune.diagnosis.facts.row_facts import RowFacts
from solotune.diagnosis.facts.texts import Batches
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

ABSOLUTE = frozenset(["gpt2", "gpt_neo", "gpt_bigcode", "openai-gpt", "biogpt", "xglm", "ctrl"])
"""Model families with a table of positions, counted from the left edge unless position_ids are passed."""

FEW = 0.01
"""One row in a hundred: worth a remark."""
RUN = 3
"""Padding tokens in a row, and different numbers of them, from which they are padding inside a text."""
SOME = 0.1
"""One row in ten, from which padding in the texts is a fault."""


@rule("F27", needs=("batches", "model_config"), probes=("P2",), unless=is_ours)
def left_padding_moves_positions(run_facts: RunFacts) -> Signal | None:
    """F27: left padding, and a model that counts its positions from the left edge.

    Sees: padding before the texts, no position_ids or such that count the padding, and a model with a table of
    positions.
    Why: a text then starts at a different position in each batch: the loss spikes where lengths mix.
    Not: left padding with a mask on a model with rotary positions, which changes no logit (then P2 finds 0); F28, where
    attention sees the padding.
    Fix: pad on the right, or pass `position_ids = attention_mask.cumsum(-1) - 1`.
    Wrong when: the model computes positions from the mask (as OPT does). Then P2 finds no difference, which counts
    against this fault.
    Source: trl#550, #1842, #4497; logits of a random GPT-2 move by 0.73, and by 0.0 if positions are given (measured).
    """
    batches = Batches.of(run_facts)
    kind = str(run_facts.model_config.get("model_type", ""))
    if kind not in ABSOLUTE:
        return None
    padded = [line for lines in batches.sequences for line in lines if line.left_pads and line.real_T.any()]
    moved = [line for line in padded if line.positions_T is None or line.positions_T[line.left_pads] > 0]
    if not moved:
        return None
    says = f"{len(moved)} sequences are padded on the left, and {kind} counts positions from the left edge"
    fix = "pad on the right (padding_side of the tokenizer), or position_ids = attention_mask.cumsum(-1) - 1"
    num_lines = sum(map(len, batches.sequences))
    return Signal("F27", "measured", says, 0.7, {"left_padded": len(moved)}, fix=fix, affected=len(moved) / num_lines)


@rule("F28", needs=("batches",), probes=("P2",), unless=is_ours)
def pads_attended(run_facts: RunFacts) -> Signal | None:
    """F28: attention sees the padding before the texts.

    Sees: padding at the left edge, or between prompts and answers, and no attention_mask, or one that is 1 there; an
    attention_mask that is 0 on text. Padding is the pad_token, else a special token in runs of different lengths.
    Why: every token attends to a different number of padding tokens in each batch, so the loss depends on the other
    rows.
    Not: padding on the right without a mask, which causal attention never reaches; F27; one token at the beginning of
    every row, which is a beginning of text.
    Fix: make `attention_mask` from the lengths, or pad on the right.
    Wrong when: the repeated tokens are text, not padding.
    Source: logits move by 1.75 with left padding without a mask, by 0.0 with right padding without a mask (measured).
    """
    batches = Batches.of(run_facts)
    if any(mask is not None and mask.dim() > 2 for mask in (batch.get("attention_mask") for batch in batches.raw)):
        return None
    lines = [line for sequences in batches.sequences for line in sequences]
    fix = "pass an attention_mask that is 0 at padding and 1 at text"
    if hidden := texts_hidden(batches):
        says = f"the attention_mask of {hidden} of {len(lines)} sequences is 0 on text"
        return Signal("F28", "invariant", says, 0.9, {"hidden": hidden}, fix=fix, affected=hidden / len(lines))
    seen = [
        line
        for line in lines
        if line.real_T.any() and line.left_pads and (line.attended_T is None or line.attended_T[0])
    ]
    if not seen or (len(seen) == len(lines) and max(line.left_pads for line in seen) == 1):
        return _pads_inside(batches, fix)
    most = max(line.left_pads for line in seen)
    says = f"{len(seen)} of {len(lines)} sequences begin with up to {most} padding tokens that attention sees"
    numbers = {"sequences": len(seen)}
    return Signal("F28", "invariant", says, 0.9, numbers, fix=fix, affected=len(seen) / len(lines))


def _pads_inside(batches: Batches, fix: str) -> Signal | None:
    """F28 of prompts that were padded before their answers were appended: padding between the two."""
    lines = [line for sequences in batches.sequences for line in sequences if line.real_T.any()]
    sizes = [] if batches.is_packed else [_longest_run(line.ids_T[line.real_T] == batches.pad_id) for line in lines]
    seen = [size for size in sizes if size >= RUN]
    if len(seen) < SOME * len(lines) or len(set(seen)) < RUN:
        return None
    says = f"{len(seen)} of {len(lines)} sequences have up to {max(seen)} padding tokens inside, which attention sees"
    return Signal("F28", "invariant", says, 0.9, {"sequences": len(seen)}, fix=fix, affected=len(seen) / len(lines))


def _longest_run(is_pad_T: np.ndarray) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], is_pad_T, [False])).astype(np.int8)))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def texts_hidden(batches: Batches) -> int:
    """Sequences whose attention_mask is 0 on several different tokens: text, since padding is one token repeated."""
    lines = [line for sequences in batches.sequences for line in sequences if line.attended_T is not None]
    hidden = [line.ids_T[~line.attended_T] for line in lines if line.attended_T is not None]
    return sum(len(np.unique(ids[ids != batches.pad_id])) > 2 for ids in hidden)


@rule("F29", needs=("batches",), unless=is_ours)
def pads_learned(run_facts: RunFacts) -> Signal | None:
    """F29: labels on padding.

    Sees: labels at positions where attention_mask is 0, or in the padding at the edge of a row.
    Why: the loss is low and depends on the share of padding; the model learns to write padding.
    Not: F20, whose labels are inside the text, or are one number in place of -100; F28, where the attention_mask is 0
    on text.
    Fix: `labels[attention_mask == 0] = -100`.
    Wrong when: never.
    Source: no public report found; the loss changes with the batch size (measured).
    """
    facts = LabelFacts.of(run_facts)
    if facts.pads_learned <= 0.05 * max(facts.pads, 1) or texts_hidden(facts.batches) or facts.constant_label:
        return None
    share = facts.pads_learned / facts.pads
    says = f"{facts.pads_learned:,} of {facts.pads:,} padding tokens have a label ({share:.0%})"
    numbers = {"pads": facts.pads, "pads_learned": facts.pads_learned}
    fix = "labels[attention_mask == 0] = -100"
    return Signal("F29", "invariant", says, 0.95, numbers, fix=fix, affected=share)


@rule("F29", needs=("rows", "findings"))
def padding_learned(facts: RowFacts) -> Finding | None:
    """F29, from the rows: padding tokens with a label; without a separate pad_token, three or more equal special tokens
    at the end of a row (texts that were exported with their padding)."""
    side, pad = facts.train, facts.named_id("pad")
    if not len(side.ids):
        return None
    others = facts.turn_end_ids | {facts.named_id("bos"), facts.named_id("unk")}
    found = np.zeros(len(side.ids), bool)
    if pad is not None and pad not in others:
        found = side.loss_mask & (side.ids == pad)
    last = side.starts[1:][side.lengths >= 3] - 1
    run = np.isin(side.ids[last], list(facts.special_ids)) & side.loss_mask[last]
    run &= (side.ids[last] == side.ids[last - 1]) & (side.ids[last] == side.ids[last - 2])
    found[last[run]] = True
    rows = np.unique(np.searchsorted(side.starts, np.flatnonzero(found), side="right") - 1)
    if not is_pattern(len(rows), len(side.rows), FEW):
        return None
    spelled = facts.spelled(side.ids[np.flatnonzero(found)[0]])
    return Finding.of(
        "F29",
        "error" if len(rows) >= SOME * len(side.rows) else "warning",
        message=f"{len(rows):,} of {len(side.rows):,} rows contain padding ({spelled}) that is trained on as if it "
        "were text.",
        evidence={"rows_with": len(rows), "padding_tokens": int(found.sum()), "rows": side.places(rows)},
        fix=f"remove {spelled} from the texts; rows are padded later, and that padding is masked",
        affected=len(rows) / len(side.rows),
    )


@rule("F30", needs=("batches",), unless=is_ours)
def first_token_learned_from_padding(run_facts: RunFacts) -> Signal | None:
    """F30: with left padding, the model is trained to predict the first token of a text from the padding before it.

    Sees: a label on the first token after padding.
    Why: the model learns to start texts after padding: the loss is a little higher (3.53 instead of 3.46), more so for
    short rows.
    Not: labels on answers only, which left padding does not change (then there is no warning).
    Fix: pad on the right, or mask the first token.
    Wrong when: never, but the effect is small compared to most other faults.
    Source: 268 labels instead of 261 for the same 8 rows (measured).
    """
    facts = LabelFacts.of(run_facts)
    if not facts.first_learned or facts.pads_learned:
        return None
    says = f"{facts.first_learned} texts have a label on their first token, which follows padding"
    numbers, share = {"rows": facts.first_learned}, facts.first_learned / len(facts.documents)
    fix = "pad on the right (padding_side of the tokenizer)"
    return Signal("F30", "measured", says, 0.6, numbers, fix=fix, affected=share)
