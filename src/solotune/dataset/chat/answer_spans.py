"""Render a chat with the model's own template, and find the characters of the answers in the result.

How spans are found
-------------------
Few templates mark the assistant's part (`{% generation %}`), so it is found from outside, for every row. With R(m) the
rendering of messages m, P_i = R(m[:i]) with the generation prompt, E_i = R(m[:i+1]):

    prefix method   the answer of turn i is R(m)[len(P_i) : len(E_i)],  if P_i and E_i are prefixes of R(m)

which is exactly what the model is asked for at inference. It costs two renderings per turn, and fails on templates that
rewrite history (Qwen3 drops the thinking of earlier turns: E_i is not a prefix). So a cheaper method comes first:

    V = R(m with every answer replaced by a sentinel),  split at the sentinels into fixed pieces L_0, L_1, ... L_k

If R(m) = L_0 a_0 L_1 a_1 ... L_k with a_j the answers (or the answers stripped), the spans are known after two
renderings of the whole row, and rewriting cannot confuse them. If that does not hold (thinking cut out of the answer,
tool calls), three methods are tried for each turn: the prefix method, a sentinel for that turn alone with a comparison
from both ends, and a sentinel for the name of the function it calls. Every span is checked: in order, not overlapping,
containing the visible answer. A row that fails is an error with its place, never a wrong mask.

End of turn
-----------
A span includes the control token that ends the turn (`<|im_end|>`), but not the newline a template puts after it: the
model must learn to stop, and what follows a stop is never generated. Which control tokens end a turn is found by
rendering two probes, since for a template without such a token (GLM-4's next turn simply begins with `<|user|>`) the
next turn's header must not be trained on.

What it does not do
-------------------
Run the template: that happens in a separate process with limits (`template_sandbox`).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING

from solotune.dataset.chat.control_tokens import ControlTokens, any_of, free_noncharacters
from solotune.dataset.chat.reasoning_tags import split_thoughts
from solotune.dataset.chat.template import Messages, Template, Tools
from solotune.dataset.readers.row import RowError
from solotune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_BLANKS = re.compile(r"\s*")
_PLAIN_KEYS = {"role", "content", "name", "tool_call_id"}


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as text, before tokenising; spans are character positions `[begin, end)`."""

    text: str
    forged: list[Span]
    answers: list[Span]
    """One for each assistant message, in order, with its end-of-turn token."""
    is_chat: bool = True
    """Whether the model's chat template has made the text."""


