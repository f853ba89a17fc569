"""Thoughts in an answer's text: `<think>...</think>` and the tags that other models write around their reasoning.

    split_thoughts("<think>\\n9 - 1\\n</think>\\n\\n8")    ([Thought("9 - 1", "<think>", "</think>")], ["8"])

A closing tag without an opening one belongs to a prompt that opens the block: then the thought begins with the text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_NAMES = "think|thinking|thoughts?|reason|reasoning|reflection|analysis|scratchpad|seed:think|cot|inner_monologue"
_CLOSING = re.compile(
    rf"</(?:{_NAMES})>|\[/(?:{_NAMES})\]|<\|/(?:{_NAMES})\|>|<\|end_(?:of_)?(?:{_NAMES})\|>|◁/(?:{_NAMES})▷",
    re.IGNORECASE,
)
_BEGINNINGS = ("</", "[/", "<|", "◁/")  # of a closing tag: to find that a text has none is much faster so


class Thought(NamedTuple):
    """A thought, without the white space around it, and its tags."""

    text: str
    opening: str
    closing: str


def split_thoughts(content: str) -> tuple[list[Thought], list[str]]:
    """The thoughts in an answer, and the other pieces of its text that are not blank."""
    thoughts: list[Thought] = []
    pieces, position = [], 0
    for tag in _CLOSING.finditer(content) if any(one in content for one in _BEGINNINGS) else ():
        opening = _opening(tag[0])
        begin = content.find(opening, position, tag.start())
        if begin < 0 and position:
            continue  # closes nothing
        pieces.append(content[position : max(begin, 0)])
        inside = begin + len(opening) if begin >= 0 else 0
        thoughts.append(Thought(content[inside : tag.start()].strip(), opening, tag[0]))
        position = tag.end()
    pieces.append(content[position:])
    return thoughts, [piece.strip() for piece in pieces if not piece.isspace() and piece]


def _opening(closing: str) -> str:
    """The tag that opens what `closing` ends: `<|START_THINKING|>` of `<|END_THINKING|>`."""
    if "/" in closing:
        return closing.replace("/", "", 1)
    begins = {"end_of_": "begin_of_", "END_OF_": "BEGIN_OF_", "end_": "start_", "END_": "START_"}
    end = next(end for end in begins if end in closing)
    return closing.replace(end, begins[end], 1)
