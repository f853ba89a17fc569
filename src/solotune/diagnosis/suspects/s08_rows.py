"""S8, what the rows say and in which order: F34 to F42.

Most of it is known from `dataset.findings`. What stands here judges conversations that could not be rendered (no
tokenizer, no model, roles that the data door refuses), the order of rows, and workers.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from solotune.diagnosis.alignment import alignment_of
from solotune.diagnosis.arithmetic import (
    is_ours,
    out_of_memory,
    planned_steps,
    row_lengths,
    setting,
    steps_of_epochs,
)
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.rows import examples_of, plain_messages, rows_of
from solotune.diagnosis.subject import Subject
from solotune.diagnosis.suspects import rule, taken_over
from solotune.diagnosis.suspects.s14_loop import last_step, tail_decides

SOME, MOST = 0.05, 0.5
"""Of rows: a part of the file, and the file as a whole."""
NUM_CHATS = 2000
CONSTANT = 0.9
"""Share of one answer; rare classes make 95 : 5 normal only for labels of a word."""
SORTED = 0.7
"""Rank correlation of place and length (or answer), which a shuffled file of a hundred rows has with probability
1e-15."""
LONG_TAIL = 8.0
"""The longest row by the 95th percentile; real chats have 3 to 5."""
SHUFFLED = 0.55
"""Weight of words alone: enough to name it, and not against a model that prefers the rows' own prompts."""
_ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython", "observation"}
_MOJIBAKE = re.compile("[\u00c2-\u00f4][\u0080-\u00bf]")


def chats_of(subject: Subject) -> list[list[dict[str, Any]]]:
    """Conversations as they were given, else those of the training rows."""
    chats = [plain_messages(chat) for chat in list(subject.conversations)[:NUM_CHATS]]
    return chats or [row.messages for row in list(subject.train[:NUM_CHATS]) if row.messages]