class ChatTemplate:
    """The chat template of one tokenizer, with its generation prompt and end-of-turn tokens.

    Args:
        rendered_on: the date that the template sees as today; default: today.

    Raises:
        InputError: the tokenizer has no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rendered_on: date | None = None) -> None:
        template = Template(tokenizer, rendered_on)
        self.raw, self.as_taken = template.render, template.as_taken
        self.control = ControlTokens(tokenizer)

    def render(self, where: str, messages: Messages, tools: Tools = None) -> Rendered:
        """Render a row and find its answers."""
        row = _Row(self, where, messages, tools)
        return Rendered(row.text, row.forged, row.answers())

    def render_prompt(self, messages: Messages, tools: Tools = None) -> Rendered:
        """Render the prompt for the next assistant turn."""
        row = _Row(self, "the prompt", messages, tools, is_prompt=True)
        return Rendered(row.text, row.forged, [])

    @cached_property
    def generation_prompt(self) -> str:
        """What a request for an answer appends: `<|im_start|>assistant\\n`; empty for templates that append nothing."""
        user = [{"role": "user", "content": "x"}]
        try:
            before, after = (self.raw("", user, is_prompt=ask) for ask in (False, True))
        except InputError:
            return ""
        # most only append; some write an end of text if no answer is requested
        return after[self.control.snapped(after, _num_equal(before, after)) :]

    @cached_property
    def terminators(self) -> frozenset[str]:
        """The ends of an assistant turn: control tokens, or runs of them (Cohere 2 has two), found with two probes."""
        user, answer, after = "\ufdd0", "\ufdd1", "\ufdd2"
        chat = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": after},
        ]
        try:
            last = self.raw("", chat[:2]).partition(answer)[2]
        except InputError:
            return frozenset()
        found = {self.last_terminator}
        try:
            text = self.raw("", chat)
        except InputError:
            text = ""
        header, _, rest = text.partition(user)
        users_end, _, rest = rest.partition(answer)
        between = rest.partition(after)[0]
        if not between.startswith(last):
            # earlier turns end in another way than the last turn (gpt-oss), or not at all, so that the next header
            # follows: an end is a token that no header has, or that also ends the user's turn and starts no header
            (first,) = self.control.pattern.findall(between)[:1] or [""]
            ends_the_users = users_end.lstrip().startswith(first) and not self.generation_prompt.startswith(first)
            if first not in header or ends_the_users:
                found.add(first)
        return frozenset(found - {""})

    @cached_property
    def last_terminator(self) -> str:
        """The end of an answer after which nothing follows; empty for a template without one."""
        chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\ufdd1"}]
        try:
            return self._first_controls(self.raw("", chat).partition("\ufdd1")[2])
        except InputError:
            return ""

    def _first_controls(self, text: str) -> str:
        """The adjacent control tokens at the start of a text, after whitespace."""
        begin = end = len(text) - len(text.lstrip())
        while token := self.control.pattern.match(text, end):
            if token.end() == end:
                break
            end = token.end()
        return text[begin:end]

    @cached_property
    def terminator(self) -> re.Pattern[str]:
        """Matches the longest of the terminators."""
        return any_of(self.terminators)


class _Row:
    """One conversation being rendered; holds what its several renderings share."""

    def __init__(
        self,
        template: ChatTemplate,
        where: str,
        messages: Messages,
        tools: Tools,
        *,
        is_prompt: bool = False,
    ) -> None:
        self._template, self._where = template, where
        self._messages, self._tools, self._marks = template.control.mark(messages, tools)
        self.text, self.forged = self._render(self._messages, is_prompt=is_prompt)

    def _render(self, messages: Messages, *, is_prompt: bool) -> tuple[str, list[Span]]:
        raw = self._template.raw(self._where, messages, self._tools, is_prompt=is_prompt)
        return self._template.control.unmark(raw, self._marks)

    def _try(self, messages: Messages, *, is_prompt: bool = False) -> str | None:
        """Render messages that are not a row of the data: None if the template refuses them."""
        try:
            return self._render(messages, is_prompt=is_prompt)[0] if messages else None
        except InputError:
            return None

    def answers(self) -> list[Span]:
        """The span of each assistant message, with its end-of-turn token."""
        turns = [i for i, message in enumerate(self._messages) if message["role"] == "assistant"]
        contents = self._by_sentinels(turns)
        spans: list[Span] = []
        previous_end = 0
        for number, turn in enumerate(turns):
            span = self._with_terminator(contents[number], turn, previous_end) if contents else None
            span = span or self._by_prefix(turn) or self._by_own_sentinel(turn, previous_end)
            span = span or self._by_name_of_call(turn, previous_end)
            if span is None or span[0] < previous_end or span[1] <= span[0] or not self._shows(turn, span):
                raise self._not_found(turn)
            spans.append(span)
            previous_end = span[1]
        return spans

    def _not_found(self, turn: int) -> RowError:
        return RowError(
            f"{self._where}: message {turn + 1}: the chat template leaves out this answer or a part of it",
            reason="answer left out by the chat template",
            seen=json.dumps(self._messages[turn], default=str)[:80],
            allowed="a template that renders every assistant message, with its tool calls",
            change="set chat_template_path to a template that does, or remove the row",
        )

    # --- all answers at once

    def _by_sentinels(self, turns: list[int]) -> list[Span] | None:
        """The span of each answer's content, from one rendering with all answers replaced."""
        if any(self._messages[turn].keys() - _PLAIN_KEYS for turn in turns):
            return None  # tool calls and reasoning are part of the answer, and a sentinel would keep them in place
        begin, end = free_noncharacters(self._messages, self._tools)[2:4]
        replaced = list(self._messages)
        for number, turn in enumerate(turns):
            replaced[turn] = {**self._messages[turn], "content": f"{begin}{number}{end}"}
        rendered = self._try(replaced)
        if rendered is None:
            return None
        pieces = re.split(f"{begin}(\\d+){end}", rendered)
        if pieces[1::2] != [str(number) for number in range(len(turns))]:
            return None
        fixed = pieces[0::2]
        if not self.text.startswith(fixed[0]):
            return None
        spans, position = [], len(fixed[0])
        for turn, following in zip(turns, fixed[1:], strict=True):
            content = self._unmarked(self._messages[turn]["content"])
            forms = (content, content.strip(), content.rstrip(), content.lstrip())
            form = next((f for f in forms if self.text.startswith(f + following, position)), None)
            if form is None:
                return None
            spans.append((position, position + len(form)))
            position += len(form) + len(following)
        return spans if position == len(self.text) else None

    def _unmarked(self, text: str) -> str:
        return self._template.control.unmark(text, self._marks)[0]

    def _with_terminator(self, content: Span, turn: int, previous_end: int) -> Span | None:
        """Extend the span of an answer's content to everything that the model has to produce for it."""
        begin = self._begin_of(turn, content[0], previous_end)
        return None if begin is None else (begin, self._end_of_turn(content[1]))

    def _end_of_turn(self, position: int) -> int:
        """The position after the end-of-turn token and the whitespace before it, if one follows; else unchanged."""
        blanks = _BLANKS.match(self.text, position)
        token = self._template.terminator.match(self.text, blanks.end() if blanks else position)
        return token.end() if token else position

    def _begin_of(self, turn: int, content_begin: int, previous_end: int) -> int | None:
        """The start of what the model generates in a turn, given the start of its content (or an upper bound).

        This is the end of the generation prompt. What a template adds before the content (Mistral's space, Qwen3's
        empty thinking block) comes after it, because the model has to generate it.
        """
        header = self._template.generation_prompt
        if header and self.text.endswith(header, 0, content_begin):
            return content_begin
        prompt = self._try(self._messages[:turn], is_prompt=True)
        if prompt is not None:
            if self.text.startswith(prompt):
                return len(prompt)
            if self.text[:content_begin] == prompt[:content_begin]:
                return content_begin  # the prompt opens something (`<think>`) that this answer does not have
        # the prompt renders history in another way than the row: look for the header itself
        while header:
            place = self.text.rfind(header, previous_end, content_begin)
            if place >= 0:
                return place + len(header)
            # if the generation prompt opens a thinking block: try it without the block
            tokens = list(self._template.control.pattern.finditer(header))
            header = header[: tokens[-1].start()] if len(tokens) > 1 else ""
        return content_begin if turn == 0 else self._after_the_question(prompt or "", turn, content_begin, previous_end)

    def _after_the_question(self, prompt: str, turn: int, content_begin: int, previous_end: int) -> int | None:
        """The start of an answer, for templates without answer headers that move system and tools to the last question.

        Searches the row for the end of the prompt, from its last control token (Mistral's `[/INST]`).
        """
        if self._messages[turn - 1]["role"] == "assistant":  # two messages joined to one turn
            return previous_end if not self.text[previous_end:content_begin].strip() else None
        tokens = list(self._template.control.pattern.finditer(prompt))
        place = self.text.rfind(prompt[tokens[-1].start() :], previous_end, content_begin) if tokens else -1
        return place + len(prompt) - tokens[-1].start() if place >= 0 else None

    # --- one answer

    def _by_prefix(self, turn: int) -> Span | None:
        prompt = self._try(self._messages[:turn], is_prompt=True)
        if prompt is None or not self.text.startswith(prompt):
            return None
        message = self._messages[turn]
        unreasoned = {key: value for key, value in message.items() if key != "reasoning_content"}
        # if history drops the reasoning (gpt-oss), the row starts with the turn without it
        for form in (message, unreasoned) if unreasoned.keys() != message.keys() else (message,):
            through = self._try([*self._messages[:turn], form])
            if through is not None and self.text.startswith(through) and through.startswith(prompt):
                return len(prompt), len(prompt) + len(self._trimmed(through[len(prompt) :]))
        return None

    def _trimmed(self, answer: str) -> str:
        """Remove the whitespace after the end-of-turn token."""
        bare = answer.rstrip()
        ends = [match.end() for match in self._template.control.pattern.finditer(bare)]
        return bare if ends and ends[-1] == len(bare) else answer

    def _by_own_sentinel(self, turn: int, previous_end: int) -> Span | None:
        """Replace only this answer, with its tool calls, and compare from both ends."""
        mark = free_noncharacters(self._messages, self._tools)[2]
        replaced = [*self._messages[:turn], {"role": "assistant", "content": mark}, *self._messages[turn + 1 :]]
        rendered = self._try(replaced)
        if rendered is None or rendered.count(mark) != 1:
            return None
        before, _, after = rendered.partition(mark)
        content_begin = self._template.control.snapped(self.text, _num_equal(before, self.text))
        begin = self._begin_of(turn, content_begin, previous_end)
        if begin is None or content_begin < previous_end:
            return None
        if self.text.endswith(after):
            return self._without_the_next(turn, (begin, self._end_of_turn(len(self.text) - len(after))))
        # a tool call may end with another token (Llama 3.1: <|eom_id|>) than an answer does
        token = self._template.control.pattern.match(after)
        rest = after[token.end() :] if token else None
        if not rest or not self.text.endswith(rest):
            return None
        end = len(self.text) - len(rest)
        closes = any(found.end() == end for found in self._template.control.pattern.finditer(self.text))
        return self._without_the_next(turn, (begin, end)) if closes else None

    def _without_the_next(self, turn: int, span: Span) -> Span | None:
        """Return the span, unless it contains later messages of other roles.

        Raises:
            RowError: the template puts a tool's result between the calls and the text of one answer (Gemma 4).
        """
        after = self._messages[turn + 1 :]
        num_others = next((k for k, message in enumerate(after) if message["role"] == "assistant"), len(after))
        mark = free_noncharacters(self._messages, self._tools)[2]
        others = [{**message, "content": mark} for message in after[:num_others]]
        other = self._try([*self._messages[: turn + 1], *others, *after[num_others:]]) if others else None
        if other is None or _num_equal(other, self.text) >= span[1]:
            return span
        if others[0]["role"] == "tool":
            raise RowError(
                f"{self._where}: message {turn + 1}: the chat template puts the tool's result inside this answer",
                reason="tool result inside an answer",
                seen=self.text[slice(*span)][:80],
                allowed="with this template: an answer that calls tools and has no text",
                change="remove the text of this answer, set chat_template_path to another template, or remove the row",
            )
        return None

    def _by_name_of_call(self, turn: int, previous_end: int) -> Span | None:
        """Replace the name of the first function called; the answer ends at the next end of a turn."""
        message, mark = self._messages[turn], free_noncharacters(self._messages, self._tools)[2]
        call, *others = message.get("tool_calls") or [None]
        if not isinstance(call, dict) or not isinstance(function := call.get("function"), dict):
            return None
        calls = [{**call, "function": {**function, "name": mark}}, *others]
        other = [*self._messages[:turn], {**message, "tool_calls": calls}, *self._messages[turn + 1 :]]
        before, found, after = (self._try(other) or "").partition(mark)
        if not found or not (self.text.startswith(before) and self.text.endswith(after)):
            return None
        begin = self._begin_of(turn, len(before), previous_end)
        forged = {span[0] for span in self.forged}
        ends = self._template.terminator.finditer(self.text, len(before))
        end = next((one.end() for one in ends if one.start() not in forged), None)
        return None if begin is None or end is None else self._without_the_next(turn, (begin, end))

    def _shows(self, turn: int, span: Span) -> bool:
        """Whether the span contains the visible part of the answer and the name of each function it calls."""
        message, answer = self._messages[turn], self.text[span[0] : span[1]]
        content = self._unmarked(message["content"])
        visible = content.strip() in answer or all(piece in answer for piece in split_thoughts(content)[1])
        calls = [call.get("function", call) for call in message.get("tool_calls", ()) if isinstance(call, dict)]
        return visible and all(str(call.get("name")) in answer for call in calls)


def _num_equal(a: str, b: str) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
