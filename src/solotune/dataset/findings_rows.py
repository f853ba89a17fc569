"""Static rules on what the rows say (S8).

Every rule's docstring says: *Sees*, *Why* it matters, *Not* (its look-alikes, and what tells them apart), *Fix*, and
*Wrong when*.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial

import numpy as np

from solotune.dataset.findings_facts import NUM_DECODED, Facts, Finding, evenly, is_pattern, percent, squeezed
from solotune.dataset.formats import EMPTY_ANSWER

MOST = 0.5
"""The whole file, not some rows: severity error."""
SOME = 0.05
"""One row in twenty."""
FEW = 0.01
"""One row in a hundred: more than somebody's writing about the thing itself (mojibake, placeholders)."""
ENOUGH_ROWS = 10
"""Below that, how often an answer comes says nothing."""
CONSTANT = 0.98
"""Of labels: rare classes make 95 : 5 normal; two rows in a hundred that differ teach nothing."""
OVERUSED = 0.2
"""Of sentences among otherwise free text: one answer in five is boilerplate or a refusal."""
OVERUSED_LABEL = 0.5
"""The same for an answer of a word or three: `unanswerable` is a third of SQuAD 2."""
REPEATED = 0.3
"""Share of (near-)duplicates from which it is told; templated data has many by nature, so it is no warning."""

_WORD = re.compile(r"\w{3,}")
_NUMBER = re.compile(r"(\d+)\D*$")
_PLACEHOLDERS = {"nan", "null", "none", "undefined", "n/a", "#n/a", "<na>", "[]", "{}", "todo", "tbd"}
# a UTF-8 lead byte and what follows it, read as Latin-1 or Windows-1252
_SUSPICIOUS = re.compile("[\u00c2-\u00f4][\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]")
# escapes outside of quotes and code: `first line\n\nsecond line` in a text without one real line break
_QUOTED = re.compile(r"`[^`]*`|\"[^\"]*\"|'[^']*'")

# What a reader of the rows does not see and the model does. Not joiners (emoji, Persian, Indic), not the marks of right
# to left scripts, not form feeds; C1 controls are what mojibake leaves, and told as that.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f]")
_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")
_ZERO_WIDTH = re.compile("[\u200b\u2060-\u2064\ufeff\u180e\U000e0001-\U000e007f]")
_FLAG = re.compile("\U0001f3f4[\U000e0020-\U000e007f]+")  # England, Scotland, Wales
_BREAKS_BY_ZERO_WIDTH = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")  # Thai, Lao, Burmese, Khmer
_LIKE_LATIN = "асеорхуіѕјһԁԛԝАВЕКМНОРСТУХІЅЈ"  # Cyrillic
_MIXED = re.compile(f"[A-Za-z](?:[{_LIKE_LATIN}]|(?<=[{_LIKE_LATIN}][A-Za-z]))")
_MIXED_WORD = re.compile(
    rf"(?<!\w)(?=[a-zA-Z]*[{_LIKE_LATIN}])[A-Za-z{_LIKE_LATIN}]*[A-Za-z][A-Za-z{_LIKE_LATIN}]*(?!\w)"
)

_S8 = partial(Finding, suspect="S8")


def empty_answers(facts: Facts) -> Finding | None:
    """F34: answers that are empty, invisible, or a placeholder of the export (`nan`).

    Sees: rows dropped as empty; answers without a visible character; placeholder words among free-text answers.
    Why: empty rows are dropped, so the data is smaller than it seems; the others teach the model to answer nothing.
    Not: answers cut away by max_length (F25); `none` as a class among few classes; one or two odd rows.
    Fix: the export.
    Wrong when: `null` is a real answer in a file of free text.
    """
    dropped = facts.dropped(EMPTY_ANSWER)
    invisible = [row for row, text in facts.answers if not any(c.isprintable() and not c.isspace() for c in text)]
    folded = [(row, text.strip().casefold()) for row, text in facts.answers]
    is_free = len({text for _, text in folded}) > MOST * len(folded)
    filler = [row for row, text in folded if text in _PLACEHOLDERS] if is_free else []
    found, total = dropped + len(invisible) + len(filler), len(folded) + len(facts.validation.rows) + dropped
    if not is_pattern(len(invisible) + len(filler), len(folded), FEW) and not is_pattern(dropped, total, SOME):
        return None
    return _S8(
        "F34",
        "empty-answers",
        severity="warning",
        message=f"{found:,} of {total:,} rows ({percent(found, total)}) have an empty answer or a placeholder for one.",
        evidence={
            "dropped_as_empty": dropped,
            "invisible": len(invisible),
            "placeholders": len(filler),
            "rows": facts.train.places(invisible + filler),
        },
        fix="look at the export of the answer column; remove these rows if there is nothing to mend",
    )


