"""S5, sequence length and truncation: F24 to F26."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from solotune.dataset.data_report import ANSWER_PAST_MAX_LENGTH, LONGER_THAN_MAX_LENGTH, PLAIN
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import is_ours, mapping, setting
from solotune.diagnosis.facts.rendered_chats import rendered
from solotune.diagnosis.facts.roles import ASSISTANT, USER, Roles
from solotune.diagnosis.facts.row_arrays import is_pattern, percent
from solotune.diagnosis.facts.row_facts import RowFacts
from solotune.diagnosis.facts.rows import examples_of
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

SOME = 0.05
"""One in twenty: a few long rows are normal, and lose less than a twentieth of the labels."""
FEW = 0.01
"""One in a hundred: so many rows without a label are worth a remark."""
MUCH = 1 / 3
"""Share of the answers without their end, or of the rows without a label, from which it is a fault. A truncated answer
is an answer whose end the model does not see, not a wrong one: what matters is how many ends are left. Chats and
instructions with an ordinary max_length lose fewer (ShareGPT at 1,024 tokens 17 %, at 256 tokens 52 %)."""
MOST = 0.5
"""Share of the rows without which the run is a different one, although dropping them was asked for."""
BEGINNINGS = 0.25
"""Share of the rows without their beginning, from which it is a fault: each of them is wrong, not only incomplete."""
SAME = 0.95
"""Share of complete rows with the same first token, from which this token belongs to the format."""
_NUM_DECODED = 50
_NEAR_END = 4
"""Last tokens of a row in which its end of turn stands, with a line break or an end of text after it."""


def is_packed_by_trl(run_facts: RunFacts) -> bool:
    """Whether TRL's packing truncates the rows: F33."""
    return bool(mapping(run_facts.settings.get("sft")).get("packing"))


class Truncated(NamedTuple):
    """Answers that `max_length` concerns, of all answers that are trained on or were dropped for their length."""

    cut: int
    """They lose their end."""
    dropped: int
    """Answers of the rows that `overflow: drop` dropped."""
    total: int
    """Without those that begin beyond max_length in a row that is kept."""


def truncated_answers(facts: RowFacts) -> Truncated:
    """Counted when the rows were truncated, if they are solotune's; else counted from the rows that are left."""
    labels, lost = facts.report.labels, facts.dropped(ANSWER_PAST_MAX_LENGTH)
    if labels.num_answers:
        lost = facts.report.dropped[ANSWER_PAST_MAX_LENGTH]
        total = labels.num_answers - labels.num_answers_beyond + labels.num_answers_dropped + lost
        return Truncated(labels.num_ends_cut, labels.num_answers_dropped, total)
    side, dropped = facts.train, facts.dropped(LONGER_THAN_MAX_LENGTH)
    cut = len(cut_rows(facts)) if facts.settings.overflow != "split" else 0
    ended = int(np.count_nonzero(np.isin(side.ids, list(facts.turn_end_ids)) & side.loss_mask))
    return Truncated(cut, dropped, max(ended, len(side.begins) - cut) + cut + dropped + lost)


def cut_rows(facts: RowFacts) -> np.ndarray:
    """The training rows that are truncated inside an answer."""
    side = facts.train
    return np.flatnonzero(facts.is_cut(side) & side.loss_mask[side.starts[1:] - 1])


def are_documents(facts: RowFacts) -> bool:
    """Whether the rows are plain texts that are trained on as a whole: where such a text is cut, no answer is."""
    side = facts.train
    second = side.starts[:-1][side.lengths > 1] + 1
    if facts.is_chat or not len(second) or side.loss_mask[second].mean() < SAME:
        return False
    formats = facts.report.text_formats
    if formats.total():
        return 2 * formats[PLAIN] > formats.total()
    inside = np.ones(len(side.ids), bool)  # without knowledge of how they were made: no end of a turn within a text
    inside[side.starts[:-1]] = inside[side.starts[1:] - 1] = False
    return bool(np.count_nonzero(np.isin(side.ids[inside], list(facts.turn_end_ids))) < SOME * len(side.rows))


