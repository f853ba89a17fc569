"""Facts for the rules on rows: rows as tokens, their answers, the template, and numbers of the model's config.

    RowFacts.of_config(config, tokenizer, train, validation, report)     each fact is computed once, at its first use

Checks of tokens are array operations (`row_arrays`); checks that need text decode an evenly spaced sample.

*Answer* means consecutive supervised tokens; `ends` are their last tokens that are not white space (`<|im_end|>` even
if a newline follows). A *stop* is an id that ends generation: eos, a special token, or the template's end of a turn.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from solotune.config.run_config import RunConfig
from solotune.dataset.chat.answer_spans import ChatTemplate
from solotune.dataset.chat.control_tokens import ControlTokens
from solotune.dataset.chat.encode import Encoder
from solotune.dataset.chat.tokenizer_files import MAX_TEMPLATE_BYTES
from solotune.diagnosis.facts import row_arrays
from solotune.diagnosis.facts.row_arrays import Side, Whole, evenly, is_pattern, judged
from solotune.errors import InputError
from solotune.hub.model_files import ModelFiles, model_here
from solotune.hub.safe_files import contained
from solotune.regular_files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from solotune.dataset import DataReport, Example

Answer = TypeVar("Answer")
ModelJsons = Mapping[str, Mapping[str, Any]]

NUM_RENDERED = 100
"""Rows to decode for a fault of the format, which shows in a few."""
_PART = re.compile(r" part (\d+)/(\d+)$")
_USER, _ANSWER = "\ufdd0", "\ufdd1"  # characters that no text has
_MODEL_FILES = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class RowSettings:
    """Config keys that decide how rows are truncated, masked and rendered."""

    max_length: int
    overflow: str
    assistant_only_loss: bool
    chat_template_path: str | None = None
    eval_dataset: Any = None


class RowFacts:
    """All facts for rules on rows."""

    def __init__(
        self,
        settings: RowSettings,
        tokenizer: PreTrainedTokenizerBase,
        train: Sequence[Example],
        validation: Sequence[Example],
        report: DataReport,
        model_jsons: ModelJsons,
        template_of_model: Callable[[], ChatTemplate | None] = lambda: None,
        *,
        is_plain_base: bool = False,
    ) -> None:
        """Args:
        train: training rows, at least one.
        validation: held-out rows, or none.
        report: of both, for the counts of dropped and truncated rows.
        model_jsons: config.json and generation_config.json of the base; empty if they are not known.
        template_of_model: the base's own template, if another one is in use.
        is_plain_base: the base's files are known, and have no chat template.
        """
        self.is_plain_base = is_plain_base
        self.settings, self.tokenizer, self.report = settings, tokenizer, report
        self._rows, self._model_jsons, self._template_of_model = (train, validation), model_jsons, template_of_model
        self.train, self.validation = Side.of(judged(train)), Side.of(judged(validation))
        self.family = str(model_jsons.get("config.json", {}).get("model_type", ""))
        self._known: dict[Any, Any] = {}
        self._blank_of: dict[int, bool] = {}

    @classmethod
    def of_config(
        cls,
        config: RunConfig,
        tokenizer: PreTrainedTokenizerBase,
        train: Sequence[Example],
        validation: Sequence[Example],
        report: DataReport,
        base: ModelFiles | None = None,
    ) -> RowFacts:
        """The facts on rows that were prepared with a config.

        Args:
            base: files of the base model; None: they are looked for on this machine.
        """
        base = base or model_here(config.model_name_or_path, config.model_revision)

        own = chat_template_of(base)

        def template_of_model() -> ChatTemplate | None:
            return with_template(tokenizer, own, report)

        settings = RowSettings(**{name: getattr(config, name) for name in RowSettings.__dataclass_fields__})
        return cls(
            settings,
            tokenizer,
            train,
            validation,
            report,
            model_jsons(base),
            template_of_model,
            is_plain_base=base is not None and own is None,
        )

    def once(self, question: Callable[[RowFacts], Answer]) -> Answer:
        """`question(self)`, computed once for all rules."""
        if question not in self._known:
            self._known[question] = question(self)
        return self._known[question]

    # --- all rows, and those that are judged

    @cached_property
    def whole(self) -> tuple[Whole, Whole]:
        """All rows of training and of validation."""
        return Whole.of(self._rows[0]), Whole.of(self._rows[1])

    @property
    def is_sample(self) -> bool:
        """Whether only a sample of the training rows is judged."""
        return len(self.train.rows) < len(self._rows[0])

    def stretches(self) -> Iterator[Side]:
        """All training rows, in chunks."""
        if not self.is_sample:
            yield self.train
            return
        for begin in range(0, len(self._rows[0]), 256):
            yield Side.of(self._rows[0][begin : begin + 256])

    def dropped(self, reason: str) -> int:
        """Rows dropped for a reason; for a sample, its proportional part."""
        return round(self.report.dropped[reason] * len(self.train.rows) / max(len(self._rows[0]), 1))

    # --- the tokenizer

    @cached_property
    def control(self) -> ControlTokens:
        """The tokenizer's control tokens."""
        return ControlTokens(self.tokenizer)

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder that `solotune.dataset` uses."""
        return Encoder(self.tokenizer)

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The chat template in use; None for a tokenizer without one."""
        return ChatTemplate(self.tokenizer, self.report.day) if self.tokenizer.chat_template is not None else None

    @cached_property
    def own_template(self) -> ChatTemplate | None:
        """The model's template, if another one is in use: a file of the user, or what another trainer has set."""
        return self._template_of_model()

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Special ids of the tokenizer, and its bos, eos, pad and unk."""
        added = self.tokenizer.added_tokens_decoder
        return frozenset(self.tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}

    @cached_property
    def turn_end_ids(self) -> frozenset[int]:
        """Last id of each text that the template writes after an assistant turn, and eos."""
        spellings = self.template.terminators if self.template else ()
        eos = {self.eos_id} if self.eos_id is not None else set()
        return frozenset(self.encode(spelling)[-1] for spelling in spellings) | eos

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that can end generation."""
        return self.turn_end_ids | self.special_ids

    def named_id(self, name: Literal["bos", "eos", "pad", "unk"]) -> int | None:
        """The tokenizer's bos, eos, pad or unk; of a list, the first."""
        found: Any = getattr(self.tokenizer, f"{name}_token_id")
        return next(iter(found), None) if isinstance(found, list) else found

    @property
    def eos_id(self) -> int | None:
        """The tokenizer's end of text."""
        return self.named_id("eos")

    def encode(self, text: str) -> list[int]:
        """Ids of a text without special tokens added."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: np.ndarray) -> str:
        """The text of some ids, without clean-up."""
        text = self.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
        return text if isinstance(text, str) else "".join(text)

    def spelled(self, index: Any) -> str:
        """The token string of an id in the vocabulary."""
        return str(self.tokenizer.convert_ids_to_tokens(int(index)))

    def is_blank(self, ids: np.ndarray) -> np.ndarray:
        """bool, one per id: its text is only white space."""
        distinct, inverse = np.unique(ids, return_inverse=True)
        for index in map(int, distinct):
            if index not in self._blank_of:
                text = self.decode(np.array([index]))
                self._blank_of[index] = bool(text) and not text.strip()
        return np.array([self._blank_of[int(index)] for index in distinct], dtype=bool)[inverse]

    def last_of_answers(self, side: Side) -> np.ndarray:
        """int64 (A,): position of each answer's last token that is not white space (templates end turns with `\\n`)."""
        return self._before_blanks(side, side.begins, side.ends - 1)

    def _before_blanks(self, side: Side, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        for _ in range(4 if len(last) else 0):  # no template writes more white-space tokens after an end of turn
            last = np.where((last > first) & self.is_blank(side.ids[last]), last - 1, last)
        return last

    def is_cut(self, side: Side) -> np.ndarray:
        """bool (R,): the row is truncated: it fills `max_length` without an end, or is a part before another part."""
        last = self._before_blanks(side, side.starts[:-1], side.starts[1:] - 1)
        cut = (side.lengths >= self.settings.max_length) & ~np.isin(side.ids[last], list(self.stop_ids))
        if self.settings.overflow == "split":
            parts = [_PART.search(row.where) for row in side.rows]
            cut |= np.array([part is not None and part[1] != part[2] for part in parts], dtype=bool)
        return cut

    # --- rows as text

    @cached_property
    def chats(self) -> list[int]:
        """Training rows that are chats, at most NUM_READ, evenly spaced."""
        return evenly([r for r, row in enumerate(self.train.rows) if row.messages], row_arrays.NUM_READ)

    @cached_property
    def is_chat(self) -> bool:
        """Whether the rows are chats; all rows of a run have one format."""
        return bool(self.train.rows) and bool(self.train.rows[0].messages)

    def sample(self, side: Side, *, whole: bool = True) -> list[int]:
        """Rows for decoding, evenly spaced: chats, with `whole` only those that were not truncated.

        If rows were truncated (or several have exactly `max_length`, since other trainers do not tell), one of this
        length is left out even if it ends with a stop: it may have been truncated between two turns or at its start.
        """
        fits = ~self.is_cut(side) if whole else np.ones(len(side.rows), bool)
        full = side.lengths >= self.settings.max_length
        if whole and (self.report.num_truncated or is_pattern(full.sum(), len(full), 0.05)):
            fits &= ~full
        return evenly([r for r, row in enumerate(side.rows) if row.messages and fits[r]], row_arrays.NUM_DECODED)

    @cached_property
    def answers(self) -> list[tuple[int, str]]:
        """(row, last answer as text) of the training rows: of a chat its message, else its supervised tokens.

        A row with neither is left out: its answer is not empty, but was not found.
        """
        rows = self.chats or evenly(range(len(self.train.rows)), row_arrays.NUM_READ)
        return [(row, self._answer_of(row)) for row in rows if self.train.num_labels[row] or self._is_answered(row)]

    def _is_answered(self, row: int) -> bool:
        return any(message["role"] == "assistant" for message in self.train.rows[row].messages)

    def _answer_of(self, row: int) -> str:
        example = self.train.rows[row]
        for message in reversed(example.messages):
            if message["role"] == "assistant":
                calls = message.get("tool_calls") or message.get("function_call")
                said = message["content"] or message.get("reasoning_content") or ""
                return said or (json.dumps(calls, sort_keys=True, default=str) if calls else "")
        ids = example.input_ids[example.loss_mask]
        text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return text if isinstance(text, str) else "".join(text)

    # --- the model's own numbers

    @cached_property
    def num_embeddings(self) -> int | None:
        """Rows of the embedding matrix by config.json; None if it is missing."""
        found = self._model_jsons["config.json"]
        size = (found.get("text_config") or found).get("vocab_size")
        return size if isinstance(size, int) and size > 0 else None

    @property
    def num_positions(self) -> int | None:
        """The longest row that the model was made for, by config.json; None if it does not say."""
        found = self._model_jsons["config.json"]
        found = found.get("text_config") or found
        size = found.get("max_position_embeddings", found.get("n_positions"))
        return size if isinstance(size, int) and size > 0 else None

    def model_ids(self, key: str) -> set[int]:
        """`eos_token_id` or `bos_token_id` by generation_config.json, else config.json."""
        return self._ids_by(self.where_from(key), key)

    def all_model_ids(self, key: str) -> set[int]:
        """The same by both files."""
        return self._ids_by("generation_config.json", key) | self._ids_by("config.json", key)

    def where_from(self, key: str) -> str:
        """The file that `model_ids` reads: the first that has the key, as in transformers."""
        names = ("generation_config.json", "config.json")
        return next((name for name in names if self._ids_by(name, key)), names[-1])

    def _ids_by(self, name: str, key: str) -> set[int]:
        found = self._model_jsons[name]
        value = found.get(key, (found.get("text_config") or {}).get(key))
        return {v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)}


