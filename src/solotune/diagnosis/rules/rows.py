"""S8, the content of the rows: F34 to F36, F38 and F39; `text` has F37, `order` F40 to F42.

The second rule of a fault judges conversations that could not be rendered (no tokenizer, no model, roles that
`solotune data` refuses).
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from solotune.dataset.chat.formats import EMPTY_ANSWER
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.conversations import answers_of, calls_of, chats_of
from solotune.diagnosis.facts.prompt_answer_overlap import alignment_of
from solotune.diagnosis.facts.row_arrays import is_pattern, percent, squeezed
from solotune.diagnosis.facts.row_facts import RowFacts
from solotune.diagnosis.facts.rows import examples_of
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

MOST = 0.5
"""The whole file, not some rows: severity error."""
SOME = 0.05
"""One row in twenty."""
FEW = 0.01
"""One row in a hundred: more than texts about the thing itself (placeholders)."""
ENOUGH_ROWS = 10
"""With fewer rows, the frequency of an answer means nothing."""
CONSTANT = 0.98
"""Share of one answer: 95 : 5 is normal with a rare class; two different rows in a hundred teach nothing."""
CONSTANT_CHATS = 0.9
"""The same, for chats whose tokens are unknown."""
OVERUSED = 0.2
"""Share of one sentence among free texts: if it is one answer in five, it is boilerplate or a refusal."""
OVERUSED_LABEL = 0.5
"""The same for an answer of one to three words: `unanswerable` is a third of SQuAD 2."""
REPEATED = 0.3
"""Share of (near-)duplicates that is reported; data made from templates has many, so it is not a warning."""
SHUFFLED = 0.55
"""Weight of shared words alone: enough to report it, unless the model prefers the rows' own prompts."""

_ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython", "observation"}
_EXCHANGED = "one message of the assistant and one of the user after it: what the user says is not trained on."
_NAMES_OF_ROLES = "give the message that is to be learned the role assistant, and the one before it the role user"
_WORD = re.compile(r"\w{3,}")
_NUMBER = re.compile(r"(\d+)\D*$")
_PLACEHOLDERS = {"nan", "null", "none", "undefined", "n/a", "#n/a", "<na>", "[]", "{}", "todo", "tbd"}


@rule("F34", needs=("rows",), probes=("P1",))
def empty_answers(facts: RowFacts) -> Finding | None:
    """F34: answers are empty, invisible, or a placeholder of the export.

    Sees: answers without a visible character; `nan` and the like among free texts; rows that were dropped for this
    reason.
    Why: the model learns to answer with its end of turn at once; a batch of such rows has a NaN loss.
    Not: F25, whose answers exist before truncation; `none` as one class among a few; one or two odd rows.
    Fix: correct the export, or remove these rows.
    Wrong when: `null` is a real answer.
    Source: FederatedScope#625 (NaN), trl#1225; the first loss is 16 times the normal one (measured).
    """
    dropped = facts.dropped(EMPTY_ANSWER)
    invisible = [row for row, text in facts.answers if not any(c.isprintable() and not c.isspace() for c in text)]
    folded = [(row, text.strip().casefold()) for row, text in facts.answers]
    is_free = len({text for _, text in folded}) > MOST * len(folded)
    filler = [row for row, text in folded if text in _PLACEHOLDERS] if is_free else []
    found, total = dropped + len(invisible) + len(filler), len(folded) + len(facts.validation.rows) + dropped
    if not is_pattern(len(invisible) + len(filler), len(folded), FEW) and not is_pattern(dropped, total, SOME):
        return None
    return Finding.of(
        "F34",
        "warning",
        message=f"{found:,} of {total:,} rows ({percent(found, total)}) have an empty answer or a placeholder.",
        evidence={
            "dropped_as_empty": dropped,
            "invisible": len(invisible),
            "placeholders": len(filler),
            "rows": facts.train.places(invisible + filler),
        },
        fix="check the export of the answer column, or remove these rows",
    )


@rule("F34", otherwise=True)
def chats_without_answers(run_facts: RunFacts) -> Signal | None:
    """F34, of conversations that could not be rendered."""
    answers = answers_of(chats_of(run_facts))
    empty = sum(not text.strip() for text in answers)
    if empty < max(3, 0.01 * len(answers)):
        return None
    says = f"{empty:,} of {len(answers):,} answers are empty"
    return Signal("F34", "invariant", says, 0.9, {"empty": empty}, fix="remove the rows without an answer")


