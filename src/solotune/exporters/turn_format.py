"""The format of a chat template, found by rendering probes: what stands between the messages of a conversation.

    turns = derive(tokenizer)
    turns.render(messages)      the prompt for an answer, from the pieces that were found
    turns.differs(messages)     whether training renders it otherwise

Engines that do not run Jinja (Ollama has Go templates) need a chat template in another language. A translation of the
source would be a guess. So conversations of words that occur nowhere else are rendered as training renders them, and
cut at these words; what is left between two messages depends on their roles only:

    between["", "user"]           '<|im_start|>user\\n'
    between["user", "assistant"]  '<|im_end|>\\n<|im_start|>assistant\\n'
    between["user", ""]           '<|im_end|>\\n<|im_start|>assistant\\n', the end of a prompt

and whether white space around a role's texts is stripped. Mistral's templates put the system prompt before the last
question instead of the first message; that is found too. What a template does beyond that (thoughts that are taken out
of earlier answers, tools, dates) is not in the pieces: `render` then gives another text than training, which `differs`
says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date
from itertools import pairwise
from typing import TYPE_CHECKING

from solotune.dataset.chat.template import Messages, Template
from solotune.dataset.prepare import text_prompt
from solotune.dataset.readers.row import RowError
from solotune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
_WORDS = ("Qzsys", "Qzone", "Qzans", "Qztwo", "Qzrep", "Qzend")
_SPACE = " \t\n"
_WORD = "Qzspc"


@dataclass
class TurnFormat:
    """What stands between messages, by the roles before and after; "" is the begin or the end of the prompt."""

    between: dict[tuple[str, str], str]
    bos: str = ""
    """What every prompt begins with and an engine adds (`engine_adds_bos`); not in `between`."""
    system_at_last: tuple[str, str] | None = None
    """Texts before and after a system prompt that stands before the last question, after `between`; None: it stands
    first."""
    strips: dict[str, tuple[bool, bool]] = field(default_factory=dict)
    """Whether white space is stripped before and after the texts of a role."""
    has_date: bool = False
    """Whether today's date is in it."""
    template: Template | None = field(default=None, repr=False)

    @property
    def takes_system(self) -> bool:
        return self.system_at_last is not None or ("", "system") in self.between

    def supports(self, messages: Messages) -> bool:
        """Whether these are texts of system (first, if at all), user and assistant by turns, up to a question."""
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        plain = all(message.keys() <= {"role", "content"} and type(message["content"]) is str for message in messages)
        is_alternating = turns == ["user", "assistant"] * (len(turns) // 2) + ["user"]
        return plain and is_alternating and (self.takes_system or roles[:1] != ["system"])

    def render(self, messages: Messages) -> str:
        """The prompt for the next answer, without BOS."""
        system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
        text, before = "", ""
        for index, message in enumerate(messages):
            role = message["role"]
            if self.system_at_last is not None and role == "system":
                continue
            text += self.between.get((before, role), "")
            if self.system_at_last is not None and system and index == len(messages) - 1:
                text += self.system_at_last[0] + self._stripped("system", system) + self.system_at_last[1]
            text += self._stripped(role, message["content"])
            before = role
        return text + self.between.get((before, ""), "")

    def _stripped(self, role: str, text: str) -> str:
        before, after = self.strips.get(role, (False, False))
        text = text.lstrip() if before else text
        return text.rstrip() if after else text

    def trained(self, messages: Messages) -> str | None:
        """The same prompt as training renders it, without BOS; None if the template refuses it."""
        assert self.template is not None
        try:
            text = self.template.render("", messages, is_prompt=True)
        except RowError:
            return None
        return text.removeprefix(self.bos)

    def differs(self, messages: Messages) -> bool:
        """Whether training renders a prompt otherwise."""
        return self.trained(messages) != self.render(messages)


def engine_adds_bos(tokenizer: PreTrainedTokenizerBase, prompt_format: str) -> bool:
    """Whether an engine has to put BOS before a prompt's text: the tokenizer does so, and training's prompts begin so.

    Where a tokenizer adds none but a template writes it, it stays in the text (SmolLM2's BOS is also its header).
    """
    bos, begins = tokenizer.bos_token_id, tokenizer("x").input_ids
    if bos is None or not begins or begins[0] != bos:
        return False
    if prompt_format == "text":
        return text_prompt(tokenizer, "x")[0] == bos
    try:
        text = Template(tokenizer).render("", [{"role": "user", "content": "x"}], is_prompt=True)
    except RowError:
        return False
    return text.startswith(str(tokenizer.bos_token))


def derive(tokenizer: PreTrainedTokenizerBase, rendered_on: date | None = None) -> TurnFormat:
    """Find the format of a tokenizer's chat template.

    Args:
        rendered_on: the date that the template sees as today.

    Raises:
        InputError: the tokenizer has no template, or it leaves out or repeats a plain question or answer.
    """
    template = Template(tokenizer, rendered_on)
    bos = str(tokenizer.bos_token) if engine_adds_bos(tokenizer, "chat") else ""
    turns = TurnFormat({}, bos, template=template)
    asked = _conversation(with_system=False)
    _take(turns, asked)
    _take_system(turns)
    for role in ROLES:
        _take_strips(turns, role)
    other = TurnFormat({}, turns.bos, template=Template(tokenizer, date(1999, 4, 9)))
    turns.has_date = other.trained(asked) != turns.trained(asked)
    return turns


def _conversation(*, with_system: bool) -> Messages:
    roles = ("system", "user", "assistant", "user", "assistant", "user")
    chat = [{"role": role, "content": word} for role, word in zip(roles, _WORDS, strict=True)]
    return chat if with_system else chat[1:]


def _take(turns: TurnFormat, messages: Messages) -> None:
    """Add what stands between the messages of a conversation; the first of its kind counts."""
    text = turns.trained(messages)
    if text is None:
        raise InputError(
            "the chat template refuses a question, an answer and a question", allowed="a template of turns"
        )
    pieces, at = [], 0
    for message in messages:
        found = text.find(message["content"], at)
        if found < 0 or text.count(message["content"]) != 1:
            raise InputError(
                "the chat template cannot be written for Ollama: it leaves out, repeats or moves a turn",
                seen=f"in a conversation of {len(messages)} messages, the {message['role']}'s",
                change="serve the GGUF file with llama-server, which runs the template itself",
            )
        pieces.append(text[at:found])
        at = found + len(message["content"])
    roles = ["", *(message["role"] for message in messages), ""]
    for pair, piece in zip(pairwise(roles), [*pieces, text[at:]], strict=True):
        turns.between.setdefault(pair, piece)


def _take_system(turns: TurnFormat) -> None:
    """Find where the system prompt stands, if there may be one."""
    messages = _conversation(with_system=True)
    text = turns.trained(messages)
    word, last = messages[0]["content"], messages[-1]["content"]
    if text is None or text.count(word) != 1:
        return
    if text.index(word) < text.index(messages[1]["content"]):
        _take(turns, messages)
        return
    begin, end = text.index(word), text.index(word) + len(word)
    usual = turns.between["assistant", "user"]
    lead = text[text.rindex(messages[-2]["content"], 0, begin) + len(messages[-2]["content"]) : begin]
    if lead.startswith(usual):
        turns.system_at_last = (lead.removeprefix(usual), text[end : text.index(last)])


def _take_strips(turns: TurnFormat, role: str) -> None:
    """Find whether white space around a role's texts is stripped: the way that gives training's text."""
    messages = _conversation(with_system=role == "system" and turns.takes_system)
    if all(message["role"] != role for message in messages):
        return
    at = next(index for index, message in enumerate(messages) if message["role"] == role)
    messages[at] = {"role": role, "content": f"{_SPACE}{_WORD}{_SPACE}"}
    for way in ((False, False), (True, True), (True, False), (False, True)):
        turns.strips[role] = way
        if not turns.differs(messages):
            return
    turns.strips[role] = (False, False)
