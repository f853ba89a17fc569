"""The macro that composes characters, against Python's own NFC, where texts are bytes as in llama.cpp.

Jinja gets a template and texts whose characters are the bytes of UTF-8 (Latin-1 reads them so); `pytest -m export` asks
llama.cpp itself.
"""

from __future__ import annotations

import random
import sys
import unicodedata

import jinja2
import pytest

from solotune.exporters.nfc_template import CODES, MOST_MARKS, MOST_ROUNDS, _pairs, nfc_macros, with_nfc

ENGINE = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
TEXTS = {
    "another form": "\u212b \u2126\u0301 \u1fef \uf900 \u0344 \u03b9\u0344 \U0002f81a \u0958",
    "a mark": "e\u0301 A\u030a c\u0327 >\u0338 =\u0338 \u304b\u3099 \u05d3\u05bc \u1025\u102e",
    "two marks": "a\u0302\u0301 \u03b1\u0313\u0301\u0345 \u01b0\u0309\u0323 \u00e2\u0323 s\u0307\u0323",
    "order": "o\u0302\u0323 \u00f4\u0323 q\u0307\u0323 \u0628\u0651\u064e \u05e9\u05bc\u05c1\u05b8 \u0e01\u0e48\u0e38",
    "past a mark that stays": "o\u0321\u0301 \u00e9\u0321\u0323 a\u0316\u0316\u0301 \u1e69\u0316\u0327",
    "not past one of its class": "o\u0311\u0301\u0300 a\u0351\u0301 a\u0327\u0328",
    "signs without a class": "\u0cc6\u0cc2\u0cd5 \u0dd9\u0dcf\u0dca \u0dd9\u0dca\u0dcf \U00011131\U00011127 \u09c7\u0301\u09be",
    "hangul": "\u1112\u1161\u11ab\u1100\u1173\u11af \uac00\u11a8 \uac01\u11a8 \u1100\u1100\u1161 \u1161\u11a8 \u1112\u1175\u11c2x",
    "marks alone": "\u0301\u0327 \u3099\n\u0338",
    "nothing": "plain, déjà vu, 你好, 안녕, ひらがな, 👋🏽 ❤️, \u0915\u093c नमस्ते สวัสดี",
}  # fmt: skip


def in_bytes(source: str) -> jinja2.Template:
    return ENGINE.from_string(source.encode().decode("latin-1"))


@pytest.fixture(scope="module")
def composing() -> jinja2.Template:
    return in_bytes(with_nfc("{{ text }}\n"))


def composed(template: jinja2.Template, text: str) -> str:
    return template.render(text=text.encode().decode("latin-1")).encode("latin-1").decode()


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_composed(name: str, composing: jinja2.Template) -> None:
    assert ascii(composed(composing, TEXTS[name])) == ascii(unicodedata.normalize("NFC", TEXTS[name]))


def test_any_sequence_is_composed(composing: jinja2.Template) -> None:
    """Letters, marks and syllables that have something to do with each other, in random order."""
    draw, pairs = random.Random(0), list(_pairs().items())
    marks = [chr(code) for code in CODES if unicodedata.combining(chr(code))]
    others = [chr(code) for code in CODES if unicodedata.normalize("NFC", chr(code)) != chr(code)]
    hangul = [chr(code) for code in (0x1100, 0x1112, 0x1161, 0x1175, 0x11A8, 0x11C2, 0xAC00, 0xAC01, 0xD788, 0xD7A3)]
    for _ in range(200):
        whole, (base, mark) = draw.choice(pairs)
        near = [mark, draw.choice([mark for _, (_, mark) in pairs]), draw.choice(marks)]
        start = draw.choice([whole, base, draw.choice(others), "x", ""])
        text = start + "".join(draw.choices(near, k=draw.randint(0, 4))) + "".join(draw.choices(hangul, k=3))
        assert ascii(composed(composing, text)) == ascii(unicodedata.normalize("NFC", text)), ascii(text)


def test_no_other_character_takes_part() -> None:
    beyond = (chr(code) for code in range(CODES[-1] + 1, sys.maxunicode + 1))
    assert not any(unicodedata.combining(one) or unicodedata.decomposition(one) for one in beyond)


def test_piles_of_marks_are_left_and_take_no_time(composing: jinja2.Template) -> None:
    words = [f"e{chr(code)}" for code in range(0x300, 0x301 + MOST_MARKS)]
    assert composed(composing, "".join(words[:-1])) == unicodedata.normalize("NFC", "".join(words[:-1]))
    assert composed(composing, "".join(words)) == "".join(words)
    deep = "e" + "\u0301" * 2 * MOST_ROUNDS + "\u0323"
    assert composed(composing, deep) != unicodedata.normalize("NFC", deep)


@pytest.mark.parametrize("source", ["{{ text }}", "\n {{ text }}\n", "{% if true %}\n  {{ text }}\n\n{% endif %}\n\n"])
def test_where_texts_are_code_points_the_template_renders_as_before(source: str) -> None:
    text = TEXTS["order"] + TEXTS["hangul"]
    before = ENGINE.from_string(source).render(text=text)
    quick = with_nfc(source).replace(
        nfc_macros(), "{%- macro compose_characters(text) -%}{{- text -}}{%- endmacro -%}\n"
    )
    assert ENGINE.from_string(quick).render(text=text) == before
    assert "{%- if 'é' | length == 2 -%}" in nfc_macros()