def with_template(tokenizer: PreTrainedTokenizerBase, template: str | None, report: DataReport) -> ChatTemplate | None:
    """The base's own template; None if there is none, or if it is the tokenizer's."""
    if not template or template == tokenizer.chat_template:
        return None
    plain = copy.copy(tokenizer)
    plain.chat_template = template
    return ChatTemplate(plain, report.day)


def chat_template_of(base: ModelFiles | None) -> str | None:
    """The chat template in the files of a base; None without one."""
    if base is None:
        return None
    with contextlib.suppress(OSError, UnicodeError, InputError):
        return read_text(contained(base.folder, "chat_template.jinja"), MAX_TEMPLATE_BYTES)
    found = base.json_or_empty("tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several, with names
        found = next(
            (one.get("template") for one in found if isinstance(one, dict) and one.get("name") == "default"), None
        )
    return found if isinstance(found, str) else None


def pieces_of_template(facts: RowFacts) -> tuple[str, str, str] | None:
    """The template's text before a question, between it and the answer, and after; None if it fails."""
    return None if facts.template is None else pieces_of(facts.template)


def pieces_of(template: ChatTemplate) -> tuple[str, str, str] | None:
    """`pieces_of_template` of a given template."""
    chat = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = template.raw("the probe", chat, None, is_prompt=False)
    except InputError:
        return None
    header, _, rest = text.partition(_USER)
    between, found, end = rest.partition(_ANSWER)
    return (header, between, end) if found else None


def is_in_rows(facts: RowFacts, between: str) -> bool:
    """Whether a row has the header of an answer in this text between question and answer (true without a header).

    The end of the question's turn does not count: if it is missing, that is another fault (F10).
    """
    rows = evenly(range(len(facts.train.rows)), NUM_RENDERED)
    header = between.strip()
    for template in (facts.own_template, facts.template):
        for end in template.terminators if template else ():
            header = header.removeprefix(end).strip()
    texts = ("".join(facts.decode(facts.train.rows[r].input_ids).split()) for r in rows)
    header = "".join(header.split())  # with its case: `ASSISTANT:` is another format than `Assistant:`
    return not header or any(header in text for text in texts)


def rendered_prompt(facts: RowFacts, messages: list[dict[str, Any]], tools: Any) -> np.ndarray | None:
    """Ids of the prompt that generation gets for these messages; None if the template refuses them."""
    if facts.template is None:
        return None
    try:
        rendered = facts.template.render_prompt(messages, tools)
        return facts.encoder.encode([rendered], ["the prompt"])[0][0]
    except InputError:
        return None


def model_jsons(base: ModelFiles | None) -> dict[str, dict[str, Any]]:
    """config.json and generation_config.json of the base; empty where they are not on this machine."""
    return {name: {} if base is None else base.json_or_empty(name) for name in _MODEL_FILES}
