"""S8, characters: damaged and hidden characters are found; those that a script needs are not reported."""

from __future__ import annotations

import json

import pytest

from solotune.diagnosis.rules.text import _reads_back
from tests.diagnosis.rules.rows import Bench, answered, talk


def test_f37_encoding(bench: Bench) -> None:
    french = answered(talk(), lambda n, text: text + " Été à la forêt, déjà “vu”.")
    assert bench.codes(french) == []
    for encoding in ("latin-1", "cp1252"):
        broken = answered(
            talk(), lambda n, text, e=encoding: text + " Été à forêt €".encode().decode(e, "ignore") if n % 4 else text
        )
        assert "Latin-1" in bench.only("F37", broken).message
    assert (
        "U+FFFD" in bench.only("F37", answered(talk(), lambda n, text: text + (" d�j�" if n % 5 == 0 else ""))).message
    )
    escaped = answered(talk(), lambda n, text: text.replace(" ", "\\n", 3))
    assert "line break" in bench.only("F37", escaped).message


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "cp1251", "cp1250", "mac_roman", "cp437"])
@pytest.mark.parametrize("words", ["Été à la forêt", "Größe und Höhe", "Привет, как дела", "Łódź – świętość"])
def test_text_that_was_taken_for_another_encoding(encoding: str, words: str) -> None:
    assert not _reads_back(words)
    try:
        broken = words.encode().decode(encoding)
    except UnicodeError:
        return  # bytes are lost, and no decoding brings them back
    assert _reads_back(broken)


@pytest.mark.parametrize("text", ["И… Да… «Привет» № 5 — всё ещё", "А… О…", "├── foo\t│ bar", "¿Qué? “sí”…", "Ї ґ є»"])
def test_text_that_is_right(text: str) -> None:
    assert not _reads_back(text)


@pytest.mark.parametrize(("every", "severity"), [(2, "error"), (12, "warning")])
def test_f37_is_a_remark_below_one_row_in_ten(bench: Bench, every: int, severity: str) -> None:
    broken = "Größe und Höhe".encode().decode("cp1251")
    rows = answered(talk(60), lambda n, text: f"{text} {n} {broken}" if n % every == 0 else text)
    found = next(f for f in bench.find(rows, validation_size=0) if f.code == "F37")
    assert found.severity == severity and not found.is_statistic and found.affected == 1 / every


ESCAPED = {
    "\\n": lambda text: text.replace(" ", "\\n", 3),
    "&quot;": lambda text: f"&quot;{text}&quot; isn&#39;t R&amp;D",
    "\\u00e9": lambda text: text.replace("e", "\\u00e9"),
}
"""What was escaped once too often."""


@pytest.mark.parametrize("what", ESCAPED)
def test_f37_escapes(bench: Bench, what: str) -> None:
    escaped = answered(talk(), lambda n, text: ESCAPED[what](text))
    found = bench.only("F37", escaped)
    assert what in found.message and found.severity == "error" and found.is_statistic
    both = answered(talk(), lambda n, text: f'{ESCAPED[what](text)}\n{n}: é, "<b>"')
    assert bench.codes(both) == [], "rows that have what the escapes stand for as well are about them"


@pytest.mark.parametrize(
    "line", [r"so \nabla f \neq 0, \nu \notin A and \nabla g \neq 1", 'say "a\\nb\\nc"', "`\\u00e9` and `&amp;`"]
)
def test_f37_code_and_formulas_are_no_escapes(bench: Bench, line: str) -> None:
    assert bench.codes(answered(talk(), lambda n, text: f"{text} {line} don't")) == []


HIDDEN = {
    "control": "a\0b \x1b[31m",
    "bidi": "\u202edrow\u202c",
    "zero_width": "pass\u200bword \ufeff \U000e0041",
    "look_alikes": "p\u0430ypal",  # a Cyrillic a
}


NOT_HIDDEN = {
    "blanks": "\f\v",
    "a joined emoji": "👩\u200d👩\u200d👧",
    "England": "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "Persian": "می\u200cخواهم",
    "Hebrew with marks": "א\u200f\u200e",
    "Thai": "ไทย\u200bไทย",
    "Russian": "это оса и paypal, USB\u0448ный iPhone'\u0430",
    "Greek": "Ελλάδα 5 kΩ",
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_f37_hidden_characters(bench: Bench, kind: str) -> None:
    rows = answered(talk(), lambda n, text: text + (" " + HIDDEN[kind] if n % 5 == 0 else ""))
    found = bench.only("F37", rows)
    assert found.severity == "warning"
    assert [name for name in HIDDEN if found.evidence[name]] == [kind]
    rows = answered(talk(), lambda n, text: text + HIDDEN[kind] * (n == 7))
    one = next(f for f in bench.find(rows, validation_size=0) if f.slug == "hidden-characters")
    assert (one.severity, one.evidence[kind], one.evidence["rows"]) == ("info", 1, ["a.jsonl:8"])


@pytest.mark.parametrize("script", NOT_HIDDEN)
def test_f37_characters_that_scripts_need(bench: Bench, script: str) -> None:
    assert bench.codes(answered(talk(), lambda n, text: f"{text} {NOT_HIDDEN[script]}")) == []


@pytest.mark.parametrize("times", [1, 2])
def test_f37_answers_that_are_strings_of_json(bench: Bench, times: int) -> None:
    def dumped(_: int, text: str) -> str:
        for _ in range(times):
            text = json.dumps(text + "\nà Köln" * (text[0] != '"'))
        return text[1:-1] if times == 2 else text

    assert bench.only("F37", answered(talk(), dumped)).severity == "error"
    as_json = answered(talk(), lambda n, text: json.dumps({"text": text + "\nend", "row": n}))
    assert "F37" not in bench.codes(as_json)  # of a task: the escapes are within its values
