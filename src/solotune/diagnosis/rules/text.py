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
"""Half of the rows: what one row may mean, not so many do."""
BAD = 0.1
"""One row in ten, from which damaged text is a fault; fewer are a remark."""
SOME = 0.05
"""One row in twenty."""
FEW = 0.01
"""One row in a hundred: more than texts about the thing itself (mojibake)."""

_MOJIBAKE = re.compile("[\u00c2-\u00f4][\u0080-\u00bf]")
_ENCODINGS = ("latin-1", "cp1252", "cp1251", "cp1250", "mac_roman", "cp437")
"""Encodings for which UTF-8 is often taken: of Windows, of old Macs, of DOS."""


def _pairs(encoding: str) -> str:
    """A pattern for a UTF-8 lead byte and the next byte, decoded with this encoding."""

    def decoded(low: int, high: int) -> str:
        return re.escape(bytes(range(low, high + 1)).decode(encoding, "ignore"))

    return f"[{decoded(0xC2, 0xF4)}][{decoded(0x80, 0xBF)}]"


_SUSPICIOUS = {encoding: re.compile(_pairs(encoding)) for encoding in _ENCODINGS}
_QUOTED = re.compile(r"`[^`]*`|\"[^\"]*\"|'[^']*'")
# a line break as text, but not the beginning of a LaTeX command: \nabla, \neq, \nu, \not, \newline
_LINE_BREAK = re.compile(
    r"\\n(?!abla|eq?\b|u\b|i\b|ot|ew|ode|sub|sup|mid|leq|geq|less|gtr|e?[ws]?arrow|exists|atural|parallel|sim|cong|"
    r"prec|succ|olimits|onumber|oindent|ormal|vdash|[Rr]ightarrow|[Ll]eftarrow)"
)
_LITERAL = re.compile(r"\s*\\*\"(.*?)\\*\"\s*", re.DOTALL)  # the whole text is a string of JSON
_ENTITY = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|#39|#x27|#34);")
_ESCAPED_BY_HTML = re.compile(r"[\"'<>]|&(?!\w+;|#\w+;)")
_CODE_POINT = re.compile(r"(?:(?<=[^\W\d_])|\\+u[0-9a-fA-F]{4})\\+u[0-9a-fA-F]{4}")  # within a word, not named alone

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

    Sees: replacement characters; lines such as `Ã©` or `РџСЂРёРІРµС‚` that become shorter when they are encoded as
    Latin-1, or as another encoding of Windows, Mac or DOS, and decoded as UTF-8; line breaks written as `\\n`, letters
    as `\\u00e9`, quotes as `&quot;`; invisible characters.
    Why: the model learns the damaged text, at a higher loss, and writes it.
    Not: another language: its letters do not become shorter text in this way. Escapes are a fault only where the same
    side of the rows has none of what they stand for (Control: code, JSON and HTML have both). In less than a tenth of
    the rows damaged text is a remark; invisible characters always are.
    Fix: `text.encode("latin-1").decode("utf-8")`, or export the data again.
    Wrong when: the rows are about encodings.
    Source: llama.cpp#7062 (escaped line breaks); the first loss is 13 times the normal one (measured).
    """
    return [found for found in (bad_encoding(facts), hidden_characters(facts)) if found is not None]


_WHAT = {
    "wrong_encoding": "UTF-8 text that was decoded as Latin-1 or another encoding (Ã© for é)",
    "replacement_characters": "characters that could not be decoded (U+FFFD)",
    "escaped_twice": "a literal \\n instead of a line break",
    "escaped_letters": "letters written as \\u00e9",
    "html_entities": "quotes and signs written as HTML (&quot;, &amp;)",
}
_FIXES = {
    "escaped_twice": "replace \\n with line breaks in the data: it was escaped twice (json.dumps of a JSON string)",
    "escaped_letters": "decode the data once more: it was escaped twice (json.dumps of a JSON string)",
    "html_entities": "apply html.unescape to the texts of the data",
}


def bad_encoding(facts: RowFacts) -> Finding | None:
    """Find text that was decoded wrongly, or escaped twice: the kind that most rows have."""
    kinds, total = damaged_rows(facts)
    limits = {"wrong_encoding": FEW, "replacement_characters": FEW}  # one-line code has escapes
    found = {k: rows for k, rows in kinds.items() if is_pattern(len(rows), total, limits.get(k, SOME))}
    if not found:
        return None
    kind, rows = max(found.items(), key=lambda item: len(item[1]))
    return Finding.of(
        "F37",
        "error" if len(rows) >= BAD * total else "warning",
        message=f"{len(rows):,} of {total:,} rows ({percent(len(rows), total)}) contain {_WHAT[kind]}.",
        evidence={**{name: len(r) for name, r in kinds.items()}, "rows": facts.train.places(sorted(rows))},
        fix=_FIXES.get(kind, "export the data again, and read and write it as UTF-8"),
        affected=len(rows) / total,
        is_statistic=kind != "wrong_encoding",
    )


def damaged_rows(facts: RowFacts) -> tuple[dict[str, set[int]], int]:
    """Kind of damage -> rows with it; and the number of rows that were read.

    Correct text in any script does not survive as a whole line what repairs wrong_encoding. Of escapes, a row counts if
    the text has nothing of what they stand for: no line break; no letter beyond ASCII and no quote or sign in nearly
    all texts of its side (of the answers, or of the others).
    """
    kinds: dict[str, set[int]] = {kind: set() for kind in _WHAT}
    once: set[int] = set()
    plain: dict[tuple[str, bool], set[int]] = {}  # (kind, is an answer) -> rows with what the escapes stand for
    escaped: dict[tuple[str, bool], set[int]] = {}
    read: set[int] = set()
    for row, text, is_answer in _texts(facts):
        read.add(row)
        if "\ufffd" in text:
            kinds["replacement_characters"].add(row)
        if not text.isascii() and any(_reads_back(line) for line in text.splitlines()):
            kinds["wrong_encoding"].add(row)
        plain_text = _unquoted(text)
        if "\\n" in text and "\n" not in text and (count := len(_LINE_BREAK.findall(plain_text))):
            (kinds["escaped_twice"] if count >= 2 else once).add(row)
        for kind, escape, stands_for in (
            ("escaped_letters", "\\u" in text and _CODE_POINT.search(plain_text), not text.isascii()),
            ("html_entities", "&" in text and _ENTITY.search(text), _ESCAPED_BY_HTML.search(text)),
        ):
            if escape:
                escaped.setdefault((kind, is_answer), set()).add(row)
            if stands_for:
                plain.setdefault((kind, is_answer), set()).add(row)
    if len(once | kinds["escaped_twice"]) >= MOST * len(read):  # one may be intended, but not one in every row
        kinds["escaped_twice"] |= once
    for (kind, is_answer), rows in escaped.items():
        if len(plain.get((kind, is_answer), ())) < BAD * len(rows):
            kinds[kind] |= rows
    return kinds, len(read)


def _unquoted(text: str) -> str:
    """The text without what it quotes; of one that is a string of JSON as a whole, what is in the quotes."""
    literal = _LITERAL.fullmatch(text) if '"' in text[:4] else None
    return literal[1] if literal else _QUOTED.sub("", text)


def _texts(facts: RowFacts) -> Iterator[tuple[int, str, bool]]:
    """(row, text, whether it is an answer) of every message; for plain text, of a sample of the rows."""
    if not facts.is_chat:
        for row in evenly(range(len(facts.train.rows)), NUM_DECODED):
            yield row, facts.decode(facts.train.rows[row].input_ids), True
    for row in facts.chats:
        for message in facts.train.rows[row].messages:
            yield row, message["content"], message["role"] == "assistant"


def _reads_back(line: str) -> bool:
    """Whether the line becomes shorter and stays valid when it is decoded as UTF-8 from what it was taken for."""
    if line.isascii():
        return False
    for encoding, pair in _SUSPICIOUS.items():
        if not pair.search(line):
            continue
        try:
            gain = len(line) - len(line.encode(encoding).decode("utf-8"))
        except UnicodeError:
            continue
        if gain > (encoding not in ("latin-1", "cp1252")):  # a letter and a sign of the others may be one by chance
            return True
    return False


def hidden_characters(facts: RowFacts) -> Finding | None:
    """Find characters that a reader cannot see or mistakes for others, and that change the tokens of a word.

    Control characters (NUL, escape); overrides of the writing direction; zero-width spaces; words of Latin letters with
    Cyrillic ones that look the same. Not reported: joiners in emoji and Indic scripts, direction marks, zero-width
    spaces of scripts that break lines with them, Cyrillic words, also with a Latin prefix.
    """
    kinds: dict[str, set[int]] = {"control": set(), "bidi": set(), "zero_width": set(), "look_alikes": set()}
    read: set[int] = set()
    for row, text, _ in _texts(facts):
        read.add(row)
        for kind in _hidden_in(text):
            kinds[kind].add(row)
    rows, total = sorted(set().union(*kinds.values())), len(read)
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
        affected=len(rows) / total,
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
    says, share = f"{len(damaged):,} of {len(texts):,} chats have text with a wrong encoding", len(damaged) / len(texts)
    fix = "decode it again as UTF-8: text.encode('latin-1').decode('utf-8')"
    kind, weight = ("measured", 0.85) if share >= BAD else ("remark", 0.3)
    return Signal("F37", kind, says, weight, {"chats": len(damaged)}, fix=fix, affected=share)


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
