"""S8, the content of the rows: F34 to F36; `text` has F37, `misaligned` F38, `duplicates` F39, `order` F40 to F42.

The second rule of a fault judges conversations that could not be rendered (no tokenizer, no model, roles that
`solotune data` refuses).
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from solotune.dataset.chat.formats import EMPTY_ANSWER
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.conversations import answers_of, calls_of, chats_of
from solotune.diagnosis.facts.row_arrays import MIN_ROWS, NUM_DECODED, evenly, is_pattern, percent, squeezed
from solotune.diagnosis.facts.row_facts import RowFacts, pieces_of_template
from solotune.diagnosis.facts.rows import facts_of
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
ALIKE = 0.25
"""Of the words of two answers, if they are classes in one sentence."""
CONSTANT_SENTENCE = 0.9
"""Share of one sentence, if the other answers are free texts."""
OVERUSED = 0.2
"""Share of one sentence among free texts: if it is one answer in five, it is boilerplate or a refusal."""
OVERUSED_LABEL = 0.5
"""The same for an answer of one to three words: `unanswerable` is a third of SQuAD 2."""

_FOREIGN_ROLES = (
    "human",
    "gpt",
    "bot",
    "chatbot",
    "chatgpt",
    "model",
    "bard",
    "ai",
    "prompter",
    "customer",
    "agent",
    "instruction",
    "response",
)
_ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython", "observation"}
_EXCHANGED = "one message of the assistant and one of the user after it: what the user says is not trained on."
_NAMES_OF_ROLES = (
    "in the data, give the message that is to be learned the role assistant, and the one before it the role user"
)
_EXPORTED = {"nan", "undefined", "#n/a", "<na>"}
_PLACEHOLDERS = _EXPORTED | {"null", "none", "n/a", "[]", "{}", "todo", "tbd"}


@rule("F34", needs=("rows",), probes=("P1",))
def empty_answers(facts: RowFacts) -> Finding | None:
    """F34: answers are empty, invisible, or a placeholder of the export.

    Sees: answers without a visible character; `nan` and the like among free texts; rows that were dropped for this
    reason.
    Why: the model learns to answer with its end of turn at once; a batch of such rows has a NaN loss.
    Not: F25, whose answers exist before truncation; `none` as one class among a few; one or two odd rows; questions of
    a log that nobody answered, which are left out: up to a fifth of the rows is a remark.
    Fix: correct the export, or remove these rows.
    Wrong when: `null` is a real answer. Control: `none`, `n/a`, `{}` are what extraction finds where there is nothing,
    so they are a remark; `nan`, `undefined` and `<na>` are written by programs only.
    Source: FederatedScope#625 (NaN), trl#1225; the first loss is 16 times the normal one (measured).
    """
    dropped = facts.dropped(EMPTY_ANSWER)
    invisible = [row for row, text in facts.answers if not any(c.isprintable() and not c.isspace() for c in text)]
    folded = [(row, text.strip().casefold()) for row, text in facts.answers]
    is_free = len({text for _, text in folded}) > MOST * len(folded)
    filler = [row for row, text in folded if text in _PLACEHOLDERS] if is_free else []
    exported = sum(text in _EXPORTED for _, text in folded) if is_free else 0
    found, total = dropped + len(invisible) + len(filler), len(folded) + len(facts.validation.rows) + dropped
    if not is_pattern(len(invisible) + len(filler), len(folded), FEW) and not is_pattern(dropped, total, SOME):
        return None
    return Finding.of(
        "F34",
        "error" if _are_lost(len(invisible) + exported, len(folded), dropped, total) else "warning",
        message=f"{found:,} of {total:,} rows ({percent(found, total)}) have an empty answer or a placeholder.",
        evidence={
            "dropped_as_empty": dropped,
            "invisible": len(invisible),
            "placeholders": len(filler),
            "rows": facts.train.places(invisible + filler),
        },
        fix="in the data, check the export of the answer column, or remove these rows",
        affected=found / total,
    )


def _are_lost(learned: int, answers: int, dropped: int, total: int) -> bool:
    """Whether empty answers are a fault: one in twenty that are trained on, or one in five that were left out."""
    return is_pattern(learned, answers, SOME) or is_pattern(dropped, total, OVERUSED)


@rule("F34", otherwise=True)
def chats_without_answers(run_facts: RunFacts) -> Signal | None:
    """F34, of conversations that could not be rendered."""
    answers = answers_of(chats_of(run_facts))
    empty = sum(not text.strip() for text in answers)
    if not is_pattern(empty, len(answers), FEW):
        return None
    says, fix = f"{empty:,} of {len(answers):,} answers are empty", "in the data, remove the rows without an answer"
    kind, weight = ("invariant", 0.9) if is_pattern(empty, len(answers), SOME) else ("remark", 0.3)
    return Signal("F34", kind, says, weight, {"empty": empty}, fix=fix, affected=empty / len(answers))


@rule("F35", needs=("rows",), probes=("P10",))
def constant_answers(facts: RowFacts) -> Finding | None:
    """F35: nearly all answers are the same.

    Sees: one answer in all rows; one sentence in nine of ten rows, where the others are free texts.
    Why: the loss falls to almost zero, and the model gives this answer to every prompt.
    Not: F44 and F46, whose answers differ and are copied; F38, where answers differ and the prompts do not matter; a
    refusal or a short `unanswerable` in a part of the rows, which is a remark.
    Fix: remove or rebalance the repeated answer.
    Wrong when: the data has one class on purpose. Control: the other answers. If they are few classes too, the data has
    classes of which one is frequent (99 of 100 are no fraud), and the share of a class is no fault.
    Source: one answer for all rows: 1.88 in training, 6.46 held out (measured).
    """
    found = _constant([text for _, text in facts.answers])
    if found is None or not found.answer:  # empty: F34
        return None
    return Finding.of(
        "F35",
        "error" if found.is_fault else "warning",
        message=found.says + ".",
        evidence={
            "most_frequent": found.count,
            "answers": len(facts.answers),
            "distinct": found.distinct,
            "rows": facts.train.places([row for row, text in facts.answers if squeezed(text) == found.answer]),
        },
        fix="in the data, check that the answers come from the right column; if so, keep only some of these rows",
        affected=found.count / len(facts.answers),
        is_statistic=found.distinct > 1,
    )


@rule("F35", otherwise=True)
def chats_with_one_answer(run_facts: RunFacts) -> Signal | None:
    """F35, of conversations that could not be rendered."""
    answers = answers_of(chats_of(run_facts))
    found = _constant(answers)
    if found is None or not found.answer:
        return None
    kind, weight = ("measured", 0.8) if found.is_fault else ("remark", 0.3)
    fix, affected = "in the data, remove or rebalance the repeated answer", found.count / len(answers)
    return Signal("F35", kind, found.says, weight, {"count": found.count}, fix=fix, affected=affected)


class _Constant(NamedTuple):
    """The most frequent answer, if it is too frequent."""

    answer: str
    """squeezed"""
    count: int
    distinct: int
    is_fault: bool
    says: str


def _constant(texts: Sequence[str]) -> _Constant | None:
    if len(texts) < ENOUGH_ROWS:
        return None
    answers = [squeezed(text) for text in texts]
    counts = Counter(answers)
    top, count = counts.most_common(1)[0]
    rest = len(answers) - count
    shown = next(text for text, answer in zip(texts, answers, strict=True) if answer == top).strip()
    is_label = len(shown.split()) <= 3 and len(top) <= 20
    is_free = rest > 0 and len(counts) - 1 > MOST * rest
    share = count / len(answers)
    if share < CONSTANT and not (is_free and share >= (OVERUSED_LABEL if is_label else OVERUSED)):
        return None
    others = [_alike(text, shown) for text, answer in zip(texts, answers, strict=True) if answer != top]
    is_one_class = rest < MIN_ROWS and sum(others) > ALIKE * rest  # "It is in order." beside "It is suspicious."
    is_sentence = not is_label and share >= CONSTANT_SENTENCE and (is_free or rest < MIN_ROWS) and not is_one_class
    is_fault = (rest == 0 and count >= 2 * ENOUGH_ROWS) or is_sentence
    says = f"{count:,} of {len(answers):,} answers ({percent(count, len(answers))}) are the same: {shown[:60]!r}"
    return _Constant(top, count, len(counts), is_fault, says)


def _alike(text: str, other: str) -> float:
    """The share of words that two texts have in common."""
    a, b = (set(one.casefold().split()) for one in (text, other))
    return len(a & b) / max(len(a | b), 1)


@rule("F36", needs=("rows",))
def broken_turns(facts: RowFacts) -> Finding | None:
    """F36: roles have wrong names or do not alternate.

    Sees: role names that no template knows (`human`, `gpt`), in chats or in headers of rendered rows; chats of one
    message of the assistant, other than in the next chat, and one of the user after it; the same turn twice in a row.
    Two different turns of one role in a row are a remark.
    Why: strict templates raise an error. Others write a header that the model has never seen, or no answer is found.
    The loss does not show it (the first loss is 1.3 times the normal one).
    Not: several tool messages in a row; a system message at the start; a call, its result and the answer; a greeting of
    the assistant at the start, or a last word of the user; role names that the trainer translates.
    Fix: rename the roles to system, user and assistant.
    Wrong when: the template is made for these names. Control: the rendered rows. If they have the template's header of
    a user, the names were translated.
    Source: Megatron-Bridge#5078, smol-course#260, unsloth#994.
    """
    chats = [facts.train.rows[row].messages for row in facts.chats]
    repeated = [row for row, messages in zip(facts.chats, chats, strict=True) if _repeats_a_role(messages)]
    twice = [row for row, messages in zip(facts.chats, chats, strict=True) if _repeats_a_role(messages, same=True)]
    total = len(chats)
    if exchanged := _exchanged(chats):
        rows = [facts.chats[number] for number in exchanged]
        return Finding.of(
            "F36",
            "error",
            message=f"{len(rows):,} of {total:,} rows are {_EXCHANGED}",
            evidence={"rows_with": len(rows), "rows_read": total, "rows": facts.train.places(rows)},
            fix=_NAMES_OF_ROLES,
            affected=len(rows) / total,
            is_statistic=True,
        )
    is_twice = is_pattern(len(twice), total, SOME)
    if not is_pattern(len(repeated), total, SOME):
        return None
    rows = twice if is_twice else repeated
    return Finding.of(
        "F36",
        "error" if is_twice else "warning",
        message=f"{len(rows):,} of {total:,} rows have two turns of the same role in a row"
        + (", with the same text." if is_twice else "."),
        evidence={"rows_with": len(rows), "rows_read": total, "rows": facts.train.places(rows)},
        fix="in the data, remove the second turn"
        if is_twice
        else "in the data, join neighbouring messages of one role, or look for a lost turn between them",
        affected=len(rows) / total,
    )


@rule("F36", needs=("rows",))
def headers_of_foreign_roles(facts: RowFacts) -> Finding | None:
    """F36, of rendered rows: the template's header, with a role name that it does not have."""
    header = _header_of_answers(facts)
    if header is None:
        return None
    begin, end = header
    pattern = re.compile(re.escape(begin) + f"({'|'.join(_FOREIGN_ROLES)})" + re.escape(end), re.IGNORECASE)
    read = evenly(range(len(facts.train.rows)), NUM_DECODED)
    own = str(facts.tokenizer.chat_template)  # may have such a name for the user or the assistant itself
    texts = {row: facts.decode(facts.train.rows[row].input_ids) for row in read}
    found = {row: {name for name in pattern.findall(text) if name not in own} for row, text in texts.items()}
    named = {row: names for row, names in found.items() if names}
    if not is_pattern(len(named), len(read), SOME):
        return None
    names = sorted(set().union(*named.values()))
    return Finding.of(
        "F36",
        "error",
        message=f"{len(named):,} of {len(read):,} rows have turns of roles that the chat template does not have: "
        f"{', '.join(names)}.",
        evidence={
            "rows_with": len(named),
            "rows_read": len(read),
            "roles": names,
            "rows": facts.train.places([*named]),
        },
        fix="in the data, name the roles system, user and assistant",
        affected=len(named) / len(read),
    )