@rule("F35", needs=("rows",), probes=("P10",))
def constant_answers(facts: RowFacts) -> Finding | None:
    """F35: nearly all answers are the same.

    Sees: the share of the most frequent answer.
    Why: the loss falls to almost zero, and the model gives this answer to every prompt.
    Not: F44 and F46, whose answers differ and are copied; F38, where answers differ and the prompts do not matter; a
    few classes of which one is frequent; a short `unanswerable` in up to half of the rows.
    Fix: remove or rebalance the repeated answer.
    Wrong when: the data has one class on purpose.
    Source: one answer for all rows: 1.88 in training, 6.46 held out (measured).
    """
    answers = [(row, squeezed(text)) for row, text in facts.answers]
    if len(answers) < ENOUGH_ROWS:
        return None
    counts = Counter(text for _, text in answers)
    top, count = counts.most_common(1)[0]
    rest = len(answers) - count
    shown = next(text for (_, key), (_, text) in zip(answers, facts.answers, strict=True) if key == top)
    is_free = rest > 0 and len(counts) - 1 > MOST * rest
    limit = OVERUSED_LABEL if len(shown.split()) <= 3 and len(top) <= 20 else OVERUSED
    if count < CONSTANT * len(answers) and not (is_free and count >= limit * len(answers)):
        return None
    return Finding.of(
        "F35",
        "error" if count >= CONSTANT * len(answers) else "warning",
        message=f"{count:,} of {len(answers):,} answers ({percent(count, len(answers))}) are the same: "
        f"{shown.strip()[:60]!r}.",
        evidence={
            "most_frequent": count,
            "answers": len(answers),
            "distinct": len(counts),
            "rows": facts.train.places([row for row, text in answers if text == top]),
        },
        fix="check that the answers come from the right column; if so, keep only some of these rows",
    )


@rule("F35", otherwise=True)
def chats_with_one_answer(run_facts: RunFacts) -> Signal | None:
    """F35, of conversations that could not be rendered."""
    answers = [text.strip() for text in answers_of(chats_of(run_facts))]
    if len(answers) < 20:
        return None
    text, count = Counter(answers).most_common(1)[0]
    if not text or count < CONSTANT_CHATS * len(answers):
        return None
    says = f"{count:,} of {len(answers):,} answers are {text[:40]!r}"
    return Signal("F35", "measured", says, 0.8, {"count": count}, fix="remove or rebalance the repeated answer")


@rule("F36", needs=("rows",))
def broken_turns(facts: RowFacts) -> Finding | None:
    """F36: roles have wrong names or do not alternate.

    Sees: role names that no template knows (`human`, `gpt`); two turns of one role in a row; chats of one message
    of the assistant, other than in the next chat, and one of the user after it.
    Why: strict templates raise an error. Others write a header that the model has never seen, or no answer is found.
    The loss does not show it (the first loss is 1.3 times the normal one).
    Not: several tool messages in a row; a system message at the start; a call, its result and the answer; a greeting of
    the assistant at the start, or a last word of the user.
    Fix: rename the roles to system, user and assistant.
    Wrong when: the template is made for these names.
    Source: Megatron-Bridge#5078, smol-course#260, unsloth#994.
    """
    chats = [facts.train.rows[row].messages for row in facts.chats]
    repeated = [row for row, messages in zip(facts.chats, chats, strict=True) if _repeats_a_role(messages)]
    total = len(chats)
    if exchanged := _exchanged(chats):
        rows = [facts.chats[number] for number in exchanged]
        return Finding.of(
            "F36",
            "warning",
            message=f"{len(rows):,} of {total:,} rows are {_EXCHANGED}",
            evidence={"rows_with": len(rows), "rows_read": total, "rows": facts.train.places(rows)},
            fix=_NAMES_OF_ROLES,
        )
    if not is_pattern(len(repeated), total, SOME):
        return None
    return Finding.of(
        "F36",
        "warning",
        message=f"{len(repeated):,} of {total:,} rows have two turns of the same role in a row.",
        evidence={"rows_with": len(repeated), "rows_read": total, "rows": facts.train.places(repeated)},
        fix="join neighbouring messages of one role, or look for a lost turn between them",
    )


