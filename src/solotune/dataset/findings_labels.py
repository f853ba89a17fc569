"""Static rules on the labels (S4), lengths (S5) and padding (S6): what is learned, read off the tokens themselves.

Every rule's docstring says: *Sees*, *Why* it matters, *Not* (its look-alikes, and what tells them apart), *Fix*, and
*Wrong when*.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from solotune.dataset.findings_facts import Facts, Finding, Side, is_pattern, percent, squeezed
from solotune.dataset.report import ANSWER_PAST_MAX_LENGTH, LONGER_THAN_MAX_LENGTH, NOTHING_TO_LEARN

MOST = 0.5
"""From here a fault is of the whole data, not of some rows: severity error."""
FEW = 0.01
"""One row in a hundred: for what should never happen. 177 of dolly's 15,000 rows were reported as a bug elsewhere."""
SOME = 0.05
"""One row in twenty: a few long rows in a file are normal, and cost less than a twentieth of the labels."""
TAIL = 24
"""Squeezed characters that are looked for: as long as a short sentence, so that they do not recur by chance."""

_S4 = partial(Finding, suspect="S4")


class _Open(NamedTuple):
    """Answers (their numbers, int64) that do not end with a stop, though nothing was cut off."""

    masked: np.ndarray
    """... that the end of turn follows"""
    follows: np.ndarray
    """... at this position in the ids"""
    missing: np.ndarray
    """... that none follows"""


def _open_answers(facts: Facts) -> _Open:
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
    return _Open(answers[masked], follows[masked], answers[~masked])


def terminator_missing(facts: Facts) -> Finding | None:
    """F10: answers that nothing ends.

    Sees: the last token of each learned answer, and the tokens after it: neither is an end of turn.
    Why: a model that was never shown an end never stops, and writes the user's turns too.
    Not: an end that is there and not learned (F17, F19); rows that were cut at max_length (F24); control tokens
    spelled as text (F07).
    Fix: the end of turn in the template.
    Wrong when: the base already ends turns by beginning the next one (GLM's `<|user|>`) and the adapter leaves that
    alone; hence a warning where the template is the model's own.
    """
    side = facts.train
    missing = facts.once(_open_answers).missing
    rows = np.unique(side.row_of[missing])
    if not is_pattern(len(rows), len(side.rows), FEW):
        return None
    eos = facts.tokenizer.eos_token or "an end-of-text token (the tokenizer names none)"
    ends_by_header = facts.is_chat and not facts.config.chat_template_path and not facts.turn_end_ids - {facts.eos_id}
    path = facts.config.chat_template_path
    return Finding(
        "F10",
        "terminator-missing",
        "S3",
        severity="error" if len(rows) >= MOST * len(side.rows) and not ends_by_header else "warning",
        message=f"{percent(len(rows), len(side.rows))} of the rows have an answer that no end-of-turn token ends: the "
        "model is not taught to stop.",
        evidence={
            "answers_without": len(missing),
            "answers": len(side.begins),
            "rows_with": len(rows),
            "rows": side.places(rows),
            "answer_ends": _tail(facts, side, missing[:1]),
        },
        fix=f"write {eos} behind the assistant's content in {path or 'a template of your own (chat_template_path)'}"
        if facts.is_chat
        else f"end the texts with {eos}",
    )


def _tail(facts: Facts, side: Side, answers: np.ndarray) -> list[str]:
    return [facts.decode(side.ids[max(side.begins[a], side.ends[a] - 6) : side.ends[a]]) for a in answers]


def pad_masks_terminator(facts: Facts) -> Finding | None:
    """F17: the end of turn is masked everywhere because it is the padding token.

    Sees: answers that are followed by their end of turn, not learned, where that id is the tokenizer's pad and is
    nowhere supervised.
    Why: the loss looks normal (it moves by 0.1 either way) and the model never stops.
    Not: pad = eos alone: masking by position keeps the label, and then this is silent; an end that is not in the ids
    (F10); one that the mask leaves out though it is not the pad (F19).
    Fix: masking by position, or another pad token.
    Wrong when: a mask of one's own leaves out the end of turn for another reason: F19 has the same effect.
    """
    return _masked(facts, by_pad=True)


def terminator_masked(facts: Facts) -> Finding | None:
    """F19: the end of turn stands after the answer and is not learned.

    Sees: answers followed (blanks aside) by what the template ends turns with, outside the mask.
    Why: as F17: endless answers at a normal loss.
    Not: F17, where the id is the pad's and masked everywhere; rows cut at max_length; a next turn's header after an
    answer without an end (F10).
    Fix: the end of turn inside the mask.
    Wrong when: never for a chat model that is to stop.
    """
    return _masked(facts, by_pad=False)


