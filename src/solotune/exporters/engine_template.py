"""The chat template for a GGUF file: llama.cpp's Jinja has to make of it what training's makes of the original.

    engine_template(tokenizer)      the source for tokenizer.chat_template

Three things differ between the engines, and all can be written into the template.

Variables   llama.cpp's server defines some that transformers does not: with `date_string`, Llama 3.1 gets today's
            date instead of the one it was trained with. So the template begins by setting them to what they are in
            training.
White space `trim`, `strip()`, `lstrip()` and `rstrip()` take all white space of Unicode away, in llama.cpp the six
            ASCII characters only (it looks at bytes). So each is put into a macro that takes the rest away:
            `x | trim` becomes `strip_white_space(x | trim, true, true)`. Where the engine has stripped all already,
            the macro finds nothing to do: the same template is right in both.

NFC         characters that a tokenizer composes before it splits a text: `nfc_template`.

The macro for white space knows no characters, only lengths: in llama.cpp texts are bytes, in Python code points. It
replaces each white space by as many blanks as it is long, and looks how many of them a plain strip takes away.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from solotune.dataset.chat.template import Messages, render_chat
from solotune.dataset.chat.template_sandbox import TemplateLimitError, TemplateRefusal, TemplateSyntax
from solotune.exporters.nfc_template import with_nfc

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASCII_WHITE_SPACE = " \t\n\r\v\f"
VARIABLES = ("date_string", "tools_in_user_message")
MACRO = "strip_white_space"
WHITE_SPACE = (
    "\x1c\x1d\x1e\x1f\x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
)
"""What Python strips and C's `isspace` does not know."""
_SIDES = {"trim": "true, true", "strip": "true, true", "lstrip": "true, false", "rstrip": "false, true"}
_KEYWORDS = {"and", "or", "not", "in", "is", "if", "else", "elif", "for", "set", "recursive", "with", "call", "filter"}
_OPENING = {")": "(", "]": "[", "}": "{"}
_ALL = ", ".join(f"'{character}'" for character in WHITE_SPACE)
_MACRO = f"""\
{{%- macro {MACRO}(text, left, right) -%}}
{{%- set blanks = '   ' -%}}
{{%- set flat = namespace(text=text) -%}}
{{%- for space in [{_ALL}] -%}}
{{%- set flat.text = flat.text | replace(space, blanks[0:(space | length)]) -%}}
{{%- endfor -%}}
{{%- set rest = flat.text.lstrip() if left else flat.text -%}}
{{%- set begin = (flat.text | length) - (rest | length) -%}}
{{%- set kept = (rest.rstrip() if right else rest) | length -%}}
{{{{- text[begin:begin + kept] -}}}}
{{%- endmacro -%}}
"""
_PROBE: Messages = [{"role": "user", "content": "\u00a0 x\u3000"}]


def engine_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template for llama.cpp.

    A template that writes today's date (`strftime_now`) keeps doing so, there as here.
    """
    source = tokenizer.get_chat_template()
    lines = []
    for name in VARIABLES:
        if name not in source or "strftime_now" in source:
            continue
        shown = f"{source}\ufdd0{{{{ {name} | tojson if {name} is defined else '' }}}}"
        value = render_chat(tokenizer, [{"role": "user", "content": "x"}], template=shown).rpartition("\ufdd0")[2]
        lines += [f"{{%- set {name} = {value} -%}}"] if value else []
    source = "".join(lines) + _if_alike(tokenizer, source, with_macros(source))
    return _if_alike(tokenizer, source, with_nfc(source)) if composes(tokenizer) else source


def _if_alike(tokenizer: PreTrainedTokenizerBase, source: str, changed: str) -> str:
    """The changed source; the one before, if it renders otherwise in training's own engine."""
    if changed == source:
        return source
    try:
        expected, given = (render_chat(tokenizer, _PROBE, template=one) for one in (source, changed))
    except (TemplateRefusal, TemplateSyntax, TemplateLimitError):
        return source
    return changed if given == expected else source