@rule("F24", needs=("rows",), probes=("P12",), unless=is_packed_by_trl)
def answers_cut(facts: RowFacts) -> Finding | None:
    """F24: long answers are truncated at `max_length`.

    Sees: the share of the answers that lose their end: rows that fill `max_length` and whose last loss token is not an
    end of turn; rows that are dropped because they are too long.
    Why: the truncated text and the end of turn are not trained on. If this happens in a large part of the answers, the
    model learns to ramble or to stop in the middle.
    Not: F10, which is in all rows of any length (if every row is truncated, the evidence is the same and both are
    reported); `overflow: split`, where the next part continues; F33, where TRL's packing truncates. Below a third of
    the answers it is a remark. So are plain documents, which have no end to learn, and rows that `overflow: drop`
    leaves out, below half of them. Answers that begin beyond max_length do not count: a chat of six answers that is
    truncated in the fifth loses one end of five. Control: chats and instructions with an ordinary max_length (ShareGPT
    at 1,024 tokens loses 17 %).
    Fix: a `max_length` that is enough for 95 % of the long rows, `overflow: split` or `overflow: drop`.
    Wrong when: long answers should be trained on in part.
    Source: the extreme form is F25.
    """
    cut, dropped, total = truncated_answers(facts)
    if not is_pattern(cut + dropped, total, SOME):
        return None
    is_fault = (cut >= MUCH * total and not are_documents(facts)) or dropped >= MOST * total
    limit, lost, side = facts.settings.max_length, cut + dropped, facts.train
    what = "texts" if are_documents(facts) else "answers"
    return Finding.of(
        "F24",
        "error" if is_fault else "warning",
        message=f"{lost:,} of {total:,} {what} ({percent(lost, total)}) are "
        + (
            f"in rows that are longer than max_length {limit} and dropped."
            if dropped > cut
            else f"truncated at max_length {limit}, and lose their end."
        ),
        evidence={
            "answers": total,
            "answers_cut": cut,
            "dropped": dropped,
            "max_length": limit,
            "rows": side.places(cut_rows(facts)),
        },
        fix=_longer(facts, _enough_for_long_rows(facts), "95 % of the long rows", can_drop=cut >= dropped),
        affected=lost / (total + _num_answerless(facts)),
    )


def _num_answerless(facts: RowFacts) -> int:
    """Rows of which nothing of the answer is left (F25)."""
    return int(np.count_nonzero((facts.train.num_labels == 0) & facts.is_cut(facts.train)))


@rule("F25", needs=("rows",))
def prompt_fills_window(facts: RowFacts) -> Finding | None:
    """F25: prompts fill `max_length`, so nothing of the answer is left to train on.

    Sees: rows that fill `max_length` and have no label; rows that were dropped because their answer begins after it;
    fewer rows after truncation than before.
    Why: the loss is 0 or NaN; trl 1.16 drops such rows silently.
    Not: F21 and F18, whose rows have no label with any max_length. From 1 % of the rows it is a remark, from a third
    a fault. Control: real chats have a few prompts that are longer than any max_length.
    Fix: a `max_length` with which the rows fit, computed from their lengths; or shorter prompts.
    Wrong when: very long rows should be left out.
    Source: trl#6668, trl#6671, unsloth#11333 (which confused it with F21), FederatedScope#625.
    """
    side, dropped = facts.train, facts.dropped(ANSWER_PAST_MAX_LENGTH)
    rows = np.flatnonzero((side.num_labels == 0) & facts.is_cut(side))
    total = len(side.rows) + dropped + (0 if facts.is_sample else len(facts.validation.rows))
    if not is_pattern(len(rows) + dropped, total, FEW):
        return None
    length, lost = facts.settings.max_length, len(rows) + dropped
    return Finding.of(
        "F25",
        "error" if lost >= MUCH * total else "warning",
        message=f"{lost:,} of {total:,} rows ({percent(lost, total)}) have nothing to train on: their prompt "
        f"alone fills max_length ({length}).",
        evidence={
            "dropped": dropped,
            "rows_without_labels": len(rows),
            "max_length": length,
            "rows": side.places(rows),
        },
        fix=_longer(facts, _enough_for_all_but_few(facts), f"all but {percent(FEW / 2, 1)} of the rows", can_drop=False)
        + ", or shorten the prompts of these rows",
        affected=lost / total,
    )