def _masked(facts: Facts, *, by_pad: bool) -> Finding | None:
    side = facts.train
    masked, follows, _ = facts.once(_open_answers)
    rows = np.unique(side.row_of[masked])
    pad = facts.named_id("pad")
    is_pads = pad in facts.turn_end_ids and not np.any(side.supervised & (side.ids == pad))
    if is_pads is not by_pad or not is_pattern(len(rows), len(side.rows), FEW):
        return None
    evidence = {"answers_with": len(masked), "answers": len(side.begins), "rows": side.places(rows)}
    severity = "error" if len(rows) >= MOST * len(side.rows) else "warning"
    if by_pad:
        return _S4(
            "F17",
            "pad-masks-terminator",
            severity=severity,
            message=f"{facts.spelled(pad)} ends the answers and is never learned: it is the padding token too, and was "
            "masked by its id.",
            evidence={**evidence, "pad_id": pad},
            fix="mask padding by position, or give the tokenizer a pad_token of its own (in tokenizer_config.json)",
        )
    return _S4(
        "F19",
        "terminator-masked",
        severity=severity,
        message=f"{percent(len(rows), len(side.rows))} of the rows have an answer whose end-of-turn token is not "
        "learned: the model is not taught to stop.",
        evidence={**evidence, "followed_by": facts.spelled(side.ids[follows[0]])},
        fix="let the mask of an answer include the end-of-turn token that follows it",
    )


def said_in_labels(facts: Facts, side: Side) -> tuple[list[int], list[int], int]:
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
        learned = squeezed(facts.decode(example.input_ids[example.supervised]))
        if any(tail in learned for tail in tails):
            prompted.append(row)
            last = squeezed(answers[-1]["content"].rpartition("</think>")[2])[-TAIL:]
            if last and last not in learned:
                inverted.append(row)
    return prompted, inverted, judged


def said_in_training(facts: Facts) -> tuple[list[int], list[int], int]:
    """The same of the training rows; for `facts.once`."""
    return said_in_labels(facts, facts.train)


def prompt_learned(facts: Facts) -> Finding | None:
    """F20: prompts are learned although only answers should be.

    Sees: texts of user, system or tool messages in the decoded labels.
    Why: the loss looks better (prompts are easy), the answers are weaker, and the model writes like the user.
    Not: `assistant_only_loss: false`, where it was asked for; answers that repeat the question (a text that an answer
    contains is not looked for); prompt learned *instead* of the answer (F23).
    Fix: the mask.
    Wrong when: roles mean something else in this data (F36).
    """
    prompted, inverted, judged = facts.once(said_in_training)
    if not facts.config.assistant_only_loss or not is_pattern(len(prompted), judged, SOME):
        return None
    if len(inverted) >= MOST * len(prompted):
        return None
    return _S4(
        "F20",
        "prompt-learned",
        severity="error",
        message=f"Prompts are learned too: their text stands in the labels of {len(prompted)} of {judged} rows that "
        "were read back.",
        evidence={
            "rows_with": len(prompted),
            "rows_read": judged,
            "supervised_share": round(float(facts.train.supervised.mean()), 3),
            "rows": facts.train.places(prompted),
        },
        fix="mask everything outside the answers; or say `assistant_only_loss: false` if all is to be learned",
    )


def mask_inverted(facts: Facts) -> Finding | None:
    """F23: prompts are learned and answers are not.

    Sees: as F20, and the last answer's text missing from the labels.
    Why: a low loss, and a model that asks questions. The first loss does not show it (ratio 0.8).
    Not: F20 (both are learned); turns left out on purpose (the prompt is then not learned either).
    Fix: the mask the other way round; or the roles, where the data has them swapped (F36).
    Wrong when: the model is meant to play the user.
    """
    prompted, inverted, judged = facts.once(said_in_training)
    if not is_pattern(len(inverted), judged, SOME) or len(inverted) < MOST * len(prompted):
        return None
    return _S4(
        "F23",
        "mask-inverted",
        severity="error",
        message=f"The mask is the wrong way round: {len(inverted)} of {judged} rows learn the prompt and not the "
        "answer.",
        evidence={"rows_with": len(inverted), "rows_read": judged, "rows": facts.train.places(inverted)},
        fix="swap the mask, or the roles user and assistant if the data has them swapped",
    )


def nothing_learned(facts: Facts) -> Finding | None:
    """F21: rows in which nothing is learned, though they were not cut.

    Sees: rows without a label shorter than max_length, among the training rows and among those that were dropped.
    Why: the loss is 0 or NaN, or the data is silently smaller.
    Not: F25, where the answer lies beyond max_length; empty answers (F34).
    Fix: the place where answer and prompt meet.
    Wrong when: rows are masked on purpose.
    """
    side = facts.train
    rows = np.flatnonzero((side.num_labels == 0) & ~facts.is_cut(side))
    dropped = facts.dropped(NOTHING_TO_LEARN)
    total = len(side.rows) + dropped
    if not is_pattern(len(rows) + dropped, total, FEW):
        return None
    return _S4(
        "F21",
        "nothing-learned",
        severity="error" if len(rows) + dropped >= MOST * total else "warning",
        message=f"{len(rows) + dropped:,} of {total:,} rows have no token to learn although they fit into max_length.",
        evidence={"rows_without_labels": len(rows), "dropped": dropped, "rows": side.places(rows)},
        fix="start the completion with the blank or newline that now ends the prompt, so that a token begins there"
        if not facts.is_chat
        else "give these rows an answer, or remove them",
    )