def _repeats_a_role(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the user or the assistant has two turns in a row; a call and the answer after it are no repetition."""
    turns = [message for message in messages if message["role"] not in ("system", "developer")]
    return any(
        a["role"] == b["role"] and a["role"] in ("user", "assistant") and not calls_of(a)
        for a, b in itertools.pairwise(turns)
    )


def _exchanged(chats: Sequence[Sequence[Mapping[str, Any]]]) -> list[int]:
    """Numbers of the chats whose question is the assistant's and whose answer is the user's; empty unless most are so.

    The order alone does not tell: many chats begin with a greeting, interviews with a question, and end with the user.
    But a greeting is the same in many chats, and an interview does not end after one answer, which nobody trains on.
    """
    found, first = [], set()
    for number, messages in enumerate(chats):
        turns = [message for message in messages if message["role"] not in ("system", "developer")]
        if [turn["role"] for turn in turns] == ["assistant", "user"]:
            found.append(number)
            first.add(squeezed(str(turns[0]["content"])))
    return found if is_pattern(len(found), len(chats), MOST) and len(first) > MOST * len(found) else []


@rule("F36", otherwise=True)
def foreign_roles(run_facts: RunFacts) -> Signal | None:
    """F36, of conversations that could not be rendered: unknown role names, or roles that do not alternate."""
    chats = chats_of(run_facts)
    if not chats:
        return None
    fix = "in the data, name the roles system, user and assistant, and let user and assistant alternate"
    named = Counter(m["role"] for chat in chats for m in chat)
    foreign = {role: count for role, count in named.items() if role not in _ROLES}
    odd = sum(any(m["role"] in foreign for m in chat) for chat in chats)
    if foreign and odd >= max(3, SOME * len(chats)):
        says = f"{odd:,} of {len(chats):,} chats have roles that no template knows: {', '.join(sorted(foreign))}"
        return Signal("F36", "invariant", says, 0.85, {"roles": foreign}, fix=fix)
    if exchanged := len(_exchanged(chats)):
        says = f"{exchanged:,} of {len(chats):,} chats are {_EXCHANGED}"
        return Signal("F36", "measured", says, 0.75, {"chats": exchanged}, fix=_NAMES_OF_ROLES)
    broken = sum(_repeats_a_role(chat) for chat in chats)
    if broken < max(3, SOME * len(chats)):
        return None
    says = f"in {broken:,} of {len(chats):,} chats user and assistant do not alternate"
    return Signal("F36", "measured", says, 0.75, {"chats": broken}, fix=fix)


@rule("F38", needs=("rows",), probes=("P10",))
def misaligned_answers(facts: RowFacts) -> Finding | None:
    """F38: answers do not belong to their prompts.

    Sees: rare words of prompts that occur in the answer of the next or previous row more often than in their own; or
    answers with rare words of prompts from all over the data, and of their own prompt no more often than by chance
    (shuffled). Probe P10 asks the model: with another row's prompt the loss is the same or lower.
    Why: the loss flattens above what the model could reach; answers are fluent but do not fit the question.
    Not: F64, where another learning rate helps; F35, whose answers are all alike; F26, where prompts are missing;
    sorted rows, whose own answer still fits best; tasks without common words, where no neighbour fits better either.
    Fix: join prompts and answers again by their key.
    Wrong when: answers never depend on their prompts, or answers are prompts of other rows (translation in both
    directions).
    Source: the first loss is 4.2 times the normal one; the loss curve of a small model does not show it (measured).
    """
    pairs = []
    for side in (facts.train, facts.validation):
        for row in side.rows:
            spoken = [m for m in row.messages if m["role"] not in ("system", "developer")]
            if [m["role"] for m in spoken] == ["user", "assistant"]:
                number = _NUMBER.search(row.where)
                order = (row.where[: number.start()] if number else "", int(number[1]) if number else len(pairs))
                pairs.append((order, row.where, *(set(_WORD.findall(m["content"].casefold())) for m in spoken)))
    if len(pairs) < 2 * ENOUGH_ROWS:
        return None
    pairs.sort(key=lambda pair: pair[0])
    common = Counter(word for *_, prompt, _ in pairs for word in prompt)
    rare = {word for word, count in common.items() if count <= max(2, FEW * len(pairs))}
    prompts, answers = [p[2] & rare for p in pairs], [p[3] for p in pairs]
    hits = {
        shift: sum(not prompts[i].isdisjoint(answers[i + shift]) for i in range(1, len(pairs) - 1))
        for shift in (-1, 0, 1)
    }
    best = max((-1, 1), key=lambda shift: hits[shift])
    # 3 times: far from chance for words this rare, and far from sorted data
    if hits[best] < 0.2 * len(pairs) or hits[best] < 3 * hits[0]:
        return None
    return Finding.of(
        "F38",
        "error",
        message=f"The answers belong to the prompts of the {'next' if best == -1 else 'previous'} row: prompts share "
        f"rare words with {hits[best]:,} answers one row {'before' if best == -1 else 'after'} them, and with "
        f"{hits[0]:,} of their own answers.",
        evidence={
            "rows_compared": len(pairs) - 2,
            "matches_own": hits[0],
            "matches_previous": hits[-1],
            "matches_next": hits[1],
            "rows": [pair[1] for pair in pairs[:3]],
        },
        fix="join prompts and answers again, by an id instead of their order",
    )


@rule("F38", otherwise=True)
def shuffled_answers(run_facts: RunFacts) -> Signal | None:
    """F38, from answers with rare words of prompts all over the data, but not of their own."""
    found = alignment_of(_asked_and_answered(chats_of(run_facts)))
    if found is None:
        return None
    says = f"{found.linked} of {found.rows} answers have a rare word of some prompt, {found.own} of their own prompt"
    says += f" (by chance: {found.by_chance:.0f})"
    numbers = {"rows": found.rows, "linked": found.linked, "own": found.own, "by_chance": found.by_chance}
    if found.is_shuffled:
        fix = "join prompts and answers again by their key"
        return Signal("F38", "measured", says, SHUFFLED, numbers, fix=fix)
    return Signal("F38", "measured", says, 0.85, numbers, against=True) if found.is_whole else None


def _asked_and_answered(chats: Sequence[Sequence[dict[str, Any]]]) -> list[tuple[str, str]]:
    """Pairs of the text before the last answer, and that answer."""
    said = ([str(m["content"]) for m in chat if m["role"] not in ("system", "developer")] for chat in chats)
    return [("\n".join(texts[:-1]), texts[-1]) for texts in said if len(texts) > 1]


@rule("F39", needs=("rows",))
def duplicates(facts: RowFacts) -> Finding | None:
    """F39: the same rows are in the data many times.

    Sees: rows with equal ids, or equal chats.
    Why: these rows are memorised, the data has fewer different rows than it seems, and held-out rows have copies in
    training.
    Not: F46, many epochs over different rows; F41, where data loader workers repeat rows that are in the file once;
    rows made from one pattern, which are naturally alike.
    Fix: remove duplicates before the split.
    Wrong when: rows are repeated to give them more weight; with dataset_exact_deduplication: false it is an info.
    Source: common guides on deduplication.
    """
    train, report = facts.whole[0], facts.report
    order = np.argsort(train.hashes, kind="stable")
    same = np.sort(order[1:][train.hashes[order[1:]] == train.hashes[order[:-1]]])
    total = len(train.rows)
    evidence = {
        "equal_after_truncation": len(same),
        "copies_removed": report.num_exact_duplicates,
        "near_duplicates": report.num_near_duplicates,
        "rows": train.places(same),
    }
    if report.num_copies_kept:
        return Finding.of(
            "F39",
            "info",
            message=f"{report.num_copies_kept:,} rows are exact copies of an earlier one, and were kept.",
            evidence={**evidence, "copies_kept": report.num_copies_kept},
            fix="nothing to do if they are meant; else remove dataset_exact_deduplication: false",
        )
    if is_pattern(len(same), total, SOME):
        return Finding.of(
            "F39",
            "warning",
            message=f"{len(same):,} of {total:,} rows have the same tokens as an earlier row.",
            evidence=evidence,
            fix=f"if only their beginnings are equal, raise max_length above {facts.settings.max_length}; "
            "else remove the copies",
        )
    whole = report.num_train + report.num_validation + report.num_exact_duplicates
    alike = report.num_exact_duplicates + report.num_near_duplicates
    if not is_pattern(alike, whole, REPEATED):
        return None
    return Finding.of(
        "F39",
        "warning" if report.num_exact_duplicates >= MOST * whole else "info",
        message=f"{percent(alike, whole)} of the rows repeat an earlier one: {report.num_exact_duplicates:,} exactly "
        f"(removed) and {report.num_near_duplicates:,} nearly (kept, on one side of the split).",
        evidence=evidence,
        fix="nothing to do if the rows are made from a template; if copies are meant, set "
        "dataset_exact_deduplication: false or give the row a higher weight; else look for a file that was added twice",
    )


@rule("F39", otherwise=True)
def repeated_rows(run_facts: RunFacts) -> Signal | None:
    """F39, of rows that another trainer made, or of conversations that could not be rendered."""
    rows = examples_of(run_facts) if run_facts.train else []
    keys = [row.input_ids.tobytes() for row in rows] or [repr(chat) for chat in chats_of(run_facts)]
    again = len(keys) - len(set(keys))
    if again < max(3, 0.2 * len(keys)):
        return None
    says = f"{again:,} of {len(keys):,} rows repeat an earlier one"
    return Signal("F39", "measured", says, 0.8, {"again": again}, fix="remove duplicates before the split")