def constant_answers(facts: Facts) -> Finding | None:
    """F35: one answer stands for nearly all, or for a large part of otherwise different ones.

    Sees: how often the most frequent last answer comes, and how different the others are.
    Why: the loss falls fast and the model gives that answer to every prompt.
    Not: classification: few distinct answers, and no one above 98 %; a short `unanswerable` in up to half of the
    rows; a file of fewer than ten rows.
    Fix: the column, or fewer of these rows.
    Wrong when: one class really is that frequent; then balance it all the same.
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
    return _S8(
        "F35",
        "constant-answers",
        severity="error" if count >= CONSTANT * len(answers) else "warning",
        message=f"{count:,} of {len(answers):,} answers ({percent(count, len(answers))}) are the same: "
        f"{shown.strip()[:60]!r}.",
        evidence={
            "most_frequent": count,
            "answers": len(answers),
            "distinct": len(counts),
            "rows": facts.train.places([row for row, text in answers if text == top]),
        },
        fix="check that the answers come from the right column; else keep only some of these rows",
    )


def broken_turns(facts: Facts) -> Finding | None:
    """F36: turns do not alternate, or the roles are swapped.

    Sees: two user or two assistant turns in a row; rows that begin with the assistant *and* end with the user.
    Why: a turn order that the model never meets in use; with swapped roles the questions are learned. The loss hardly
    tells (ratio 1.3 and 1.8).
    Not: an assistant's greeting first (the row then ends with the assistant); tool calls and results between; a model
    that is to ask questions about a text it is given (the user begins).
    Fix: join the turns, or swap the names.
    Wrong when: chats are logs in which people do send several messages at once.
    Unknown role names never get here: the data door refuses them.
    """
    repeated, swapped = [], []
    for row in facts.chats:
        messages = [m for m in facts.train.rows[row].messages if m["role"] not in ("system", "developer")]
        roles = [m["role"] for m in messages]
        calls = ["tool_calls" in m for m in messages]
        if any(a == b != "tool" and not call for a, b, call in zip(roles, roles[1:], calls, strict=False)):
            repeated.append(row)
        if roles[0] == "assistant" and roles[-1] == "user":
            swapped.append(row)
    total = len(facts.chats)
    if is_pattern(len(swapped), total, MOST):
        message = f"{len(swapped):,} of {total:,} rows begin with the assistant and end with the user."
        return _S8(
            "F36",
            "broken-turns",
            severity="warning",
            message=message + " The roles look swapped.",
            evidence={"rows_with": len(swapped), "rows_read": total, "rows": facts.train.places(swapped)},
            fix="swap the roles user and assistant (or from: human and gpt) in the data",
        )
    if not is_pattern(len(repeated), total, SOME):
        return None
    return _S8(
        "F36",
        "broken-turns",
        severity="warning",
        message=f"{len(repeated):,} of {total:,} rows have two turns of the same role in a row.",
        evidence={"rows_with": len(repeated), "rows_read": total, "rows": facts.train.places(repeated)},
        fix="join neighbouring messages of the same role into one, or look for a turn that was lost between them",
    )


def bad_encoding(facts: Facts) -> Finding | None:
    """F37: text that was decoded wrongly, or escaped twice.

    Sees: lines that become shorter and valid when read back (Latin-1 or Windows-1252 to UTF-8); U+FFFD; a literal
    `\\n` where the text has no line break of its own.
    Why: rare tokens in every row, odd characters in the answers.
    Not: any other language or script: legitimate text does not survive the way back as a whole line; code and quoted
    strings that write `\\n`; one or two rows about encodings.
    Fix: read the source as UTF-8; parse the JSON once more.
    Wrong when: the data teaches about such text.
    """
    kinds: dict[str, list[int]] = {"read_as_latin1": [], "replacement_characters": [], "escaped_twice": []}
    once: list[int] = []
    for row, text in _texts(facts):
        if "\ufffd" in text:
            kinds["replacement_characters"].append(row)
        if _SUSPICIOUS.search(text) and any(_reads_back(line) for line in text.splitlines()):
            kinds["read_as_latin1"].append(row)
        if "\\n" in text and "\n" not in text and (count := len(re.findall(r"\\n", _QUOTED.sub("", text)))):
            (kinds["escaped_twice"] if count >= 2 else once).append(row)
    total = len(facts.train.rows)
    if len({*once, *kinds["escaped_twice"]}) >= MOST * total:  # one may be meant, not one in every row
        kinds["escaped_twice"] += once
    limits = {"escaped_twice": SOME}  # one-line code has them
    found = {k: rows for k, r in kinds.items() if is_pattern(len(rows := sorted(set(r))), total, limits.get(k, FEW))}
    if not found:
        return None
    kind, rows = max(found.items(), key=lambda item: len(item[1]))
    what = {
        "read_as_latin1": "UTF-8 text that was read as Latin-1 (Ã© for é)",
        "replacement_characters": "characters that a decoder could not read (U+FFFD)",
        "escaped_twice": "a literal \\n where a line break was meant",
    }[kind]
    return _S8(
        "F37",
        "bad-encoding",
        severity="warning",
        message=f"{len(rows):,} of {total:,} rows ({percent(len(rows), total)}) contain {what}.",
        evidence={**{name: len(set(r)) for name, r in kinds.items()}, "rows": facts.train.places(rows)},
        fix="replace \\n by line breaks in the data: it was escaped twice (json.dumps of a JSON string)"
        if kind == "escaped_twice"
        else "export the data again, reading and writing it as UTF-8",
    )


def _texts(facts: Facts) -> Iterator[tuple[int, str]]:
    """(row, text) of every message; of rows of plain text, the row."""
    if not facts.is_chat:
        for row in evenly(range(len(facts.train.rows)), NUM_DECODED):
            yield row, facts.decode(facts.train.rows[row].input_ids)
    for row in facts.chats:
        for message in facts.train.rows[row].messages:
            yield row, message["content"]


def _reads_back(line: str) -> bool:
    if not _SUSPICIOUS.search(line):
        return False
    for encoding in ("latin-1", "cp1252"):
        try:
            return len(line.encode(encoding).decode("utf-8")) < len(line)
        except UnicodeError:
            continue
    return False


def hidden_characters(facts: Facts) -> Finding | None:
    """F37: characters that a reader does not see as they are.

    Sees: control characters (NUL, escape); overrides of the writing direction; spaces without width; words of Latin
    letters with Cyrillic ones that look the same.
    Why: the model learns what nobody has read, and such words are other tokens than they seem.
    Not: joiners in emoji and Indic scripts, direction marks, zero-width spaces of scripts that break lines by them,
    Cyrillic words, also with a Latin prefix.
    Fix: removing them, or these rows.
    Wrong when: the data teaches about such text.
    """
    kinds: dict[str, set[int]] = {"control": set(), "bidi": set(), "zero_width": set(), "look_alikes": set()}
    for row, text in _texts(facts):
        for kind in _hidden_in(text):
            kinds[kind].add(row)
    rows, total = sorted(set().union(*kinds.values())), len(facts.train.rows)
    if not rows:
        return None
    words = {
        "control": "control characters",
        "bidi": "overrides of the writing direction",
        "zero_width": "characters without width",
        "look_alikes": "words of Latin and look-alike Cyrillic letters",
    }
    found = "; ".join(f"{words[kind]} in {len(rows):,}" for kind, rows in kinds.items() if rows)
    return _S8(
        "F37",
        "hidden-characters",
        severity="warning" if is_pattern(len(rows), total, FEW) else "info",
        message=f"{len(rows):,} of {total:,} rows have characters that a reader does not see as they are: {found}.",
        evidence={**{kind: len(rows) for kind, rows in kinds.items()}, "rows": facts.train.places(rows)},
        fix="look at these rows (`--show` marks such characters as \ufffd) and remove the characters, or the rows",
    )


def _hidden_in(text: str) -> Iterator[str]:
    if _CONTROL.search(text):
        yield "control"
    if text.isascii():
        return
    if _BIDI.search(text):
        yield "bidi"
    if _ZERO_WIDTH.search(text) and not _BREAKS_BY_ZERO_WIDTH.search(text) and _ZERO_WIDTH.search(_FLAG.sub("", text)):
        yield "zero_width"
    if _MIXED.search(text) and _MIXED_WORD.search(text):
        yield "look_alikes"


def misaligned_answers(facts: Facts) -> Finding | None:
    """F38: the answers belong to the neighbouring rows.

    Sees: how many prompts share a rare word with their own answer, and with the next and the previous row's. Rows of
    one question and one answer, in file order.
    Why: fluent answers to other questions; the loss stops above what is reachable, and the curve does not say why.
    Not: tasks without common words (translation, labels, other scripts): there no neighbour is better either; sorted
    data, where a row's own answer is still the best.
    Fix: the join of the two columns.
    Wrong when: rows answer each other on purpose. Answers shuffled at random are not seen here: probe P10 is needed.
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
    # a third: far from chance for words this rare, and far from what sorted data shows
    if hits[best] < 0.2 * len(pairs) or hits[best] < 3 * hits[0]:
        return None
    return _S8(
        "F38",
        "misaligned-answers",
        severity="error",
        message=f"The answers belong to the {'next' if best == -1 else 'previous'} row's prompts: prompts share rare "
        f"words with {hits[best]:,} answers one row {'before' if best == -1 else 'after'} them and with "
        f"{hits[0]:,} of their own.",
        evidence={
            "rows_compared": len(pairs) - 2,
            "matches_own": hits[0],
            "matches_previous": hits[-1],
            "matches_next": hits[1],
            "rows": [pair[1] for pair in pairs[:3]],
        },
        fix="join prompts and answers again, by an id and not by their order",
    )


