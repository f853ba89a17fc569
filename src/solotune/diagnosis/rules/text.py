"""S8, damaged or hidden characters: F37."""

from __future__ import annotations

import re
from collections.abc import Iterator

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.conversations import chats_of
from solotune.diagnosis.facts.row_arrays import NUM_DECODED, evenly, is_pattern, percent
from solotune.diagnosis.facts.row_facts import RowFacts
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

MOST = 0.5
"""The whole file, not some rows: severity error."""
SOME = 0.05
"""One row in twenty."""
FEW = 0.01
"""One row in a hundred: more than texts about the thing itself (mojibake)."""

_MOJIBAKE = re.compile("[\u00c2-\u00f4][\u0080-\u00bf]")
# a UTF-8 lead byte and the next byte, decoded as Latin-1 or Windows-1252
_SUSPICIOUS = re.compile("[\u00c2-\u00f4][\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]")
# escapes outside of quotes and code: `first line\n\nsecond line` in a text without one real line break
_QUOTED = re.compile(r"`[^`]*`|\"[^\"]*\"|'[^']*'")

# Characters that a reader does not see and the model does. Not joiners (emoji, Persian, Indic), marks of right-to-left
# scripts or form feeds; C1 controls come from mojibake and are reported as that.
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


@rule("F37", needs=("rows",), probes=("P1",))
def damaged_text(facts: RowFacts) -> list[Finding]:
    """F37: the text was decoded with the wrong encoding.

    Sees: replacement characters; pairs such as `Ã©` that become one letter when the text is encoded as Latin-1 and
    decoded as UTF-8; line breaks written as `\\n`; invisible characters.
    Why: the model learns the damaged text, at a higher loss, and writes it.
    Not: another language: its letters do not become shorter text in this way.
    Fix: `text.encode("latin-1").decode("utf-8")`, or export the data again.
    Wrong when: the rows are about encodings.
    Source: llama.cpp#7062 (escaped line breaks); the first loss is 13 times the normal one (measured).
    """
    return [found for found in (bad_encoding(facts), hidden_characters(facts)) if found is not None]


def bad_encoding(facts: RowFacts) -> Finding | None:
    """Find text that was decoded wrongly, or escaped twice.

    Lines that become shorter and stay valid when decoded again (Latin-1 or Windows-1252 to UTF-8): correct text in any
    script does not survive this as a whole line. U+FFFD. A literal `\\n` in a text without a line break, except in code
    and quoted strings, which may contain it.
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
    if len({*once, *kinds["escaped_twice"]}) >= MOST * total:  # one may be intended, but not one in every row
        kinds["escaped_twice"] += once
    limits = {"escaped_twice": SOME}  # one-line code has them
    found = {k: rows for k, r in kinds.items() if is_pattern(len(rows := sorted(set(r))), total, limits.get(k, FEW))}
    if not found:
        return None
    kind, rows = max(found.items(), key=lambda item: len(item[1]))
    what = {
        "read_as_latin1": "UTF-8 text that was decoded as Latin-1 (Ã© for é)",
        "replacement_characters": "characters that could not be decoded (U+FFFD)",
        "escaped_twice": "a literal \\n instead of a line break",
    }[kind]
    return Finding.of(
        "F37",
        "warning",
        message=f"{len(rows):,} of {total:,} rows ({percent(len(rows), total)}) contain {what}.",
        evidence={**{name: len(set(r)) for name, r in kinds.items()}, "rows": facts.train.places(rows)},
        fix="replace \\n with line breaks in the data: it was escaped twice (json.dumps of a JSON string)"
        if kind == "escaped_twice"
        else "export the data again, and read and write it as UTF-8",
    )


def _texts(facts: RowFacts) -> Iterator[tuple[int, str]]:
    """(row, text) of every message; for plain text, of every row."""
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


def hidden_characters(facts: RowFacts) -> Finding | None:
    """Find characters that a reader cannot see or mistakes for others, and that change the tokens of a word.

    Control characters (NUL, escape); overrides of the writing direction; zero-width spaces; words of Latin letters with
    Cyrillic ones that look the same. Not reported: joiners in emoji and Indic scripts, direction marks, zero-width
    spaces of scripts that break lines with them, Cyrillic words, also with a Latin prefix.
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
        "zero_width": "zero-width spaces or similar",
        "look_alikes": "words that mix Latin and look-alike Cyrillic letters",
    }
    found = "; ".join(f"{words[kind]} in {len(rows):,}" for kind, rows in kinds.items() if rows)
    return Finding.of(
        "F37",
        "warning" if is_pattern(len(rows), total, FEW) else "info",
        slug="hidden-characters",
        message=f"{len(rows):,} of {total:,} rows contain invisible or look-alike characters: {found}.",
        evidence={**{kind: len(rows) for kind, rows in kinds.items()}, "rows": facts.train.places(rows)},
        fix="look at these rows (`solotune data --show` prints such characters as \ufffd), and remove the characters, "
        "or the rows",
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


@rule("F37", otherwise=True)
def chats_of_a_wrong_encoding(run_facts: RunFacts) -> Signal | None:
    """F37, of conversations that could not be rendered."""
    texts = [" ".join(str(m["content"]) for m in chat) for chat in chats_of(run_facts)]
    damaged = [text for text in texts if "\ufffd" in text or is_mojibake(text)]
    if len(damaged) < max(3, SOME * len(texts)):
        return None
    says = f"{len(damaged):,} of {len(texts):,} chats have text with a wrong encoding"
    fix = "decode it again as UTF-8: text.encode('latin-1').decode('utf-8')"
    return Signal("F37", "measured", says, 0.85, {"chats": len(damaged)}, fix=fix)


def is_mojibake(text: str) -> bool:
    """Whether part of the text becomes shorter and stays valid when encoded as Latin-1 and decoded as UTF-8."""
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
