"""S8, characters: damaged and hidden characters are found; those that a script needs are not reported."""

from __future__ import annotations

import pytest

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
