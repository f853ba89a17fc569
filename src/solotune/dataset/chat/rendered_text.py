"""Texts that a chat template has rendered already: rows under `text`, or prompt and completion, with its markers.

By the template of this model
-----------------------------
Its header of an answer and its ends of a turn are found with probes, and then in the text: the answers are what stands
between them, as if the row had been given as messages. So only they are trained on, and no second end token is added.
A text counts as rendered if it begins with a control token or header of the template and has an answer's header.

By another template
-------------------
`known_format` names it; nothing is done. Its markers are ordinary text for this tokenizer, and so is the whole row.
"""

from __future__ import annotations

import re
from functools import cached_property

from solotune.dataset.chat.answer_spans import ChatTemplate, Span
from solotune.errors import InputError

OWN = "this model's chat template"
_SENTINELS = ("\ufdd0", "\ufdd1", "\ufdd2")
_KNOWN = {
    "ChatML": (r"<\|im_start\|>user", r"<\|im_start\|>assistant"),
    "Llama 3": (r"<\|start_header_id\|>user<\|end_header_id\|>", r"<\|start_header_id\|>assistant<\|end_header_id\|>"),
    "Llama 4": (r"<\|header_start\|>user<\|header_end\|>", r"<\|header_start\|>assistant<\|header_end\|>"),
    "Llama 2 and Mistral": (r"\[INST\]", r"\[/INST\]"),
    "Gemma": (r"<start_of_turn>user", r"<start_of_turn>model"),
    "Gemma 4": (r"<\|turn>user", r"<\|turn>model"),
    "Phi, Zephyr and GLM": (r"<\|(?:user|prompter)\|>", r"<\|assistant\|>"),
    "gpt-oss": (r"<\|start\|>user", r"<\|start\|>assistant"),
    "DeepSeek": (r"<[|｜]User[|｜]>", r"<[|｜]Assistant[|｜]>"),
    "Cohere": (r"<\|USER_TOKEN\|>", r"<\|CHATBOT_TOKEN\|>"),
    "Granite": (r"<\|start_of_role\|>user<\|end_of_role\|>", r"<\|start_of_role\|>assistant<\|end_of_role\|>"),
    "Alpaca": (r"^### ?(?:Instruction|Input|Question)\b", r"^### ?(?:Response|Output|Answer)\b"),
    "### Human": (r"^### ?(?:Human|User)\b", r"^### ?(?:Assistant|AI|Bot)\b"),
    "Vicuna": (r"(?:^|\s)USER:", r"(?:^|\s)ASSISTANT:"),
    "Human and Assistant": (r"^(?:Human|User): ", r"^(?:Assistant|AI):"),
}
_PATTERNS = {name: tuple(re.compile(one, re.MULTILINE) for one in pair) for name, pair in _KNOWN.items()}
_MARKERS = ("<", "[INST]", "###", "USER:", "Human:", "User:")
"""One of them is in every text of a known format."""


def known_format(text: str) -> str | None:
    """The well-known prompt format whose markers for a question and then an answer are in the text; None without."""
    if not any(marker in text for marker in _MARKERS):
        return None
    for name, (question, answer) in _PATTERNS.items():
        asked = question.search(text)
        if asked and answer.search(text, asked.end()):
            return name
    return None


class RenderedTexts:
    """Find the answers in texts that the template of this model has rendered."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def answers(self, text: str, start: int = 0) -> list[Span] | None:
        """The span of each answer, with its end-of-turn token; None if this template has not rendered the text.

        Args:
            start: position of the completion: answers before it are left out, and one that it continues begins there.
        """
        header, blanks, _ = self._markers
        if not header or header not in text or not self._begins_as_rendered(text):
            return None
        spans, position = [], 0
        while (found := text.find(header, position)) >= 0:
            begin = found + len(header)
            begin += len(blanks) if text.startswith(blanks, begin) else 0
            stop = self._next_turn(text, begin)
            end = self._template.terminator.search(text, begin, stop)
            position = end.end() if end else stop
            spans.append((begin, position))
        inside = [(max(begin, start), end) for begin, end in spans if end > max(begin, start)]
        return [span for span in inside if text[slice(*span)].strip()] or None

    def _next_turn(self, text: str, begin: int) -> int:
        """Where the turn after an answer begins; for a template without ends of turns: at any control token."""
        places = [text.find(other, begin) for other in self._markers[2]]
        if not self._template.terminators and (token := self._template.control.in_answers.search(text, begin)):
            places.append(token.start())
        return min((place for place in places if place >= 0), default=len(text))

    def is_ended(self, text: str) -> bool:
        """Whether the text ends with an end of turn, but for white space."""
        return any(text.rstrip().endswith(end) for end in self._template.terminators)

    def begins_with(self, token: str) -> bool:
        """Whether every rendering begins with this token."""
        return self._probed[0].startswith(token)

    def _begins_as_rendered(self, text: str) -> bool:
        first = text.lstrip()
        header, _, others = self._markers
        return first.startswith((header, *others)) or self._template.control.pattern.match(first) is not None

    @cached_property
    def _probed(self) -> tuple[str, str, str]:
        """The template's text before a question, between it and an answer, and before the next question."""
        contents = zip(("user", "assistant", "user"), _SENTINELS, strict=True)
        try:
            text = self._template.raw("", [{"role": role, "content": content} for role, content in contents])
        except InputError:
            return "", "", ""
        before, _, rest = text.partition(_SENTINELS[0])
        between, _, rest = rest.partition(_SENTINELS[1])
        after, found, _ = rest.partition(_SENTINELS[2])
        return (before, between, after) if found else ("", "", "")

    @cached_property
    def _markers(self) -> tuple[str, str, tuple[str, ...]]:
        """Header of an answer; the white space after it, which is the prompt's; what begins other turns."""
        _, between, after = self._probed
        asked = self._template.generation_prompt
        header, blanks = asked.strip(), asked[len(asked.rstrip()) :]
        if not header or header not in between:  # none, or it opens a thinking block
            header, blanks = self._without_end(between).strip(), ""
        others = {self._without_end(after).strip(), *(self._first_control(part) for part in (header, after))}
        return header, blanks, tuple(sorted(others - {""}))

    def _without_end(self, text: str) -> str:
        """The text without the end of the turn before it."""
        bare = text.lstrip()
        end = self._template.terminator.match(bare) if self._template.terminators else None
        return bare[end.end() :] if end else bare

    def _first_control(self, text: str) -> str:
        found = self._template.control.pattern.search(self._without_end(text))
        return found[0] if found else ""
