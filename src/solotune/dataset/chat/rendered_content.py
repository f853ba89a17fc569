"""Is everything that a row says in its rendering?

A template is free to leave out what it does not know: the reasoning of an answer, a second system message, the tools.
No loss shows it; the model only learns less than the data says. So the rendering of every row is searched for each of
its messages: a few microseconds, since nearly always the text is there word for word.

Thoughts
--------
`reasoning_content`, or a block of the answer's text (`thoughts`). Only answers that are trained on count. What happens
to a lost one depends on whether the template can render thoughts of its form at all, tested once, as the last answer
of a short chat:

    it cannot     the row is refused, as for lost tool calls
    it can        (Qwen3: not in answers before the last question) it is counted, and the data report says how many
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from solotune.dataset.chat.answer_spans import ChatTemplate, Rendered
from solotune.dataset.chat.reasoning_tags import Thought, split_thoughts
from solotune.dataset.chat.template import Messages, Tools
from solotune.dataset.readers.row import RowError
from solotune.errors import InputError

THOUGHTS, TOOLS, NAME = "thoughts", "tools", "name"
WAYS_TO_KEEP_THOUGHTS = (
    "split each chat into one row per answer, which ends with it, and set train_on_last_turn: true; or set "
    "chat_template_path to a copy of the template that keeps the thoughts of earlier answers"
)
_REASONING = Thought("", "reasoning_content", "")
"""Stands for a thought in a key of its own."""
_THOUGHT, _ANSWER = "zqthoughtzq", "zqanswerzq"
_WORD, _BLANKS = re.compile(r"\w+"), re.compile(r"\s+")
_SWITCH = re.compile(r"(?<!\S)/(?:no_?think|think|system_override)\b")  # SmolLM3 takes them out of the system message
_SAID = 0.8  # share of a tool's result that a template which rewrites JSON still shows, in words


class Part(NamedTuple):
    """Something that a row says."""

    kind: str
    """`thoughts`, `tools`, `name`, or the role of a message."""
    is_lost: bool


class ContentCheck:
    """Compare rows with their renderings by one template."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._shown: dict[str, bool] = {}
        self._with_tools: dict[tuple[str, ...], bool] = {}

    def parts(
        self, where: str, messages: Messages, tools: Tools, rendered: Rendered, trained: Collection[int]
    ) -> list[Part]:
        """What the row says, and whether it is in the rendering.

        Args:
            trained: numbers of the answers that are trained on.

        Raises:
            RowError: thoughts that this template leaves out of every answer.
        """
        text, place, answer, found = rendered.text, 0, 0, []
        for number, message in enumerate(messages, 1):
            role, said = message["role"], message["content"].strip()
            if role == "assistant":
                span = rendered.answers[answer]
                if answer in trained:
                    found += self._thoughts(f"{where}: message {number}", message, text[slice(*span)])
                place, answer = max(place, span[1]), answer + 1
            elif said:
                here = text.find(said, place)
                place = here + len(said) if here >= 0 else place
                found.append(Part(role, here < 0 and not _is_said(said, text, is_data=role == "tool")))
            if role != "tool" and (name := message.get("name")):  # a tool's is also in the call
                found.append(Part(NAME, str(name) not in text))
        if tools:
            found.append(Part(TOOLS, not self._shows_tools(messages, tools, rendered)))
        return found

    def _thoughts(self, place: str, message: dict[str, Any], answer: str) -> list[Part]:
        inside = split_thoughts(message["content"])[0]
        reasoning = message.get("reasoning_content")
        thoughts = [_REASONING._replace(text=str(reasoning).strip()), *inside] if reasoning else inside
        found = [Part(THOUGHTS, not _is_said(thought.text, answer)) for thought in thoughts if thought.text]
        for thought, part in zip((one for one in thoughts if one.text), found, strict=True):
            if part.is_lost and not self._renders(thought):
                raise self._lost(place, thought)
        return found

    def _renders(self, thought: Thought) -> bool:
        """Whether the template renders a thought of this form in the last answer of a short chat."""
        if thought.opening not in self._shown:
            if thought.opening == _REASONING.opening:
                message = {"content": _ANSWER, "reasoning_content": _THOUGHT}
            else:
                message = {"content": f"{thought.opening}\n{_THOUGHT}\n{thought.closing}\n\n{_ANSWER}"}
            chat = [{"role": "user", "content": "x"}, {"role": "assistant", **message}]
            try:
                self._shown[thought.opening] = _THOUGHT in self._template.raw("", chat)
            except InputError:
                self._shown[thought.opening] = False
        return self._shown[thought.opening]

    def _lost(self, place: str, thought: Thought) -> RowError:
        is_key = thought.opening == _REASONING.opening
        form = "reasoning_content" if is_key else f"{thought.opening}...{thought.closing} in content"
        ways = ["set chat_template_path to a template that renders them (or remove it, if it is set)"]
        if is_key and self._renders(Thought("", "<think>", "</think>")):
            ways.insert(0, "write them into content: <think>\\n...\\n</think>\\n\\n and the answer")
        if not is_key and self._renders(_REASONING):
            ways.insert(0, "move them to a key of their own, reasoning_content")
        return RowError(
            f"{place}: the chat template leaves out the thoughts of this answer ({form})",
            reason="thoughts left out by the chat template",
            seen=thought.text[:80],
            allowed="thoughts that the chat template renders, at least in the last answer",
            change="; or ".join(ways) + "; or, to train without thoughts, remove them from the rows",
        )

    def _shows_tools(self, messages: Messages, tools: list[dict[str, Any]], rendered: Rendered) -> bool:
        """Whether the tool definitions are rendered: their names also stand in calls, so answers are left out."""
        edges = [0, *(position for span in rendered.answers for position in span), len(rendered.text)]
        outside = "\n".join(rendered.text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))
        functions = [tool.get("function") if isinstance(tool.get("function"), dict) else tool for tool in tools]
        if not all(str(function.get("name") or "") in outside for function in functions):  # type: ignore[union-attr]
            return False
        about = functions[0].get("description")  # type: ignore[union-attr]
        if isinstance(about, str) and len(about) > 8 and about in outside:
            return True
        # a name alone may be a word of the chat, or be written at the tool's result
        roles = tuple(message["role"] for message in messages)
        if roles not in self._with_tools:
            try:
                both = [self._template.raw("", messages, given) for given in (tools, None)]
                self._with_tools[roles] = both[0] != both[1]
            except InputError:
                self._with_tools[roles] = True
        return self._with_tools[roles]


def _is_said(said: str, text: str, *, is_data: bool = False) -> bool:
    """Whether the text contains what is said: verbatim, as JSON text, with other white space, or escaped.

    Args:
        is_data: most of its words are enough: a template may read JSON and write it in another form.
    """
    if said in text:
        return True
    if any(json.dumps(said, ensure_ascii=ascii_only)[1:-1] in text for ascii_only in (False, True)):
        return True
    whole = _BLANKS.sub("", html.unescape(text) if "&" in text else text)
    if _BLANKS.sub("", _SWITCH.sub("", said)) in whole:
        return True
    words = set(_WORD.findall(said))
    return is_data and sum(word in whole for word in words) >= _SAID * len(words)