def _enough_for_long_rows(facts: RowFacts) -> int | None:
    """A length for 95 % of the rows that are too long; None if the lengths before truncation are not known."""
    tokens = np.asarray(facts.report.labels.row_tokens)
    long = tokens[tokens > facts.settings.max_length]
    return _rounded_up(np.quantile(long, 1 - SOME)) if len(long) else None


def _enough_for_all_but_few(facts: RowFacts) -> int | None:
    """A length with which so few rows are longer that none of them is worth a remark."""
    tokens = np.asarray(facts.report.labels.row_tokens)
    if not len(tokens) or tokens.max() <= facts.settings.max_length:
        return None
    return _rounded_up(np.quantile(tokens, 1 - FEW / 2, method="higher"))


def _rounded_up(length: float) -> int:
    return int(-(-length // 64) * 64)


def _longer(facts: RowFacts, wanted: int | None, enough_for: str, *, can_drop: bool) -> str:
    """The change of `max_length`; where the model has too few positions for it, what helps instead."""
    most = facts.num_positions
    if wanted is None:
        return "a larger max_length" + (", or drop these rows" if can_drop else "")
    if most is not None and wanted > most:
        why = f"{enough_for} need {wanted:,} tokens, and the model has {most:,} positions"
        return f"overflow: split (no max_length is enough: {why})"
    return f"max_length: {wanted} (enough for {enough_for})" + (", or overflow: drop" if can_drop else "")


@rule("F25", otherwise=True)
def rows_gone_in_truncation(run_facts: RunFacts) -> Signal | None:
    """F25, of a trainer that counts its rows: fewer rows after truncation than before; a remark below a third."""
    read, left = setting(run_facts, "rows_in"), setting(run_facts, "rows_out")
    if not read or left is None or left >= (1 - SOME) * read:
        return None
    share = 1 - left / read
    says = f"only {left:,.0f} of {read:,.0f} rows are left after truncation"
    kind, weight = ("invariant", 0.9) if share >= MUCH else ("remark", 0.3)
    numbers = {"in": read, "out": left}
    return Signal("F25", kind, says, weight, numbers, fix="a larger max_length", affected=share)


@rule("F25", needs=("tokenizer",), otherwise=True, unless=is_ours)
def prompts_alone(run_facts: RunFacts) -> Signal | None:
    """F25, where every token has a label: rows that reach max_length before the header of the answer."""
    headers, rows = Roles(run_facts).headers, [row for row in examples_of(run_facts) if row.messages]
    limit = setting(run_facts, "max_length")
    if not headers or not rows or not limit:
        return None
    full = [row for row in rows if len(row.input_ids) >= limit][:_NUM_DECODED]
    answer = headers[ASSISTANT].strip()
    texts = [str(run_facts.tokenizer.decode(row.input_ids.tolist())) for row in full]  # pyright: ignore[reportOptionalMemberAccess]
    ends = list(Roles(run_facts).ends)  # a row that ends as complete ones do has lost its beginning (F26)
    is_open = [not np.isin(row.input_ids[-_NEAR_END:], ends).any() for row in full]
    share = sum(is_open and answer not in text for text, is_open in zip(texts, is_open, strict=True))
    share /= max(len(texts), 1)
    affected = share * sum(len(row.input_ids) >= limit for row in rows) / len(rows)
    if affected < MUCH:
        return None
    says = f"{percent(affected, 1)} of the rows reach max_length {limit:g} before their answer begins"
    return Signal("F25", "invariant", says, 0.9, {"share": affected}, fix="a larger max_length", affected=affected)


@rule("F26", unless=is_ours)
def prompt_cut(run_facts: RunFacts) -> Signal | None:
    """F26: long rows are truncated at the start, so the answer has no question.

    Sees: left truncation and rows longer than the limit; rows at the limit that do not begin with the first token of
    all shorter rows, and that end like them.
    Why: the answer is trained on without its question: the first loss is 8 times as high.
    Not: F38, whose rows have prompts; F09, where short rows lack the beginning too; F24, where the ends are truncated.
    Rows that still have a question before an answer, as the last turns of a long chat, and less than a quarter of the
    rows are a remark. Control: the rows below the limit.
    Fix: in TRL, `truncation_mode: keep_start`; or drop rows that are too long (in solotune: `overflow: drop`).
    Wrong when: the answers are of a kind that needs no question.
    Source: trl has deprecated `keep_end`.
    """
    get, rows = run_facts.settings.get, examples_of(run_facts)
    lengths = np.array([len(row.input_ids) for row in rows])
    limit = setting(run_facts, "max_length") or (lengths.max() if len(lengths) else 0)
    full = lengths >= limit
    keeps_end = get("truncation_side") == "left" or get("truncation_mode") == "keep_end"
    if not len(rows) or full.sum() < max(3, SOME * len(rows)):
        return None
    first = np.array([row.input_ids[0] if len(row.input_ids) else -1 for row in rows])
    begins = expected_first(run_facts, first[~full])
    numbers, says = {"rows": int(full.sum()), "limit": int(limit)}, ""
    if begins is not None:
        lost = int((first[full] != begins).sum())
        if lost >= max(3, 0.5 * full.sum()) and _ends_alike(rows, full):
            numbers["rows"] = lost
            says = f"{lost} of {int(full.sum())} rows at the limit of {int(limit)} tokens have lost their beginning"
    if not says and not keeps_end:
        return None
    kind, weight = ("invariant", 0.85) if says else ("measured", 0.8)
    says = says or f"{int(full.sum())} rows reach the limit of {int(limit)} tokens and are truncated at the start"
    share = numbers["rows"] / len(rows)
    longest = [row for row, is_full in zip(rows, full, strict=True) if is_full]
    if share < BEGINNINGS or _have_questions(run_facts, longest):
        kind, weight = "remark", 0.3
    fix = "truncate at the end (truncation_mode: keep_start in TRL), or drop rows that are too long"
    return Signal("F26", kind, says, weight, numbers, fix=fix, affected=share)


def expected_first(run_facts: RunFacts, seen: np.ndarray) -> int | None:
    """The token that rows begin with: the first token of the shorter rows, or else of the template."""
    if len(seen) >= 3:
        found, counts = np.unique(seen, return_counts=True)
        return int(found[counts.argmax()]) if counts.max() >= SAME * len(seen) else None
    tokenizer = run_facts.tokenizer
    if tokenizer is None or not tokenizer.chat_template:
        return None
    texts = [rendered(run_facts, [{"role": "user", "content": word}]) for word in "ab"]
    first = [tokenizer.encode(text, add_special_tokens=False)[:1] for text in texts if text is not None]
    if len(first) < 2:
        return None
    return first[0][0] if first[0] and first[0] == first[1] else None


def _ends_alike(rows: list, full: np.ndarray) -> bool:
    """Whether rows at the limit share a few last tokens, as complete rows do."""
    last = np.array([row.input_ids[-1] for row, is_full in zip(rows, full, strict=True) if is_full])
    _, counts = np.unique(last, return_counts=True)
    return bool(counts.max() >= 0.8 * len(last))


def _have_questions(run_facts: RunFacts, rows: list) -> bool:
    """Whether most of these rows have a user's turn before an answer, by the template's headers."""
    headers = Roles(run_facts).headers
    if not headers:
        return False
    user, answer, seen = headers[USER].strip(), headers[ASSISTANT].strip(), 0
    for row in rows[:_NUM_DECODED]:
        text = str(run_facts.tokenizer.decode(row.input_ids.tolist()))  # pyright: ignore[reportOptionalMemberAccess]
        place = text.find(user)
        seen += place >= 0 and text.find(answer, place + len(user)) >= 0
    return seen > 0.5 * len(rows[:_NUM_DECODED])
