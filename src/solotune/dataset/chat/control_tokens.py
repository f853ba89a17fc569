"""Control tokens (`<|im_end|>`, `[INST]`), and their spellings inside the text of a row.

Problem
-------
A tokenizer turns the spelling `<|im_end|>` into the control id wherever it occurs. A row whose user writes `<|im_end|>`
would end a turn, or forge a system message, in the middle of the data. This module keeps such spellings as text: they
become ordinary tokens, and control ids come only from the template.

Method
------
Before rendering, every such spelling in the row's own strings is put between two marks (noncharacters that the row does
not contain); after rendering, the marks are removed and the positions between them are remembered. A row without such a
spelling is not changed, so its ids are by construction those of the plain tokenizer. (transformers has
`sanitize_control_tokens` for this, but not together with offsets or an assistant mask, which training needs.)

Which tokens
------------
All that the tokenizer calls special or uses as bos, eos, pad or unk; and added tokens spelled like markup (`<think>`,
`[TOOL_CALLS]`), which many tokenizers do not call special. Not HTML elements: in Gemma's vocabulary `<table>` is an
ordinary word. In an assistant turn the second kind, and every tag for thinking and tools, stays a token: the model
generates it itself, and templates search for it (Qwen3 cuts the answer at `</think>`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from solotune.dataset.readers.row import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKUP = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_HTML = re.compile(
    r"</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code|p|br|ul|ol|li|a|div"
    r"|span|pre|img|hr)/?>",
    re.IGNORECASE,
)
_ASSISTANTS_OWN = re.compile(r"[<\[]/?[|｜]?/?(think|thought|reason|tool|function|param|arg)", re.IGNORECASE)
# 32 code points that Unicode reserves as "not characters": legal in a string, never in interchanged text
_NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")


@dataclass(frozen=True, slots=True)
class Marks:
    """The two noncharacters around a spelling; chosen per row so that the row's own text has neither."""

    begin: str
    end: str


class ControlTokens:
    """The control tokens of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = tokenizer.added_tokens_decoder
        named = set(tokenizer.all_special_tokens)  # ByT5's eos is not flagged special
        special = {token.content for token in added.values() if token.special or token.content in named}
        # `<s>` is an HTML element too, so "special" is asked first
        markup = {t.content for t in added.values() if _MARKUP.fullmatch(t.content) and not _HTML.fullmatch(t.content)}
        self.spellings = frozenset(special | markup)
        self.ids = frozenset(index for index, token in added.items() if token.content in self.spellings)
        self.pattern = any_of(self.spellings)
        self.in_answers = any_of(token for token in special if not _ASSISTANTS_OWN.match(token))

    def mark(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, Marks | None]:
        """Put marks around every forged control token; returns the same objects and None if there is none."""
        if not any(self._is_in(message, self._of(message)) for message in messages) and not self._is_in(
            tools, self.pattern
        ):
            return messages, tools, None
        marks = Marks(*free_noncharacters(messages, tools)[:2])
        marked = [self._marked(message, self._of(message), marks) for message in messages]
        return marked, self._marked(tools, self.pattern, marks), marks

    def _of(self, message: dict[str, Any]) -> re.Pattern[str]:
        return self.in_answers if message["role"] == "assistant" else self.pattern

    def _is_in(self, value: Any, pattern: re.Pattern[str]) -> bool:
        if isinstance(value, str):
            return pattern.search(value) is not None
        if isinstance(value, dict):
            return any(self._is_in(item, pattern) for pair in value.items() for item in pair)
        return isinstance(value, list) and any(self._is_in(item, pattern) for item in value)

    def _marked(self, value: Any, pattern: re.Pattern[str], marks: Marks) -> Any:
        if isinstance(value, str):
            return pattern.sub(f"{marks.begin}\\g<0>{marks.end}", value)
        if isinstance(value, dict):
            return {
                self._marked(key, pattern, marks): self._marked(item, pattern, marks) for key, item in value.items()
            }
        return [self._marked(item, pattern, marks) for item in value] if isinstance(value, list) else value

    def snapped(self, text: str, position: int) -> int:
        """The position, moved to the beginning of the control token it lies inside of (`<think>`, `<tool_call>`)."""
        tokens = self.pattern.finditer(text)
        return next((token.start() for token in tokens if token.start() < position < token.end()), position)

    def unmark(self, rendered: str, marks: Marks | None) -> tuple[str, list[tuple[int, int]]]:
        """The text without marks, and the character spans `[begin, end)` of forged control tokens in it.

        A template may split a text at a tag that was marked (`content.split('</think>')`) and leave one mark alone;
        a lone mark is dropped.
        """
        if marks is None or (marks.begin not in rendered and marks.end not in rendered):
            return rendered, []
        pieces = re.split(f"{marks.begin}({self.pattern.pattern}){marks.end}|[{marks.begin}{marks.end}]", rendered)
        text, forged, length = [], [], 0
        for number, piece in enumerate(pieces):
            if piece and number % 2:
                forged.append((length, length + len(piece)))
            text.append(piece or "")
            length += len(piece or "")
        return "".join(text), forged


def free_noncharacters(*values: Any) -> list[str]:
    """At least four noncharacters that occur in none of the strings.

    Raises:
        RowError: a row made to contain nearly all of them.
    """
    present = set().union(*(_noncharacters_in(value) for value in values))
    free = [chr(code) for code in range(0xFDD0, 0xFDF0) if chr(code) not in present]
    if len(free) < 4:
        what = "more than 28 of the 32 code points that Unicode reserves as noncharacters"
        raise RowError(f"a row contains {what}", reason=what, change="remove the row")
    return free


def _noncharacters_in(value: Any) -> set[str]:
    if isinstance(value, str):
        return set(_NONCHARACTERS.findall(value))
    if isinstance(value, dict):
        value = [item for pair in value.items() for item in pair]
    return set().union(*map(_noncharacters_in, value)) if isinstance(value, list) else set()


def any_of(spellings: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches the longest of the spellings at a place.

    A trie, because vocabularies have up to 6,000 such tokens (Gemma's `<unused0>` on): a plain alternation would try
    them all at every `<` of the data.
    """
    trie: dict[str, Any] = {}
    for spelling in spellings:
        node = trie
        for character in spelling:
            node = node.setdefault(character, {})
        node[""] = {}
    return re.compile(_as_pattern(trie) if trie else "(?!)")


def _as_pattern(node: dict[str, Any]) -> str:
    branches = [re.escape(character) + _as_pattern(child) for character, child in sorted(node.items()) if character]
    if not branches:
        return ""
    flat_params = branches[0] if len(branches) == 1 and "" not in node else f"(?:{'|'.join(branches)})"
    return flat_params + ("?" if "" in node else "")