def _header_of_answers(facts: RowFacts) -> tuple[str, str] | None:
    """What the template writes before and after the role's name in the header of an answer; None without a name."""
    pieces = pieces_of_template(facts)
    if pieces is None or "assistant" not in pieces[1]:
        return None
    before, _, after = pieces[1].rpartition("assistant")
    begin = before.rpartition("\n")[2][-16:]
    return (begin, after[:4]) if begin.strip() and after else None


def _repeats_a_role(messages: Sequence[Mapping[str, Any]], same: bool = False) -> bool:
    """Whether the user or the assistant has two turns in a row (`same`: of the same text); a call and the answer after
    it are no repetition."""
    turns = [message for message in messages if message["role"] not in ("system", "developer")]
    return any(
        a["role"] == b["role"]
        and a["role"] in ("user", "assistant")
        and not calls_of(a)
        and (not same or a["content"] == b["content"])
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
    if foreign and is_pattern(odd, len(chats), SOME) and not _are_translated(run_facts):
        says = f"{odd:,} of {len(chats):,} chats have roles that no template knows: {', '.join(sorted(foreign))}"
        return Signal("F36", "invariant", says, 0.85, {"roles": foreign}, fix=fix, affected=odd / len(chats))
    if exchanged := len(_exchanged(chats)):
        says, affected = f"{exchanged:,} of {len(chats):,} chats are {_EXCHANGED}", exchanged / len(chats)
        return Signal("F36", "measured", says, 0.75, {"chats": exchanged}, fix=_NAMES_OF_ROLES, affected=affected)
    broken, twice = (sum(_repeats_a_role(chat, same) for chat in chats) for same in (False, True))
    if not is_pattern(broken, len(chats), SOME):
        return None
    if is_pattern(twice, len(chats), SOME):
        says = f"in {twice:,} of {len(chats):,} chats a turn stands twice in a row"
        return Signal("F36", "measured", says, 0.75, {"chats": twice}, fix=fix, affected=twice / len(chats))
    says = f"in {broken:,} of {len(chats):,} chats user and assistant do not alternate"
    return Signal("F36", "remark", says, 0.3, {"chats": broken}, fix=fix, affected=broken / len(chats))


def _are_translated(run_facts: RunFacts) -> bool:
    """Whether the rendered rows have the template's header of a user, and of no other role: the trainer knew them."""
    is_own_rendering = "batches" in run_facts.missing  # the trainer's is not known, and these rows are solotune's
    facts = facts_of(run_facts) if len(run_facts.train) and not is_own_rendering else None
    header = None if facts is None else _header_of_answers(facts)
    if facts is None or header is None:
        return False
    read = [facts.decode(facts.train.rows[row].input_ids) for row in evenly(range(len(facts.train.rows)), 20)]
    user = f"{header[0]}user{header[1]}"
    return all(user in text for text in read) and headers_of_foreign_roles(facts) is None