def answers_of(chats: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    """The last answer of each chat."""
    named = ("assistant", "gpt", "model", "bot")
    last = ([m for m in chat if m["role"] in named] or list(chat[-1:]) for chat in chats)
    return [str(found[-1]["content"]) for found in last if found]


@rule("F34", probes=("P1",))
def empty_answers(subject: Subject) -> list[Signal]:
    """F34: answers are empty, invisible, or a placeholder of the export.

    Sees: answers without a visible character, `nan` and the like among free texts; rows dropped for it.
    Why: the model learns to answer with its end of turn at once; a batch of them has a NaN loss.
    Not: F25, whose text exists before truncation; `none` as one class among few; one or two odd rows.
    Fix: the export, or these rows dropped.
    Wrong when: `null` is a real answer.
    Source: FederatedScope#625 (NaN), trl#1225; ratio 16 (measured).
    """
    signals, answers = taken_over(subject, "F34"), answers_of(chats_of(subject))
    empty = sum(not text.strip() for text in answers)
    if signals or empty < max(3, 0.01 * len(answers)):
        return signals
    says = f"{empty:,} of {len(answers):,} answers are empty"
    return [Signal("F34", "invariant", says, 0.9, {"empty": empty}, fix="drop the rows without an answer")]


@rule("F35", probes=("P10",))
def constant_answers(subject: Subject) -> list[Signal]:
    """F35: nearly all answers are the same.

    Sees: the share of the most frequent answer.
    Why: the loss falls to almost nothing, and every prompt gets this answer.
    Not: F44 and F46, whose answers differ and are copied; F38, where answers differ and prompts do not matter; few
    classes of which one is frequent.
    Fix: the repeated answer removed or rebalanced.
    Wrong when: the data is one class on purpose.
    Source: one answer for all: 1.88 in training, 6.46 held out (measured).
    """
    signals, answers = taken_over(subject, "F35"), [text.strip() for text in answers_of(chats_of(subject))]
    if signals or len(answers) < 20:
        return signals
    text, count = Counter(answers).most_common(1)[0]
    if not text or count < CONSTANT * len(answers):
        return signals
    says = f"{count:,} of {len(answers):,} answers are {text[:40]!r}"
    return [Signal("F35", "measured", says, 0.8, {"count": count}, fix="remove or rebalance the repeated answer")]


@rule("F36")
def broken_turns(subject: Subject) -> list[Signal]:
    """F36: roles have wrong names or do not alternate.

    Sees: names of roles that no template knows (`human`, `gpt`), two turns of one role in a row, chats that end with
    the user or begin with the assistant.
    Why: strict templates refuse; permissive ones write a header the model has never seen, or no answer is found. The
    loss will not tell (ratio 1.3).
    Not: tool messages, several of which may follow one another; a system message in front.
    Fix: roles mapped to system, user, assistant.
    Wrong when: the template is made for these names.
    Source: Megatron-Bridge#5078, smol-course#260, unsloth#994.
    """
    signals, chats = taken_over(subject, "F36"), chats_of(subject)
    if signals or not chats:
        return signals
    fix = "name the roles system, user and assistant, in turns (column_mapping, or the file itself)"
    named = Counter(m["role"] for chat in chats for m in chat)
    foreign = {role: count for role, count in named.items() if role not in _ROLES}
    odd = sum(any(m["role"] in foreign for m in chat) for chat in chats)
    if foreign and odd >= max(3, SOME * len(chats)):
        says = f"{odd:,} of {len(chats):,} chats have roles that templates do not know: {', '.join(sorted(foreign))}"
        return [Signal("F36", "invariant", says, 0.85, {"roles": foreign}, fix=fix)]
    broken = sum(_is_broken([m["role"] for m in chat if m["role"] in ("user", "assistant")]) for chat in chats)
    if broken < max(3, SOME * len(chats)):
        return signals
    says = f"in {broken:,} of {len(chats):,} chats user and assistant do not take turns"
    return [Signal("F36", "measured", says, 0.75, {"chats": broken}, fix=fix)]


def _is_broken(roles: list[str]) -> bool:
    repeats = any(a == b for a, b in itertools.pairwise(roles))
    return bool(roles) and (repeats or roles[0] == "assistant" or roles[-1] == "user")


@rule("F37", probes=("P1",))
def bad_encoding(subject: Subject) -> list[Signal]:
    """F37: the text was decoded with the wrong encoding.

    Sees: replacement characters; pairs such as `Ã©` that become one letter when the text is encoded as Latin-1 and read
    as UTF-8; line breaks spelled as `\\n`; characters that nobody sees.
    Why: the model learns the damage, at a higher loss, and writes it.
    Not: another language, whose letters do not turn into shorter text that way.
    Fix: `text.encode("latin-1").decode("utf-8")`, or the export once more.
    Wrong when: the rows are about encodings.
    Source: llama.cpp#7062 (escaped line breaks); ratio 13 (measured).
    """
    signals, chats = taken_over(subject, "F37"), chats_of(subject)
    texts = [" ".join(str(m["content"]) for m in chat) for chat in chats]
    damaged = [text for text in texts if "\ufffd" in text or is_mojibake(text)]
    if signals or len(damaged) < max(3, SOME * len(texts)):
        return signals
    says = f"{len(damaged):,} of {len(texts):,} chats have text of a wrong encoding"
    return [Signal("F37", "measured", says, 0.85, {"chats": len(damaged)},
                   fix="read it again as UTF-8: text.encode('latin-1').decode('utf-8')")]  # fmt: skip


def is_mojibake(text: str) -> bool:
    """Whether some of the text becomes shorter and still valid when it is taken for UTF-8 read as Latin-1."""
    for match in _MOJIBAKE.finditer(text):
        around = re.sub(r"[^\x00-\xff]", "", text[max(0, match.start() - 2) : match.end() + 2])
        try:
            if len(around.encode("latin-1").decode("utf-8", "ignore")) < len(around) and match[0].encode(
                "latin-1"
            ).decode("utf-8"):
                return True
        except UnicodeError:
            continue
    return False


@rule("F38", probes=("P10",))
def misaligned_answers(subject: Subject) -> list[Signal]:
    """F38: answers do not belong to their prompts.

    Sees: rare words of prompts that answers of the next or previous row repeat, more often than their own; or answers
    that take up such words all over the data, and of their own prompt no more than chance gives (shuffled). Probe P10
    asks the model: with another row's prompt the loss is the same, or lower.
    Why: the loss flattens above what can be reached; answers are fluent and beside the point.
    Not: F64, where another rate helps; F35, whose answers are all alike; F26, where prompts are gone.
    Fix: prompts and answers joined again, by a key.
    Wrong when: answers do not depend on their prompts by nature, or answers are other rows' prompts by nature
    (translation in both directions).
    Source: ratio 4.2 at the first loss; invisible in a small model's curve (measured).
    """
    signals = taken_over(subject, "F38")
    found = alignment_of(_asked_and_answered(chats_of(subject)))
    if signals or found is None:
        return signals
    says = f"{found.linked} of {found.rows} answers take up a rare word of some prompt, {found.own} of their own one"
    says += f" (chance: {found.by_chance:.0f})"
    numbers = {"rows": found.rows, "linked": found.linked, "own": found.own, "by_chance": found.by_chance}
    if found.is_shuffled:
        fix = "join prompts and answers again, by a key"
        return [Signal("F38", "measured", says, SHUFFLED, numbers, fix=fix)]
    return [Signal("F38", "measured", says, 0.85, numbers, against=True)] if found.is_whole else []


def _asked_and_answered(chats: Sequence[Sequence[dict[str, Any]]]) -> list[tuple[str, str]]:
    """What was said before the last answer, and that answer."""
    said = ([str(m["content"]) for m in chat if m["role"] not in ("system", "developer")] for chat in chats)
    return [("\n".join(texts[:-1]), texts[-1]) for texts in said if len(texts) > 1]


@rule("F39")
def duplicates(subject: Subject) -> list[Signal]:
    """F39: the same rows stand in the data many times.

    Sees: rows with equal ids, or equal chats.
    Why: they are learned by heart, fewer different rows are left than it seems, and held-out rows have twins.
    Not: F46, many passes over different rows; F41, where loader workers repeat what the file has once; rows made from
    one pattern, which are alike by nature.
    Fix: duplicates removed before the split.
    Wrong when: rows are weighted by repetition.
    Source: guides on deduplication.
    """
    signals = taken_over(subject, "F39")
    rows = examples_of(subject) if subject.train else []
    keys = [row.input_ids.tobytes() for row in rows] or [repr(chat) for chat in chats_of(subject)]
    again = len(keys) - len(set(keys))
    if signals or again < max(3, 0.2 * len(keys)):
        return signals
    says = f"{again:,} of {len(keys):,} rows repeat an earlier one"
    return [Signal("F39", "measured", says, 0.8, {"again": again}, fix="remove duplicates before the split")]


@rule("F40", needs=("settings",))
def sorted_rows(subject: Subject) -> Signal | None:
    """F40: rows are sorted and are trained on in that order.

    Sees: a sampler that does not shuffle, and rows whose place says how long they are or what they answer; batches
    whose rows follow the file.
    Why: a step-like, periodic loss; the model ends biased to the last part of the file.
    Not: sorted files under a sampler that shuffles, which Trainer does by default: the sampler counts, not the file;
    F77, which repeats rows after a resumption only.
    Fix: shuffle.
    Wrong when: a curriculum is meant.
    Source: Karpathy's recipe; 1.94 instead of 1.72 (measured).
    """
    get = subject.settings.get
    if is_ours(subject) or get("shuffle") is not False:
        return None
    rows = examples_of(subject)
    if len(rows) < 20:
        return None
    what, found = order_of(subject)
    if found < SORTED:
        return None
    says = f"rows are not shuffled, and their place in the file follows {what} (rank correlation {found:.2f})"
    return Signal("F40", "measured", says, 0.85, {"correlation": found}, fix="shuffle: true")


def order_of(subject: Subject) -> tuple[str, float]:
    """What the order of the rows follows most, and its rank correlation with their place, without sign."""
    rows, answers = examples_of(subject), answers_of(chats_of(subject))
    length = np.array([len(row.input_ids) for row in rows], float)
    learned = np.array([int(row.supervised.sum()) for row in rows], float)
    first = np.array([int(row.input_ids[row.supervised][0]) if row.supervised.any() else -1 for row in rows], float)
    keys = {"their length": length, "the length of their answers": learned, "how their answers begin": first}
    if len(answers) == len(rows):
        keys["their answers"] = np.unique(answers, return_inverse=True)[1].astype(float)
    found = {what: abs(_rank_correlation(values)) for what, values in keys.items()}
    if len(answers) == len(rows):
        found["their answers"] = max(found["their answers"], _run_share(answers))
    best = max(found, key=lambda what: found[what])
    return best, found[best]


def _rank_correlation(values: np.ndarray) -> float:
    _, ranks, counts = np.unique(values, return_inverse=True, return_counts=True)
    if len(counts) < 3:
        return 0.0
    middle = (np.cumsum(counts) - (counts - 1) / 2)[ranks]
    return float(np.corrcoef(middle, np.arange(len(values)))[0, 1])


def _run_share(answers: list[str]) -> float:
    """How many of the repeated answers stand next to one of their own: near 1 only where the file is grouped by
    them."""
    counts = Counter(answers)
    repeated = sum(count - 1 for count in counts.values())
    neighbours = sum(a == b for a, b in itertools.pairwise(answers))
    expected = sum((count / len(answers)) ** 2 for count in counts.values())
    enough = repeated >= 0.5 * len(answers) and len(counts) >= 2 and expected < 0.5
    return neighbours / repeated if enough else 0.0


@rule("F41", needs=("settings",))
def repeated_by_workers(subject: Subject) -> Signal | None:
    """F41: every loader worker reads all of the data.

    Sees: rows that come N times in the batches and once in the data, with N workers; a run of N times the planned
    steps.
    Why: an epoch is N times as long, and rows are learned by heart.
    Not: F39, where the file repeats them; several epochs.
    Fix: the iterable data set sharded by worker (`get_worker_info`).
    Wrong when: rows are repeated on purpose.
    Source: datasets#3423, pytorch#30599.
    """
    workers = setting(subject, "dataloader_num_workers") or 0
    if is_ours(subject) or workers < 2:
        return None
    fix = "shard the iterable data set by worker (torch.utils.data.get_worker_info), or dataloader_num_workers: 0"
    seen = [row.input_ids.tobytes() for batch in subject.batches for row in rows_of(batch)]
    own = [row.input_ids.tobytes() for row in subject.train]
    again = 1 - len(set(seen)) / len(seen) if seen else 0.0
    if len(seen) >= 8 and again >= 0.4 and (not own or len(set(own)) > 0.9 * len(own)):
        says = f"{again:.0%} of the rows in the batches repeat an earlier one, with {workers:.0f} workers"
        return Signal("F41", "invariant", says, 0.9, {"again": again, "workers": workers}, fix=fix)
    is_stream = subject.settings.get("iterable") is True or subject.settings.get("streaming") is True
    total, planned = planned_steps(subject), steps_of_epochs(subject)
    if total and planned and abs(total / planned / workers - 1) < 0.1:
        says = f"the run has {total:,} steps where its rows make {planned:,}, with {workers:.0f} workers"
        return Signal("F41", "measured", says, 0.8, {"steps": total, "planned": planned}, fix=fix)
    if is_stream and subject.settings.get("sharded") is False:
        says = f"an iterable data set is read by {workers:.0f} workers and not sharded"
        return Signal("F41", "invariant", says, 0.85, {"workers": workers}, fix=fix)
    return None


@rule("F42", probes=("P11",))
def long_tail(subject: Subject) -> Signal | None:
    """F42: a few very long rows decide the peak of memory, at a late step.

    Sees: a longest row that is many times the 95th percentile, together with an out-of-memory error after the first
    steps, or with a card that the other rows fit into and the longest does not.
    Why: the run crashes at whichever step the row comes.
    Not: F71 and F72, which crash at once; a leak, which grows at constant length.
    Fix: `max_length` at the 95th or 99th percentile, and the longest batch tried first.
    Wrong when: something else took the memory.
    Source: litgpt#159, LlamaFactory#3668, transformers#11388.
    """
    lengths = row_lengths(subject)
    limit = setting(subject, "max_length")
    if is_ours(subject) or len(lengths) < 20:
        return None
    if limit:
        lengths = np.minimum(lengths, limit)
    usual, longest = float(np.quantile(lengths, 0.95)), float(lengths.max())
    ratio = longest / max(usual, 1)
    fix, numbers = f"max_length: {int(-(-usual * 1.25 // 64) * 64)}", {"longest": longest, "p95": usual}
    if out_of_memory(subject) is not None and last_step(subject) > 3 and ratio > 2:
        says = (
            f"the memory ran out after step {last_step(subject):,}; the longest row has {longest:,.0f} tokens, 95 % of"
        )
        return Signal("F42", "measured", f"{says} them at most {usual:,.0f}", 0.85, numbers, fix=fix)
    if ratio > 2 and tail_decides(subject):
        says = f"the longest row has {longest:,.0f} tokens and does not fit; 95 % have at most {usual:,.0f} and do"
        return Signal("F42", "measured", says, 0.8, numbers, fix=fix)
    if ratio < LONG_TAIL:
        return None
    says = f"the longest row has {longest:,.0f} tokens, {ratio:.0f} times the 95th percentile"
    return Signal("F42", "measured", says, 0.45, numbers, fix=fix)