def answers_cut(facts: Facts) -> Finding | None:
    """F24: answers are cut at max_length and lose their end, or whole rows are dropped for their length.

    Sees: rows that fill max_length and whose last token is learned and no stop; rows counted as dropped.
    Why: what is cut is not learned, nor is the end of turn; beyond a few rows the model learns to ramble.
    Not: F10, which is in all rows whatever their length; a few long rows (below 5 %); `overflow: split`, where the
    next part goes on.
    Fix: the max_length that 95 % of the long rows have room in.
    Wrong when: long answers are meant to be learned in part.
    """
    side, dropped = facts.train, facts.dropped(LONGER_THAN_MAX_LENGTH)
    is_split = facts.config.overflow == "split"
    rows = np.flatnonzero(facts.is_cut(side) & side.supervised[side.starts[1:] - 1] & (not is_split))
    total = len(side.rows) + dropped
    if not is_pattern(len(rows) + dropped, total, SOME):
        return None
    limit = facts.config.max_length
    tokens = np.asarray(facts.report.labels.row_tokens)
    long = tokens[tokens > limit]
    wanted = int(-(-np.quantile(long, 0.95) // 64) * 64) if len(long) else 2 * limit
    lost = len(rows) + dropped
    return Finding(
        "F24",
        "answers-cut",
        "S5",
        "error" if lost >= MOST * total else "warning",
        f"{lost:,} of {total:,} rows ({percent(lost, total)}) are "
        + (
            f"longer than max_length {limit} and dropped."
            if dropped > len(rows)
            else f"cut at max_length {limit}, in the middle of an answer."
        ),
        {"answers_cut": len(rows), "dropped": dropped, "max_length": limit, "rows": side.places(rows)},
        f"max_length: {wanted}"
        + (" (room for 95 % of the long rows)" if len(long) else "")
        + ("" if dropped > len(rows) else ", or overflow: drop to leave them out"),
    )


def prompt_fills_window(facts: Facts) -> Finding | None:
    """F25: the prompt alone fills max_length, so no label is left.

    Sees: rows dropped because their answer begins beyond max_length, and rows that fill it without a label.
    Why: elsewhere the loss is 0 or NaN; here the rows are gone.
    Not: F21, whose rows are short.
    Fix: a longer max_length, or shorter prompts.
    Wrong when: very long rows were to be left out.
    """
    side, dropped = facts.train, facts.dropped(ANSWER_PAST_MAX_LENGTH)
    rows = np.flatnonzero((side.num_labels == 0) & facts.is_cut(side))
    total = len(side.rows) + len(facts.validation.rows) + dropped
    if not is_pattern(len(rows) + dropped, total, FEW):
        return None
    length = facts.config.max_length
    return Finding(
        "F25",
        "prompt-fills-window",
        "S5",
        "error" if len(rows) + dropped >= MOST * total else "warning",
        f"{len(rows) + dropped:,} of {total:,} rows ({percent(len(rows) + dropped, total)}) teach nothing: their "
        f"answer begins beyond max_length {length}.",
        {"dropped": dropped, "rows_without_labels": len(rows), "max_length": length, "rows": side.places(rows)},
        f"max_length: {2 * length} or more, or shorten the prompts of these rows",
    )


def padding_learned(facts: Facts) -> Finding | None:
    """F29: padding is learned.

    Sees: learned pad tokens, where pad is a token of its own; and runs of three or more equal special tokens at the
    end of a row, where it is not (texts that were exported with their padding).
    Why: the loss falls with the share of padding, and the model emits pads.
    Not: pad = eos with one eos at the end; a pad id in the tokenizer that no row contains.
    Fix: the texts without padding.
    Wrong when: a special token repeats for a reason at the end of texts.
    """
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
    return Finding(
        "F29",
        "padding-learned",
        "S6",
        "error",
        f"{len(rows):,} of {len(side.rows):,} rows contain padding ({spelled}) that is learned as if it were text.",
        {"rows_with": len(rows), "padding_tokens": int(found.sum()), "rows": side.places(rows)},
        f"remove {spelled} from the texts; rows are padded for you, and padding is never learned",
    )


RULES = (
    terminator_missing,
    pad_masks_terminator,
    terminator_masked,
    prompt_learned,
    mask_inverted,
    nothing_learned,
    answers_cut,
    prompt_fills_window,
    padding_learned,
)
