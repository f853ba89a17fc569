"""Templates that strip: what of the source is put into the macro, and that it strips all white space where texts are bytes.

llama.cpp's Jinja has bytes for characters and strips ASCII. Here it is Jinja with a template and texts whose characters
are the bytes of UTF-8 (Latin-1 reads them so); `pytest -m export` asks llama.cpp itself.
"""

from __future__ import annotations

import copy
import re
import sys
from typing import Any

import jinja2
import pytest
import transformers
from tiny import CHATML, save_tokenizer
from tokenizers import normalizers

from solotune.dataset.chat.template import Messages, render_chat
from solotune.exporters import engine_template as module
from solotune.exporters.engine_template import (
    ASCII_WHITE_SPACE,
    MACRO,
    WHITE_SPACE,
    composes,
    engine_template,
    with_macros,
)
from solotune.exporters.nfc_template import with_nfc

SIDES = {"strip": "true, true", "lstrip": "true, false", "rstrip": "false, true"}
TEXTS = [
    "",
    " x ",
    "\u00a0x",
    "x\u2003\u3000\n",
    "\u2028é \u0085",
    "\x1c\x1fa b\u00a0c\u1680",
    " \u3000\u00a0\u205f ",
    "\u2029é\u00a9",
]


def test_all_white_space_is_known() -> None:
    every = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()]
    assert sorted(WHITE_SPACE + ASCII_WHITE_SPACE) == every


@pytest.mark.parametrize(
    ("expression", "wrapped"),
    [
        ("x | trim", "[x | trim]"),
        ("'<' + m['content']|trim + '>'", "'<' + [m['content']|trim] + '>'"),
        ("a.b[0].c | upper | trim", "[a.b[0].c | upper | trim]"),
        ("f(x)(y) | replace('a', z | trim) | trim", "[f(x)(y) | replace('a', [z | trim]) | trim]"),
        ("(x | trim ~ y) | trim", "[([x | trim] ~ y) | trim]"),
        ("not (x) | trim", "not [(x) | trim]"),
        ("x if (y) | trim else z", "x if [(y) | trim] else z"),
        ("x.strip()", "[x.strip()]"),
        ("x.split('a')[-1].lstrip() + y.rstrip()", "<x.split('a')[-1].lstrip()> + {y.rstrip()}"),
        ("' a ' | trim", "[' a ' | trim]"),
        ("x.strip('\\n')", None),
        ("x | trim('a')", None),
        ("x is defined | trim", None),
        ("trim", None),
        ("'x | trim'", None),
    ],
)  # fmt: skip
def test_what_strips_is_put_into_the_macro(expression: str, wrapped: str | None) -> None:
    source = f"x | trim {{# y | trim #}}{{% if {expression} %}}a{{% endif %}}\n\n{{{{- {expression} -}}}} b.strip()\n"
    changed = with_macros(source)
    if wrapped is None:
        assert changed == source
        return
    for brackets, sides in zip(("[]", "<>", "{}"), SIDES.values(), strict=True):
        call = re.compile(re.escape(f"{MACRO}(") + r"((?:(?!strip_white_space).)*?), " + sides + r"\)")
        while call.search(changed):
            changed = call.sub(lambda found, b=brackets: f"\ufdd0{b[0]}{found[1]}{b[1]}", changed, count=1)
    body = changed.replace("\ufdd0", "").rpartition("{%- endmacro -%}\n")[2]
    assert body == source.replace("{% if " + expression, "{% if " + wrapped).replace(
        "{{- " + expression, "{{- " + wrapped
    )


def test_a_template_that_jinja_cannot_read_stays_as_it_is() -> None:
    for source in ("{{ x | trim }}{{ ' }}", "{{ x | trim }}\r\n"):
        assert with_macros(source) == source


@pytest.mark.parametrize("way", SIDES)
def test_the_macro_strips_what_python_strips_also_where_texts_are_bytes(way: str) -> None:
    source = with_macros(f"{{{{- '<' + text.{way}() + '>' -}}}}")
    in_bytes = source.encode().decode("latin-1")
    in_bytes = re.sub(r"\.([lr]?strip)\(\)", lambda found: f".{found[1]}({ASCII_WHITE_SPACE!r})", in_bytes)
    for text in TEXTS:
        expected = f"<{getattr(text, way)()}>"
        assert jinja2.Template(source).render(text=text) == expected
        given = jinja2.Template(in_bytes).render(text=text.encode().decode("latin-1"))
        assert given.encode("latin-1").decode() == expected


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_variables_that_llama_cpp_defines_are_what_they_are_in_training(tokenizer: Any) -> None:
    """Its server tells a template today's date; Llama 3.1 was trained with another."""
    dated = "{% if not date_string is defined %}{% set date_string = '26 \"Jul\" 2024' %}{% endif %}{{ date_string }}"
    tokenizer.chat_template = dated
    written = engine_template(tokenizer)
    assert written == f'{{%- set date_string = "26 \\"Jul\\" 2024" -%}}{dated}'
    tokenizer.chat_template = "{{ strftime_now('%d') }}" + dated
    assert engine_template(tokenizer) == tokenizer.chat_template
    tokenizer.chat_template = "{{ date_string }}"
    assert engine_template(tokenizer) == tokenizer.chat_template


def test_the_template_of_a_tokenizer_that_composes_does_so_too(tokenizer: Any) -> None:
    """In training's own engine, where the tokenizer does it, the text stays as it is."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = CHATML
    for other in (None, normalizers.NFKC(), normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])):
        own.backend_tokenizer.normalizer = other
        assert not composes(own) and engine_template(own) == CHATML
    for nfc in (normalizers.NFC(), normalizers.Sequence([normalizers.NFC()])):
        own.backend_tokenizer.normalizer = nfc
        assert engine_template(own) == with_nfc(CHATML) != CHATML
    asked: Messages = [{"role": "user", "content": "e\u0301 \u1112\u1161"}]
    assert render_chat(own, asked, template=engine_template(own)) == render_chat(own, asked)


def test_a_change_that_training_would_see_is_not_made(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer.chat_template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | trim }}")
    assert engine_template(tokenizer) == with_macros(tokenizer.chat_template) != tokenizer.chat_template
    monkeypatch.setattr(module, "_MACRO", f"{{%- macro {MACRO}(text, left, right) -%}}y{{%- endmacro -%}}\n")
    assert engine_template(tokenizer) == tokenizer.chat_template