def duplicates(facts: Facts) -> Finding | None:
    """F39: the same rows again and again.

    Sees: rows with equal ids (cut to the same beginning by max_length); copies that were removed, near-duplicates.
    Why: the repeated rows are memorised, and fewer different ones are left than it seems.
    Not: several passes over different rows (F46); templated data, whose rows are alike by nature: near-duplicates are
    told and not warned of, nor are copies of fewer than half of the rows.
    Fix: the merge that doubled them.
    Wrong when: rows are weighted by repetition.
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
    if is_pattern(len(same), total, SOME):
        return _S8(
            "F39",
            "duplicates",
            severity="warning",
            message=f"{len(same):,} of {total:,} rows have the same tokens as an earlier row.",
            evidence=evidence,
            fix=f"a longer max_length than {facts.config.max_length} if they only begin alike; else remove the copies",
        )
    whole = report.num_train + report.num_validation + report.num_exact_duplicates
    alike = report.num_exact_duplicates + report.num_near_duplicates
    if not is_pattern(alike, whole, REPEATED):
        return None
    return _S8(
        "F39",
        "duplicates",
        severity="warning" if report.num_exact_duplicates >= MOST * whole else "info",
        message=f"{percent(alike, whole)} of the rows repeat an earlier one: {report.num_exact_duplicates:,} exactly "
        f"(removed), {report.num_near_duplicates:,} nearly (kept, on one side of the split).",
        evidence=evidence,
        fix="nothing if the rows are made from a template; else look for a file that was merged twice",
    )


RULES = (
    empty_answers,
    constant_answers,
    broken_turns,
    bad_encoding,
    hidden_characters,
    misaligned_answers,
    duplicates,
)
