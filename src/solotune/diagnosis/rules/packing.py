"""S7, packing: F31 to F33, from the batches; P3 tests on the model whether packed rows attend to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from solotune.dataset import Example
from solotune.dataset.example import ids_of, lengths_of
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import is_ours, mapping
from solotune.diagnosis.facts.labels import NUM_READ, LabelFacts
from solotune.diagnosis.facts.texts import Batches, Document, Line
from solotune.diagnosis.rules import rule, signals_of_rows
from solotune.diagnosis.run_facts import RunFacts

SOME = 0.1  # of the rows
MOST = 0.5  # of the texts: if so many are found among the rows, they are judged by their rows
NUM_KNOWN = 2000  # rows that texts are compared with
_WHOLE = "use packing that keeps rows whole, or a max_length above the longest row"


@rule("F31", needs=("batches",), probes=("P3",))
def documents_not_kept_apart(run_facts: RunFacts) -> Signal | None:
    """F31: packed rows attend to each other.

    Sees: several rows in one sequence without restarting positions or a block mask; or restarting positions together
    with an attention_mask of ones, with which transformers builds no blocks.
    Why: a row attends to the rows before it: the result is slightly worse. This makes no plateau.
    Not: restarting positions without a mask, which separate the rows (with use_cache=False, P3 finds a difference of
    0); F32.
    Fix: restart `position_ids` at each row, pass no attention_mask, and set `use_cache=False`; or use a variable-length
    attention kernel.
    Wrong when: the model is a custom one that reads the collator's marks.
    Source: trl#805, #3067, #3910 (0.03 to 0.15 of the final loss); logits differ by 0.0 if separated, by 14 to 15 if
    not (measured).
    """
    batches = Batches.of(run_facts)
    packed = [(raw, line) for raw, lines in zip(batches.raw, batches.sequences, strict=True) for line in lines
              if len(line.starts) > 1]  # fmt: skip
    if not packed:
        return None
    unmarked = sum(line.claimed is None for _, line in packed)
    undone = sum(line.claimed is not None and _has_plain_mask(raw, line) for raw, line in packed)
    if not unmarked and not undone:
        return None
    why = "no restarting positions" if unmarked else "an attention_mask of ones in addition to restarting positions"
    says = f"{unmarked + undone} of {len(packed)} packed sequences have {why}"
    numbers, share = {"sequences": unmarked + undone, "packed": len(packed)}, (unmarked + undone) / len(packed)
    fix = "restart position_ids at each row, pass no attention_mask, and set use_cache=False"
    return Signal("F31", "measured", says, 0.75, numbers, fix=fix, affected=share)


@rule("F32", needs=("batches",), probes=("P3",))
def positions_not_restarted(run_facts: RunFacts) -> Signal | None:
    """F32: packed rows are separated by a mask, but their positions do not restart.

    Sees: a block mask, or numbered rows, with positions that do not restart (or no positions).
    Why: a row late in a pack gets positions that it never has alone. With a table of positions the model behaves like a
    different one; with rotary positions the effect is small.
    Not: F31, where rows attend to each other.
    Fix: restart `position_ids` at 0 for each row.
    Wrong when: the model computes positions from the mask.
    Source: torchtune#875.
    """
    batches = Batches.of(run_facts)
    seen = packed = 0
    for raw, lines in zip(batches.raw, batches.sequences, strict=True):
        for line in lines:
            if line.claimed is None or len(line.starts) < 2 or not _claims_by_mask(raw):
                continue
            packed += 1
            positions = line.positions_T
            seen += positions is None or any(positions[i] != 0 for i in line.starts[1:])
    if not seen:
        return None
    says = f"{seen} of {packed} packed sequences have rows separated by a mask, but positions that do not restart"
    fix = "restart position_ids at each row"
    return Signal("F32", "invariant", says, 0.85, {"sequences": seen}, fix=fix, affected=seen / packed)


@rule("F33", needs=("batches",))
def packing_cuts_rows(run_facts: RunFacts) -> Signal | None:
    """F33: packing splits rows over sequences, or drops what does not fit.

    Sees: packed sequences whose texts are only parts of the known rows; where the rows are not known, sequences that
    end before the row is finished: an answer without an end at the edge of a full sequence.
    Why: answers are trained on without their beginning or their end.
    Not: F24, where rows are truncated without packing, or before it; F10, where ends are missing inside the sequences
    too (Control: the ends of the other texts in the same sequences). solotune's own packing is not guessed from the
    ends: each text is compared with its row.
    Fix: packing that keeps rows whole (best fit), and a `max_length` above the longest row.
    Wrong when: long plain texts are wrapped on purpose, as in pretraining.
    Source: TRL's config: `bfd` truncates, `wrapped` splits.
    """
    batches = Batches.of(run_facts)
    splits = mapping(run_facts.settings.get("sft")).get("packing_strategy") == "bfd_split"
    if splits or not (batches.is_packed or run_facts.settings.get("packing")):
        return None
    documents = batches.documents[:NUM_READ]
    parts, judged = parts_of_rows(documents, run_facts.train)
    if judged < MOST * len(documents) and not is_ours(run_facts):
        return _open_edges(run_facts, batches)
    if not parts:
        return None
    says, share = f"{parts} of {judged} packed texts are only a part of their row", parts / judged
    kind, weight = ("invariant", 0.9) if share >= SOME or is_ours(run_facts) else ("remark", 0.3)
    return Signal("F33", kind, says, weight, {"parts": parts, "of": judged}, fix=_WHOLE, affected=share)


def parts_of_rows(documents: Sequence[Document], rows: Sequence[Example]) -> tuple[int, int]:
    """Texts that are the beginning or the end of a row and no row themselves; and the texts that are found at all."""
    known = [ids.astype(np.int64).tobytes() for ids in ids_of(rows[:NUM_KNOWN])]
    whole, lengths, parts, judged = set(known), np.asarray(lengths_of(rows)), 0, 0
    for document in documents:
        ids = document.ids.astype(np.int64).tobytes()
        if ids in whole:
            judged += 1
            continue
        if not any(len(row) > len(ids) and (row.startswith(ids) or row.endswith(ids)) for row in known):
            continue
        judged += 1
        alike = np.flatnonzero(lengths == len(document.ids))  # a row beyond the known ones may begin like one of them
        parts += not any(np.array_equal(rows[int(row)].input_ids, document.ids) for row in alike)
    return parts, judged


def _open_edges(run_facts: RunFacts, batches: Batches) -> Signal | None:
    """F33 of rows that are not known: texts at the end of full sequences have no end, and those inside have one."""
    facts = LabelFacts.of(run_facts)
    ends = facts.roles.ends
    if not ends:
        return None
    lasts, inner = [], []
    for document in facts.documents:
        line = batches.sequences[document.batch][document.sequence]
        ended = bool(np.isin(document.ids[-4:], list(ends)).any())
        (lasts if document.start == line.starts[-1] else inner).append(ended)
    full = [lines for lines in batches.sequences for lines in lines if lines.real_T.all()]
    open_ = lasts.count(False)
    if not full or inner.count(False) > SOME * len(inner) or open_ < SOME * len(facts.documents):
        return None
    says = f"{open_} of {len(lasts)} packed sequences end before the row is finished"
    numbers = {"open": open_, "sequences": len(lasts)}
    return Signal("F33", "measured", says, 0.8, numbers, fix=_WHOLE, affected=open_ / len(facts.documents))


@rule("F33", needs=("settings",))
def cut_before_packing(run_facts: RunFacts) -> list[Signal]:
    """F33, of TRL's best-fit packing: it truncates rows longer than a pack, whose length is `max_length`."""
    sft = mapping(run_facts.settings.get("sft"))
    if not sft.get("packing") or sft.get("packing_strategy") != "bfd":
        return []
    fix = "packing_strategy: bfd_split (TRL), or a max_length above the longest row"
    return [replace(signal, code="F33", fix=fix) for signal in signals_of_rows(run_facts, "F24")]


def _claims_by_mask(raw) -> bool:
    mask = raw.get("attention_mask")
    numbered = mask is not None and (mask.dim() == 4 or int(mask.max()) > 1)
    return numbered or any(key in raw for key in ("seq_idx", "cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens"))


def _has_plain_mask(raw, line: Line) -> bool:
    """Whether all rows of a sequence share a mask of zeros and ones, and only positions separate them."""
    mask = raw.get("attention_mask")
    return mask is not None and mask.dim() == 2 and int(mask.max()) <= 1 and not _claims_by_mask(raw)
