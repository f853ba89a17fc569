"""S8, answers that belong to other prompts: F38."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.conversations import chats_of
from solotune.diagnosis.facts.prompt_answer_overlap import Alignment, alignment_of, shift_of
from solotune.diagnosis.facts.row_facts import RowFacts
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

WEIGHT = 0.7
"""Of words alone: a statistic beyond its control, but the model may prefer the rows' own prompts."""
FIX = "in the data, join prompts and answers again by an id instead of their order"
_NUMBER = re.compile(r"(\d+)\D*$")


class Misaligned(NamedTuple):
    """What is wrong with the pairs of prompt and answer."""

    says: str
    numbers: dict[str, Any]
    share: float
    """of the rows"""


@rule("F38", needs=("rows",), probes=("P10",))
def misaligned_answers(facts: RowFacts) -> Finding | None:
    """F38: answers do not belong to their prompts.

    Sees: answers that share their rare words and numbers with the prompt of another row and not with their own, where
    each of these prompts is claimed by one answer only: shifted by some rows, or shuffled, all of them or a part. In
    labels and short answers: similar prompts whose answers are similar at one shift, and not at shift 0. Probe P10 asks
    the model: with another row's prompt the loss is the same or lower.
    Why: the loss flattens above what the model could reach; answers are fluent but do not fit the question.
    Not: F64, where another learning rate helps; F35, whose answers are all alike; F26, where prompts are missing;
    sorted rows, and pieces of one conversation, whose own prompt still fits; answers that share words with other
    prompts by accident, which hit prompts at random.
    Fix: join prompts and answers again by their key.
    Wrong when: answers are meant for other rows' prompts. Control: a random map of as many answers to prompts, the
    other shifts, and the rank of the own prompts among all. Labels that were shuffled cannot be told from labels that
    cannot be predicted, so they are left to P10.
    Source: the first loss is 4.2 times the normal one; the loss curve of a small model does not show it (measured).
    """
    chats = []
    for side in (facts.train, facts.validation):
        for row in side.rows:
            number = _NUMBER.search(row.where)
            order = (row.where[: number.start()] if number else "", int(number[1]) if number else len(chats))
            chats.append((order, row.messages))
    chats.sort(key=lambda chat: chat[0])
    pairs = _asked_and_answered([messages for _, messages in chats if messages])
    found = _misaligned(pairs, alignment_of(pairs))
    if found is None:
        return None
    return Finding.of(
        "F38",
        "error",
        message=found.says[0].upper() + found.says[1:] + ".",
        evidence=found.numbers,
        fix=FIX,
        affected=found.share,
        is_statistic=True,
    )


@rule("F38", otherwise=True)
def misaligned_conversations(run_facts: RunFacts) -> Signal | None:
    """F38, of conversations that could not be rendered; and evidence against it."""
    pairs = _asked_and_answered(chats_of(run_facts))
    alignment = alignment_of(pairs)
    if found := _misaligned(pairs, alignment):
        return Signal("F38", "measured", found.says, WEIGHT, found.numbers, fix=FIX, affected=found.share)
    if alignment is None or not alignment.is_whole:
        return None
    says = f"{alignment.own:,} of {alignment.claims:,} answers with rare words of one prompt have those of their own"
    return Signal("F38", "measured", says, 0.85, {"own": alignment.own, "claims": alignment.claims}, against=True)


def _misaligned(pairs: Sequence[tuple[str, str]], alignment: Alignment | None) -> Misaligned | None:
    if alignment is not None and alignment.is_displaced:
        count, shift = len(alignment.displaced), alignment.shift
        whose = "another row" if shift is None else _row_at(shift)
        says = f"{count:,} of {alignment.claims:,} answers that can be told apart by their rare words belong to the "
        says += f"prompt of {whose}, {alignment.own:,} to their own"
        numbers = {
            "rows_compared": alignment.rows,
            "own_prompt": alignment.own,
            "other_prompt": count,
            "claimed_once": alignment.once,
            "claimed_once_by_chance": round(alignment.by_chance, 1),
            "shift": shift,
        }
        return Misaligned(says, numbers, count / alignment.claims)
    if moved := shift_of(pairs):
        says = f"the answers fit the prompts of {_row_at(moved.rows)}, and not their own: "
        says += f"{moved.strength:.0f} standard deviations at this shift, {moved.at_zero:.1f} in the order of the file"
        numbers = {"shift": moved.rows, "strength": round(moved.strength, 1), "in_order": round(moved.at_zero, 1)}
        return Misaligned(says, numbers, moved.share)
    return None


def _row_at(shift: int) -> str:
    if abs(shift) == 1:
        return "the next row" if shift == 1 else "the previous row"
    return f"the row {abs(shift):,} {'below' if shift > 0 else 'above'}"


def _asked_and_answered(chats: Sequence[Sequence[Mapping[str, Any]]]) -> list[tuple[str, str]]:
    """Pairs of what was said before the last answer, and that answer."""
    found = []
    for chat in chats:
        said = [(str(m["role"]), str(m["content"])) for m in chat if m["role"] not in ("system", "developer")]
        while said and said[-1][0] in ("user", "human"):
            said.pop()
        if len(said) > 1:
            found.append(("\n".join(text for _, text in said[:-1]), said[-1][1]))
    return found
