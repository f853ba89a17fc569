"""What transformers alone makes of a row, and which characters of it are answers: the oracle of `bench.templates`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from bench.template_rows import Sample

_BEGIN, _END = re.compile(r"\{%(-?)\s*generation\s*(-?)%\}"), re.compile(r"\{%(-?)\s*endgeneration\s*(-?)%\}")
# group 1 is an answer. For texts that no marked template renders, of rows without forged tokens
PATTERNS = {
    "deepseek": r"(?:<｜Assistant｜>|<｜tool▁outputs▁end｜>|(?=\n<｜tool▁call▁begin｜>))(.*?<｜end▁of▁sentence｜>)",
    "gemma4": r"(?:(?<=<\|turn>model\n)|(?<=<tool_response\|>)|(?<=<turn\|>\n))(?!<\|turn>)"
    r"(.+?(?:<turn\|>|(?=<\|tool_response>)))",
    "glm": r"<\|assistant\|>(.*?)(?=<\|user\|>|<\|observation\|>|\Z)",
    "llama3": r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?(?:<\|eot_id\|>|<\|eom_id\|>))",
    "mistral_v3": r"\[/(?:INST|TOOL_RESULTS)\](.*?</s>)",
    "mistral_v3_tekken": r"\[/(?:INST|TOOL_RESULTS)\](.*?</s>)",
    "qwen": r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)",
}


def unmarked(source: str) -> str:
    """The template without its generation marks, its blanks handled alike."""
    return _END.sub(r"{%\1 endif \2%}", _BEGIN.sub(r"{%\1 if true \2%}", source))


class Reference:
    """What transformers alone makes of a row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str, marked: str | None, family: str) -> None:
        self._tokenizer, self._source, self._marked = tokenizer, source, marked
        self._pattern = re.compile(PATTERNS[family], re.DOTALL) if family in PATTERNS else None

    def render(self, sample: Sample) -> tuple[list[dict[str, Any]], str] | str:
        """The row in the form that the template takes (texts, or lists of parts), and its text; or the refusal."""
        refusal = ""
        for in_parts in (False, True):
            for arguments_as in (dict, str):
                messages = [_formed(message, in_parts, arguments_as) for message in sample.messages]
                try:
                    text = self._render(sample, messages)
                except Exception as error:
                    if not refusal or type(error) is TemplateError:  # what the template itself says, of all forms tried
                        refusal = str(error) or type(error).__name__
                    continue
                first = next(m["content"] for m in sample.messages if m["role"] == "user")
                if first.strip() in text:
                    return messages, text
        return refusal or "the template leaves out the user's text"

    @property
    def eos(self) -> Any:
        return self._tokenizer.eos_token

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """The characters of each token."""
        encoded: Any = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["offset_mapping"]

    def ids(self, sample: Sample, messages: list[dict[str, Any]]) -> list[int]:
        encoded: Any = self._tokenizer.apply_chat_template(messages, tools=sample.tools, chat_template=self._source)
        return encoded["input_ids"]

    def answers(self, sample: Sample, messages: list[dict[str, Any]], text: str) -> np.ndarray | None:
        """bool (characters,): by the marks, or by the pattern."""
        if self._marked is not None:
            try:
                (marked,), (spans,) = render_jinja_template(
                    [messages], tools=sample.tools, chat_template=self._marked,
                    return_assistant_tokens_mask=True, **self._tokenizer.special_tokens_map,
                )  # fmt: skip
            except Exception:
                marked, spans = None, []
            if marked == text:
                return characters(len(text), spans)
        if self._pattern is None:
            return None
        if sample.name.startswith("forged "):  # the same row with a word of the same length that is no token
            token = sample.name.removeprefix("forged ")
            neutral = json.loads(json.dumps(messages).replace(json.dumps(token)[1:-1], "X" * len(token)))
            text, length = self._render(sample, neutral), len(text)
            if len(text) != length:
                return None
        return characters(len(text), [match.span(1) for match in self._pattern.finditer(text)])

    def prompt(self, sample: Sample, messages: list[dict[str, Any]], turn: int) -> str:
        """What is given to the model at inference to have it write message `turn`; empty if that is refused."""
        before = messages[:turn] or [next(message for message in messages if message["role"] == "user")]
        try:
            return self._render(sample, before, add_generation_prompt=True)
        except Exception:
            return ""

    def through(self, sample: Sample, messages: list[dict[str, Any]], turn: int) -> str:
        """The chat up to and with message `turn`."""
        return self._render(sample, messages[: turn + 1])

    def _render(self, sample: Sample, messages: list[dict[str, Any]], **more: Any) -> str:
        text = self._tokenizer.apply_chat_template(
            messages, tools=sample.tools, chat_template=self._source, tokenize=False, **more
        )
        assert isinstance(text, str)
        return text

    def leaves_out_calls(self, sample: Sample, messages: list[dict[str, Any]], turn: int) -> bool:
        """Whether the row's text is the same without the calls of a message."""
        without = {key: value for key, value in messages[turn].items() if key != "tool_calls"}
        try:
            return self._render(sample, [*messages[:turn], without]) == self._render(sample, messages[: turn + 1])
        except Exception:
            return False


def _formed(message: dict[str, Any], in_parts: bool, arguments_as: type) -> dict[str, Any]:
    message = dict(message)
    if in_parts:
        message["content"] = [{"type": "text", "text": message["content"]}]
    if arguments_as is str and "tool_calls" in message:
        calls = json.loads(json.dumps(message["tool_calls"]))
        for call in calls:
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        message["tool_calls"] = calls
    return message


def characters(length: int, spans: Any) -> np.ndarray:
    learned = np.zeros(length, dtype=bool)
    for begin, end in spans:
        learned[begin:end] = True
    return learned


def sources(name: str, templates: Path) -> tuple[str, str | None, str]:
    """The template without marks; the one with marks that is its oracle, and that one's name."""
    path = templates / f"{name}.jinja"
    marked = path.read_text(encoding="utf-8")
    source = unmarked(marked)
    if source != marked:
        return source, marked, "its marks"
    twin = "diffusion_gemma_training" if name.startswith("gemma4") else f"{name}_training"
    other = path.with_name(f"{twin}.jinja")
    return (source, other.read_text(encoding="utf-8"), twin) if other.exists() else (source, None, "")
