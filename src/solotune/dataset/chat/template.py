"""Render a tokenizer's Jinja template, in the input form that it expects, with the date of the run.

    Template(tokenizer, day).render(where, messages)    rows of the data, in the form that the template expects
    render_chat(tokenizer, messages)                    what transformers' `apply_chat_template` gives, in the sandbox
    render_marked(tokenizer, messages)                  the same with the spans of `{% generation %}` blocks

A template comes with a model and may loop for ever or fill the memory, so nothing else in solotune renders one:
`apply_chat_template` runs it in this process, without limits (`scripts/lint_calls.py`).

Input form
----------
Templates agree on roles and differ in the rest. What a template accepts is tested once, with probes:

contents    a text; or, in many templates of multimodal models, only a list of parts: `[{"type": "text", "text": ...}]`
arguments   of a tool call: an object, as transformers documents it, or its JSON text, as the OpenAI API writes it. A
            template made for one raises on the other (DeepSeek V3), or quotes it a second time (Llama 3.1). If both
            are rendered unchanged, a row's own form is kept, so the text is exactly that of `apply_chat_template`.

Date
----
Some templates write today's date into the system turn (Llama 3.2, gpt-oss). Rows must not change overnight, or a run
could not be resumed the next day; so the date is that of the run. transformers puts a `strftime_now` into the
template's environment and accepts only data from outside, no functions: so a macro of that name is put in front of the
template, which shadows the function and takes the parts of the date from a variable.
"""

from __future__ import annotations

import json
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from solotune.dataset.chat.template_sandbox import TemplateLimitError, TemplateRefusal, TemplateSyntax, sandbox
from solotune.dataset.readers.row import RowError
from solotune.errors import InputError
from solotune.units import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None

REFUSED_BY_TEMPLATE = "refused by the chat template"
_REASONING = ("reasoning_content", "thinking", "reasoning")

# trim_blocks removes the line break
_MACRO = """\
{%- macro strftime_now(format) %}{% set text = namespace(written=format) %}
{%- for directive, value in rendered_on.items() %}
{%- set text.written = text.written.replace(directive, value) %}{% endfor %}{{ text.written }}{% endmacro %}
"""
_DIRECTIVES = "aAbBcdDeFGhHIjmMnpSTuUVwWxXyYZ%"
_PADDED = "dHIjmMSUVwWy"


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    tools: Tools = None,
    *,
    is_prompt: bool = False,
    template: str | None = None,
) -> str:
    """Render in the sandbox what transformers' `apply_chat_template(tokenize=False)` gives today.

    Args:
        is_prompt: add the header of an answer (`add_generation_prompt`).
        template: a template, or the name of one of the tokenizer's, to render instead of its own.

    Raises:
        TemplateRefusal: no such template, or it raises.
        TemplateSyntax: it does not parse.
        TemplateLimitError: it needs too much time or memory.
    """
    variables = _variables(special_tokens(tokenizer), messages, tools, is_prompt)
    return sandbox().render(*_dated(_source(tokenizer, tools, template), variables, directives_of(date.today())))