def composes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's normalizer is NFC and nothing else."""
    state = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if state is None:
        return False
    found = json.loads(state.__getstate__())
    return [one["type"] for one in found.get("normalizers", [found])] == ["NFC"]


# --- the source


class _Token(NamedTuple):
    kind: str
    text: str
    begin: int

    @property
    def end(self) -> int:
        return self.begin + len(self.text)


def with_macros(source: str) -> str:
    """Put every expression that strips all white space into the macro; the source as it is if there is none."""
    edits: list[tuple[int, str]] = []
    for tokens in _expressions(source):
        for place in range(1, len(tokens)):
            found = _stripping(tokens, place)
            if found is not None:
                begin, end, sides = found
                edits += [(begin, f"{MACRO}("), (end, f", {sides})")]
    for at, text in sorted(edits, key=lambda edit: edit[0], reverse=True):
        source = source[:at] + text + source[at:]
    return _MACRO + source if edits else source


def _stripping(tokens: list[_Token], place: int) -> tuple[int, int, str] | None:
    """Begin and end of the expression whose `| trim` or `.strip()` is at a token, and its sides; None for others."""
    texts = [token.text for token in tokens[place : place + 4]]
    is_filter = texts[:2] == ["|", "trim"] and texts[2:3] != ["("]
    is_method = len(texts) == 4 and texts[0] == "." and texts[1] in _SIDES and texts[2:] == ["(", ")"]
    first = _operand(tokens, place - 1)
    if not (is_filter or is_method) or first is None:
        return None
    return tokens[first].begin, tokens[place + (1 if is_filter else 3)].end, _SIDES[texts[1]]


def _operand(tokens: list[_Token], last: int) -> int | None:
    """The first token of the operand that ends at a token, as Jinja binds filters; None if that is not clear."""
    at = last
    while at >= 0:
        text = tokens[at].text
        if text in _OPENING:
            at = _opening(tokens, at)
            if at < 1 or text == "}" or not _ends_operand(tokens[at - 1]):
                return at if at >= 0 else None
            at -= 1  # a call, or an index
        elif tokens[at].kind == "name" and text not in _KEYWORDS:
            if at < 2 or tokens[at - 1].text not in (".", "|"):
                return None if at and tokens[at - 1].text in ("is", "not") else at
            at -= 2  # an attribute, or a filter
        else:
            return at if tokens[at].kind == "string" and (at < 1 or tokens[at - 1].kind != "string") else None
    return None


def _opening(tokens: list[_Token], at: int) -> int:
    """The bracket that the one at a token closes; -1 if there is none."""
    depth = 0
    for place in range(at, -1, -1):
        depth += (tokens[place].text in _OPENING) - (tokens[place].text in _OPENING.values())
        if depth == 0:
            return place
    return -1


def _ends_operand(token: _Token) -> bool:
    """Whether a bracket after this token calls or indexes it."""
    return (token.kind == "name" and token.text not in _KEYWORDS) or token.kind == "string" or token.text in _OPENING


def _expressions(source: str) -> list[list[_Token]]:
    """The tokens of each block and each variable of a template, with their places in the source.

    None of a template that Jinja alone cannot read, or with carriage returns: Jinja makes line feeds of them, so places
    would be others.
    """
    import jinja2

    at, tokens, found = 0, list[_Token](), list[list[_Token]]()
    try:
        lexed = list(jinja2.Environment(keep_trailing_newline=True).lex("" if "\r" in source else source))
    except jinja2.TemplateSyntaxError:
        return []
    for _, kind, text in lexed:
        at = source.index(text, at)
        if kind in ("block_end", "variable_end"):
            found.append(tokens)
            tokens = []
        elif kind in ("operator", "name", "string", "integer", "float"):
            tokens.append(_Token(kind, text, at))
        at += len(text)
    return found
