"""S6, padding, attention mask and positions: F27 to F30, read off the batches; P2 tells whether the model minds."""

from __future__ import annotations

import numpy as np

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.labels import LabelFacts
from solotune.diagnosis.facts.row_arrays import is_pattern
from solotune.diagnosis.facts.row_facts import RowFacts
from solotune.diagnosis.facts.texts import Batches
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

ABSOLUTE = frozenset(["gpt2", "gpt_neo", "gpt_bigcode", "openai-gpt", "biogpt", "xglm", "ctrl", "codegen_absolute"])
"""Families whose positions are a table and are counted from the left edge unless they are given."""

FEW = 0.01
"""One row in a hundred: for what should never happen."""


@rule("F27", needs=("batches", "model_config"), probes=("P2",))
def left_padding_moves_positions(run_facts: RunFacts) -> Signal | None:
    """F27: padding on the left, and a model that counts its positions from the edge.

    Sees: padding before the texts, no position_ids, and a model with a table of positions.
    Why: a text then begins at another position in each batch: spikes where lengths mix.
    Not: left padding with a mask on a model with rotary positions, which changes no logit (then P2 finds 0); F28, where
    the pads are attended.
    Fix: pad on the right, or pass `position_ids = attention_mask.cumsum(-1) - 1`.
    Wrong when: the model makes positions out of the mask itself (OPT does); P2 then speaks against it.
    Source: trl#550, #1842, #4497; logits move by 0.73 on a random GPT-2, by 0.0 with positions given.
    """
    batches = Batches.of(run_facts)
    kind = str(run_facts.model_config.get("model_type", ""))
    if kind not in ABSOLUTE or not batches.left_padded or _has_positions(batches):
        return None
    says = f"{batches.left_padded} sequences are padded on the left, and {kind} counts positions from the edge"
    return Signal(
        "F27", "measured", says, 0.7, {"left_padded": batches.left_padded},
        fix="padding_side: right, or position_ids = attention_mask.cumsum(-1) - 1",
    )  # fmt: skip


@rule("F28", needs=("batches",), probes=("P2",))
def pads_attended(run_facts: RunFacts) -> Signal | None:
    """F28: padding before the texts that no attention mask hides.

    Sees: runs of the pad at the left edge, and no attention_mask, or one of ones.
    Why: every token attends to a different number of pads in each batch: the loss depends on the neighbours.
    Not: padding on the right without a mask, which attention never reaches (it is causal); F27.
    Fix: `attention_mask` from the lengths, or padding on the right.
    Wrong when: the run is no padding but text.
    Source: logits move by 1.75 (left, no mask), by 0.0 (right, no mask).
    """
    batches = Batches.of(run_facts)
    seen = [
        line
        for lines in batches.sequences
        for line in lines
        if line.real_T.any() and line.left_pads and (line.attended_T is None or line.attended_T[0])
    ]
    if not seen or any(batch.get("attention_mask") is not None and batch["attention_mask"].dim() > 2
                       for batch in batches.raw):  # fmt: skip
        return None
    says = f"{len(seen)} sequences begin with up to {max(line.left_pads for line in seen)} pads that attention sees"
    return Signal(
        "F28", "invariant", says, 0.9, {"sequences": len(seen)}, fix="pass attention_mask, 0 where a place is padding"
    )


@rule("F29", needs=("batches",))
def pads_learned(run_facts: RunFacts) -> Signal | None:
    """F29: labels on padding.

    Sees: labels at places that attention_mask hides, or in the run of pads at an edge.
    Why: the loss is low and falls with the share of padding; the model learns to write pads.
    Not: F20, whose labels are within the text.
    Fix: `labels[attention_mask == 0] = -100`.
    Wrong when: never.
    Source: no thread found; the loss changes with the size of the batch.
    """
    facts = LabelFacts.of(run_facts)
    if facts.pads_learned <= 0.05 * max(facts.pads, 1):
        return None
    share = facts.pads_learned / facts.pads
    says = f"{facts.pads_learned:,} of {facts.pads:,} places of padding have a label ({share:.0%})"
    numbers = {"pads": facts.pads, "pads_learned": facts.pads_learned}
    return Signal("F29", "invariant", says, 0.95, numbers, fix="labels[attention_mask == 0] = -100")


@rule("F29", needs=("rows", "findings"))
def padding_learned(facts: RowFacts) -> Finding | None:
    """F29, of rows: learned pad tokens where the pad is a token of its own, and runs of three or more equal special
    tokens at the end of a row where it is not (texts that were exported with their padding)."""
    side, pad = facts.train, facts.named_id("pad")
    if not len(side.ids):
        return None
    others = facts.turn_end_ids | {facts.named_id("bos"), facts.named_id("unk")}
    found = np.zeros(len(side.ids), bool)
    if pad is not None and pad not in others:
        found = side.supervised & (side.ids == pad)
    last = side.starts[1:][side.lengths >= 3] - 1
    run = np.isin(side.ids[last], list(facts.special_ids)) & side.supervised[last]
    run &= (side.ids[last] == side.ids[last - 1]) & (side.ids[last] == side.ids[last - 2])
    found[last[run]] = True
    rows = np.unique(np.searchsorted(side.starts, np.flatnonzero(found), side="right") - 1)
    if not is_pattern(len(rows), len(side.rows), FEW):
        return None
    spelled = facts.spelled(side.ids[np.flatnonzero(found)[0]])
    return Finding.of(
        "F29",
        "error",
        message=f"{len(rows):,} of {len(side.rows):,} rows contain padding ({spelled}) that is learned as if it were "
        "text.",
        evidence={"rows_with": len(rows), "padding_tokens": int(found.sum()), "rows": side.places(rows)},
        fix=f"remove {spelled} from the texts; rows are padded for you, and padding is never learned",
    )


@rule("F30", needs=("batches",))
def first_token_learned_from_padding(run_facts: RunFacts) -> Signal | None:
    """F30: with padding on the left, the first token of a text is learned from the pad before it.

    Sees: a label on the first token behind padding.
    Why: the model learns to begin texts after a pad: a small offset of the loss (3.46 to 3.53), larger for short rows.
    Not: labels on answers alone, which left padding leaves as they are (then this is silent).
    Fix: pad on the right, or mask the first token.
    Wrong when: it matters little; it is a minor fault beside any other.
    Source: 261 against 268 labels for the same 8 rows.
    """
    facts = LabelFacts.of(run_facts)
    if not facts.first_learned or facts.pads_learned:
        return None
    says = f"{facts.first_learned} texts begin with a token that is learned from the padding before it"
    return Signal("F30", "measured", says, 0.6, {"rows": facts.first_learned}, fix="padding_side: right")


def _has_positions(batches: Batches) -> bool:
    return all(batch.get("position_ids") is not None for batch in batches.raw)