def render_marked(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
    """Render as `render_chat`; returns the text and the spans of its `{% generation %}` blocks, in characters.

    Raises:
        TemplateRefusal, TemplateSyntax, TemplateLimitError: as `render_chat`.
    """
    variables = _variables(special_tokens(tokenizer), messages, None, False)
    return sandbox().render_marked(*_dated(_source(tokenizer, None), variables, directives_of(date.today())))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a template sees of the tokenizer: `bos_token` and the other special tokens, as texts."""
    named: dict[str, Any] = tokenizer.special_tokens_map
    return {name: [str(t) for t in token] if isinstance(token, list) else str(token) for name, token in named.items()}


def _source(tokenizer: PreTrainedTokenizerBase, tools: Tools, template: str | None = None) -> str:
    try:
        return tokenizer.get_chat_template(template, tools=cast(Any, tools))
    except ValueError as error:  # several templates and none called default
        raise TemplateRefusal(first_line(error)) from None


def _variables(special: dict[str, Any], messages: Messages, tools: Tools, is_prompt: bool) -> dict[str, Any]:
    return {
        **special,
        "messages": [_with_reasoning(message) for message in messages],
        "tools": tools,
        "documents": None,
        "add_generation_prompt": is_prompt,
    }


def _dated(source: str, variables: dict[str, Any], day: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """Source and variables with the date of the run in them, if the template writes it."""
    return (_MACRO + source, {**variables, "rendered_on": day}) if "strftime_now" in source else (source, variables)


class Template:
    """The chat template of a tokenizer that has one.

    Args:
        rendered_on: the date that the template sees as today; default: today.

    Raises:
        InputError: the tokenizer has no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rendered_on: date | None = None) -> None:
        if tokenizer.chat_template is None:
            raise InputError(
                "the tokenizer has no chat template, but the rows are chats",
                seen=f"{tokenizer.name_or_path or type(tokenizer).__name__} (a base model?)",
                allowed="a model with a chat template, or rows of plain text or prompt + completion texts",
                change="use the instruct model, or set chat_template_path to a Jinja file such as the instruct model's",
            )
        self._tokenizer = tokenizer
        self._date = directives_of(rendered_on or date.today())

    def render(self, where: str, messages: Messages, tools: Tools = None, *, is_prompt: bool = False) -> str:
        """Render messages; with `is_prompt`, a prompt for an answer after them.

        Raises:
            RowError: the template refuses them; names the place `where`.
            TemplateLimitError: it needs too much time or memory.
        """
        taken = self.as_taken(messages)
        try:
            return self._apply(taken, tools, is_prompt=is_prompt)
        except TemplateLimitError as error:
            error.problem = f"{where}: {error.problem}" if where else error.problem
            raise
        except (TemplateRefusal, TemplateSyntax) as error:
            raise RowError(
                f"{where}: the model's chat template refuses this row",
                reason=REFUSED_BY_TEMPLATE,
                seen=f"{error}; the roles are " + ", ".join(message["role"] for message in messages),
                change="change the row to what the template accepts, or set chat_template_path",
            ) from None

    def _apply(self, messages: Messages, tools: Tools = None, *, is_prompt: bool = False) -> str:
        """Render as `render_chat` does."""
        variables = _variables(self._special_tokens, messages, tools, is_prompt)
        return sandbox().render(*_dated(_source(self._tokenizer, tools), variables, self._date))

    @cached_property
    def _special_tokens(self) -> dict[str, Any]:
        return special_tokens(self._tokenizer)

    # --- the input form that it expects

    def as_taken(self, messages: Messages) -> Messages:
        """The messages in the form that the template expects: contents as parts, arguments as JSON text, if so."""
        if self._takes_parts:
            messages = [_in_parts(message) for message in messages]
        if any("tool_calls" in message for message in messages):
            messages = [self._with_arguments(message) for message in messages]
        return messages

    def _shows(self, what: str, messages: Messages) -> bool:
        try:
            return what in self._apply(messages)
        except (TemplateRefusal, TemplateSyntax):
            return False

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether contents have to be lists of parts."""
        chat = [{"role": "user", "content": "\ufdd0"}, {"role": "assistant", "content": "\ufdd1"}]
        return not self._shows("\ufdd0", chat) and self._shows("\ufdd0", [_in_parts(message) for message in chat])

    @cached_property
    def _arguments_as(self) -> frozenset[type]:
        """The forms of a call's arguments that are rendered unchanged: `dict`, and `str` for JSON text."""
        taken = set()
        for arguments, shown in (({"x": "8z5"}, "8z5"), ('{"x":"8z5"}', '{"x":"8z5"}')):
            call = {"id": "callnum01", "type": "function", "function": {"name": "f", "arguments": arguments}}
            chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
            if self._shows(shown, [_in_parts(message) for message in chat] if self._takes_parts else chat):
                taken.add(type(arguments))
        return frozenset(taken)

    def _with_arguments(self, message: dict[str, Any]) -> dict[str, Any]:
        """Convert the arguments of the message's calls to the form that the template accepts."""
        calls = message.get("tool_calls")
        if not isinstance(calls, list) or len(self._arguments_as) != 1:
            return message
        (taken,) = self._arguments_as
        return {**message, "tool_calls": [_with_arguments_as(call, taken) for call in calls]}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message as transformers passes it: no key without a value, reasoning under both names that templates read."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _with_arguments_as(call: Any, taken: type) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments_as(call["function"], taken)}
    arguments = call.get("arguments")
    if taken is str and isinstance(arguments, dict):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if taken is dict and isinstance(arguments, str):
        try:
            read = json.loads(arguments)
        except ValueError:
            return call  # not JSON: leave it to the template
        return {**call, "arguments": read} if isinstance(read, dict) else call
    return call


def directives_of(day: date) -> dict[str, str]:
    """What a template can see of the date: each directive of `strftime` with its value on this day at midnight.

    Unpadded directives (`%-d`) are included.
    """
    padded = {f"%{letter}": day.strftime(f"%{letter}") for letter in _DIRECTIVES}
    return {**{f"%-{letter}": padded[f"%{letter}"].lstrip("0") or "0" for letter in _PADDED}, **padded}
