"""Unicode normalisation (NFC) inside a chat template, for an engine that has none: llama.cpp.

    with_nfc(source)      the template, whose whole text passes a macro that composes characters

The tokenizers of Qwen, OLMo and others compose characters (e + accent -> é) before they split a text; a GGUF file has
no entry for that. But the file's chat template is a program, so it can do it. The macro is NFC for all of Unicode, not
a list of frequent accents:

1. Characters that have another form get it: the sign for Angstrom is A and a ring.
2. Marks are put into canonical order, those inside a composed character too: ô + dot below is o + dot below + ^.
3. Marks are composed with the character before them, class by class. A mark passes those of a lower class that stay.
4. Hangul syllables are computed from their letters.

It works for at most MOST_MARKS different marks in a prompt, and MOST_ROUNDS marks in wrong order on one letter: such
piles of marks are no language, and would take seconds.

In llama.cpp texts are bytes, and its Jinja has neither code points nor an order of strings, so everything is done by
replacing texts in the whole prompt. A filter takes 2 µs there, a loop 35 µs a step. So one chain of filters first asks
whether the prompt has any block of 64 characters that matters (few languages but those of Asia have), and the rest is
in nested tables. In an engine whose texts are code points (transformers) the macro returns the text as it is: there the
tokenizer composes. The macro is plain Jinja, without `break`, which not every reader of GGUF files knows.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import groupby

MACRO = "compose_characters"
CODES = (*range(0xD800), *range(0xE000, 0x30000))
MOST_MARKS, MOST_ROUNDS = 48, 8
WHOLE = {0xE0: 1, 0xF0: 2}  # first byte: of Indic scripts, and of what is beyond 0xFFFF; how many bytes are looked for
CHAIN = 10  # filters in one expression: Python compiles more of them slowly, and no more than 200
FEW, OF_EMOJI = 8, "\ufe20"
"""A block with few characters to compose, or the one in which emoji have U+FE0F: they are looked for one by one."""
LETTERS, VOWELS, TAILS = range(0x1100, 0x1113), range(0x1161, 0x1176), range(0x11A8, 0x11C3)  # of Hangul

_MACROS = """\
{%- macro compose_hangul(text) -%}
{%- set now = namespace(text=text) -%}
{%- set leads = 'ꀀ뀀쀀퀀' -%}
{%- set bytes = '<BYTES>' -%}
{%- set vowels = <VOWELS> -%}
{%- set tails = <TAILS> -%}
{%- for letter in <LETTERS> -%}
{%- if letter in now.text -%}
{%- set first = 44032 + loop.index0 * 588 -%}
{%- set composed -%}
{%- for piece in now.text.split(letter) -%}
{%- if loop.index0 == 0 -%}
{{- piece -}}
{%- elif piece[0:3] in vowels -%}
{%- set code = first + vowels[piece[0:3]] * 28 + tails.get(piece[3:6], 0) -%}
{{- <SYLLABLE> ~ piece[(6 if piece[3:6] in tails else 3):] -}}
{%- else -%}
{{- letter ~ piece -}}
{%- endif -%}
{%- endfor -%}
{%- endset -%}
{%- set now.text = composed -%}
{%- endif -%}
{%- endfor -%}
{%- for tail, number in tails.items() if tail in now.text -%}
{%- for code in range(44032, 55204, 28) -%}
{%- set open = <SYLLABLE> ~ tail -%}
{%- if open in now.text -%}
{%- set code = code + number -%}
{%- set now.text = now.text | replace(open, <SYLLABLE>) -%}
{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{{- now.text -}}
{%- endmacro -%}
{%- macro order_marks(text, marks) -%}
{%- set now = namespace(text=text, before='') -%}
{%- for round in range(<ROUNDS>) -%}
{%- if now.text != now.before -%}
{%- set now.before = now.text -%}
{%- for high in marks -%}
{%- for low in marks[loop.index:] if low[0] and low[0] < high[0] and high[1] ~ low[1] in now.text -%}
{%- set now.text = now.text | replace(high[1] ~ low[1], low[1] ~ high[1]) -%}
{%- endfor -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{{- now.text -}}
{%- endmacro -%}
{%- macro compose_marks(text, found) -%}
{%- set now = namespace(text=text, before='', found=found, names='', classes=[], lowest=255, is_passed=false) -%}
{%- for one in found if one[0] -%}
{%- set now.lowest = [now.lowest, one[0]] | min -%}
{%- set now.names = now.names ~ one[1] -%}
{%- endfor -%}
{%- set now.found = now.found | sort(attribute=0, reverse=true) -%}
{%- set now.text = order_marks(now.text, now.found) -%}
{%- set classes = <CLASSES> -%}
{%- set pairs = <PAIRS> -%}
{%- for round in range(<ROUNDS>) -%}
{%- if now.text != now.before -%}
{%- set now.before = now.text -%}
{%- for size, block, listed in pairs if block[0:size] in now.text -%}
{%- for mark, those in listed.items() if classes[mark] > now.lowest -%}
{%- for one in those.split(' ') if one[0:size + 1] in now.text -%}
{%- for low in now.found if low[0] and low[0] < classes[mark] and one[0:size + 1] ~ low[1] in now.text -%}
{%- set now.text = now.text | replace(one[0:size + 1] ~ low[1], one[size + 1:] ~ low[1] ~ mark) -%}
{%- if mark not in now.names -%}
{%- set now.names = now.names ~ mark -%}
{%- set now.found = now.found + [[classes[mark], mark]] -%}
{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{%- endfor -%}
{%- endfor -%}
{%- if now.text != now.before -%}
{%- set now.found = now.found | sort(attribute=0, reverse=true) -%}
{%- set now.text = order_marks(now.text, now.found) -%}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- for one in now.found if one[1] in classes and one[0] not in now.classes -%}
{%- set now.classes = now.classes + [one[0]] -%}
{%- endfor -%}
{%- for class in now.classes | sort -%}
{%- set here = namespace(marks=[], lower=[]) -%}
{%- for one in now.found -%}
{%- if one[0] == class and one[1] in classes -%}
{%- set here.marks = here.marks + [[-1, one[1]]] -%}
{%- elif one[0] and one[0] < class and one[1] in now.text -%}
{%- set here.lower = here.lower + [one] -%}
{%- endif -%}
{%- endfor -%}
{%- if here.lower -%}
{%- set now.is_passed = true -%}
{%- set now.text = order_marks(now.text, here.lower + here.marks) -%}
{%- endif -%}
{%- set now.before = '' -%}
{%- for round in range(<ROUNDS>) -%}
{%- if now.text != now.before -%}
{%- set now.before = now.text -%}
<COMPOSE>
{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{{- order_marks(now.text, now.found) if now.is_passed else now.text -}}
{%- endmacro -%}
{%- macro compose_characters(text) -%}
{%- set now = namespace(text=text, marks=[], rest=text) -%}
{%- if 'é' | length == 2 -%}
<GATE>
{%- endif -%}
{%- if now.rest | length != text | length -%}
{%- for lead, cut, size, blocks in <OTHERS> if lead[0:cut] in now.text -%}
{%- for block in blocks if block[0:size] in now.text -%}
{%- for one in block.split(' ') -%}
{%- set now.text = now.text | replace(one[0:size + 1], one[size + 1:]) -%}
{%- endfor -%}
{%- endfor -%}
{%- endfor -%}
{%- for lead, cut, size, blocks in <MARKS> if lead[0:cut] in now.text -%}
{%- for block in blocks if block[0:size] in now.text -%}
{%- for one in block.split(' ') if one[0:size + 1] in now.text -%}
{%- set now.marks = now.marks + [[one[size + 1:] | int, one[0:size + 1]]] -%}
{%- endfor -%}
{%- endfor -%}
{%- endfor -%}
{%- if now.marks and now.marks | length <= <MOST> -%}
{%- set now.text = compose_marks(now.text, now.marks) -%}
{%- endif -%}
{%- if 'ᅡ'[0:2] in now.text or 'ᆨ'[0:2] in now.text or 'ᇀ'[0:2] in now.text -%}
{%- set now.text = compose_hangul(now.text) -%}
{%- endif -%}
{%- endif -%}
{{- now.text -}}
{%- endmacro -%}
"""
_SYLLABLE = (
    "leads[((code / 4096) | int) * 3 - 30:((code / 4096) | int) * 3 - 29] ~ "
    "bytes[(((code / 64) | int) % 64) * 2 + 1:(((code / 64) | int) % 64) * 2 + 2] ~ "
    "bytes[(code % 64) * 2 + 1:(code % 64) * 2 + 2]"
)
"""The three bytes of a code point."""


def with_nfc(source: str) -> str:
    """A chat template whose text is composed; the newline at its end, which Jinja drops, is dropped here."""
    end = f"{{% endset %}}{{{{- {MACRO}(prompt_text) -}}}}"
    return nfc_macros() + "{%- set prompt_text %}\n" + source.removesuffix("\n") + end


@cache
def nfc_macros() -> str:
    """The macros with their tables, from Python's own Unicode data."""
    others = {c: unicodedata.normalize("NFD", c) for c in map(chr, CODES) if unicodedata.normalize("NFC", c) != c}
    pairs = _pairs()
    composing = sorted({mark for _, mark in pairs.values()})
    marks = {c: unicodedata.combining(c) for c in map(chr, CODES) if unicodedata.combining(c) or c in composing}
    hangul = map(chr, (*VOWELS, *TAILS))
    tables = {
        "SYLLABLE": _SYLLABLE,
        "BYTES": "".join(map(chr, range(0x400, 0x440))),  # their second bytes are all that follow a first byte
        "VOWELS": _dict(f"'{chr(code)}': {number}" for number, code in enumerate(VOWELS)),
        "TAILS": _dict(f"'{chr(code)}': {number}" for number, code in enumerate(TAILS, 1)),
        "LETTERS": _list(f"'{chr(code)}'" for code in LETTERS),
        "ROUNDS": str(MOST_ROUNDS),
        "MOST": str(MOST_MARKS),
        "CLASSES": _dict(f"'{mark}': {unicodedata.combining(mark)}" for mark in composing),
        "PAIRS": _pair_table(pairs),
        "COMPOSE": _compose(pairs),
        "OTHERS": _table({c: c + form for c, form in others.items()}),
        "MARKS": _table({c: f"{c}{order}" for c, order in marks.items()}),
        "GATE": _gate([*others, *marks, *hangul]),
    }
    made = _MACROS
    for name, table in tables.items():
        made = made.replace(f"<{name}>", table)
    return made


def _pairs() -> dict[str, tuple[str, str]]:
    """Composed characters, and the character and mark that they are made of; without Hangul."""
    found = {}
    for character in map(chr, CODES):
        parts = unicodedata.decomposition(character).split()
        if len(parts) == 2 and "<" not in parts[0] and unicodedata.normalize("NFC", character) == character:
            found[character] = (chr(int(parts[0], 16)), chr(int(parts[1], 16)))
    return found


# --- tables as Jinja reads them


def _dict(entries: Iterable[str]) -> str:
    return "{" + ", ".join(entries) + "}"


def _list(entries: Iterable[str]) -> str:
    return "[" + ", ".join(entries) + "]"


def _blocks(characters: Iterable[str]) -> list[tuple[int, list[str]]]:
    """Characters by block of 64: those that differ in their last byte alone, and how many bytes are before it."""
    by_block = groupby(sorted(characters), key=lambda character: character.encode()[:-1])
    return [(len(block), list(those)) for block, those in by_block]


def _table(entries: dict[str, str]) -> str:
    """Entries by their first bytes, then by block."""
    by_lead = groupby(_blocks(entries), key=lambda block: block[1][0].encode()[: max(1, block[0] - 1)])
    rows = []
    for lead, those in by_lead:
        blocks = list(those)
        texts = [f"'{' '.join(entries[character] for character in characters)}'" for _, characters in blocks]
        rows.append(f"['{blocks[0][1][0]}', {len(lead)}, {blocks[0][0]}, {_list(texts)}]")
    return _list(rows)


def _pair_table(pairs: dict[str, tuple[str, str]]) -> str:
    """For each block of composed characters: by mark, each with the character that it is made of."""
    rows = []
    for size, block in _blocks(pairs):
        by_mark: dict[str, list[str]] = {}
        for character in block:
            base, mark = pairs[character]
            by_mark.setdefault(mark, []).append(character + base)
        listed = _dict(f"'{mark}': '{' '.join(those)}'" for mark, those in by_mark.items())
        rows.append(f"[{size}, '{block[0]}', {listed}]")
    return _list(rows)


def _compose(pairs: dict[str, tuple[str, str]]) -> str:
    """Compose the marks of `class`: of each that is there, all characters at once."""
    by_mark: dict[str, list[str]] = {}
    for character, (base, mark) in pairs.items():
        by_mark.setdefault(mark, []).append(f"|replace('{base}{mark}','{character}')")
    by_class: dict[int, list[str]] = {}
    for mark, filters in by_mark.items():
        lines = [f"{{%- if '{mark}' in now.text -%}}", *_chained("now.text", filters), "{%- endif -%}"]
        by_class.setdefault(unicodedata.combining(mark), []).extend(lines)
    rows = [[f"{{%- if class == {order} -%}}", *lines, "{%- endif -%}"] for order, lines in by_class.items()]
    return "\n".join(line for lines in rows for line in lines)


def _chained(name: str, filters: list[str]) -> list[str]:
    """Statements that put a variable through all filters."""
    parts = ["".join(filters[at : at + CHAIN]) for at in range(0, len(filters), CHAIN)]
    return [f"{{%- set {name} = {name}{part} -%}}" for part in parts]


def _gate(characters: Sequence[str]) -> str:
    """Takes these characters out of `now.rest`, and others of blocks that have many of them."""
    found: dict[str, None] = {}
    leads: set[bytes] = set()
    for size, block in _blocks(set(characters)):
        if block[0].encode()[0] in WHOLE:
            cut = WHOLE[block[0].encode()[0]]
            if block[0].encode()[:cut] not in leads:
                found[f"'{block[0]}'[0:{cut}]"] = None
            leads.add(block[0].encode()[:cut])
        elif len(block) <= FEW or block[0] == OF_EMOJI:
            found |= {f"'{character}'": None for character in block}
        else:
            found[f"'{block[0]}'[0:{size}]"] = None
    return "\n".join(_chained("now.rest", [f"|replace({one},'')" for one in found]))
