"""What every rule looks at: the rows as tokens, the answers found in them, the template, the model's own numbers.

    Facts(config, tokenizer, train, validation, report)     each fact is computed once, when a rule first asks

The ids of the rows that are judged lie in one array and every question about tokens is an array operation: 5,000 chats
of 1,200 tokens are six million ids. Those are all rows up to 20,000 rows and eight million tokens; of more, evenly
spaced stretches (`Side`). What one row alone makes wrong, a leak or an id without an embedding, is asked of all
(`Whole`). Questions that need text decode an evenly spaced sample.

*Answer* below means a run of supervised tokens; `ends` are their last tokens that are not blank (`<|im_end|>` though a
newline follows it). A *stop* is an id that generation ends at: eos, a special token, what the template ends turns with.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from solotune.config import RunConfig
from solotune.dataset.chat import ChatTemplate
from solotune.dataset.control import ControlTokens
from solotune.dataset.encode import Encoder
from solotune.dataset.example import ids_of, lengths_of
from solotune.dataset.tokenizer import load_tokenizer
from solotune.errors import InputError
from solotune.model_source import model_here

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from solotune.dataset.example import Example
    from solotune.dataset.report import DataReport

_PART = re.compile(r" part (\d+)/(\d+)$")

Answer = TypeVar("Answer")
Severity = Literal["error", "warning", "info"]

NUM_DECODED = 300
"""Rows decoded for a question about text. A share of 5 % is then known to within 2.5 points, and 5,000 rows cost less
than a second."""
NUM_READ = 20_000
"""Rows that are judged: all of most files, and a fifth of a second per rule where there are more."""
NUM_TOKENS = 8 << 20
"""Tokens of the rows that are judged: 40 MB, and ten times that while the longest of the rules works."""
STRETCH = 16
"""Rows that follow one another in a sample, so that a rule can compare neighbours."""
MIN_ROWS = 3
"""One or two odd rows are not a pattern; also what keeps a share of a tiny file from being one."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault seen in the data, with its evidence and the one change that mends it."""

    code: str
    slug: str
    suspect: str
    severity: Severity
    message: str
    evidence: dict[str, Any]
    fix: str

    def to_json(self) -> dict[str, Any]:
        """The shape that `data --json`, data.json and the diagnosis share."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class Side:
    """One side of the split as arrays. R rows, N tokens in all, A answers (runs of supervised tokens)."""

    rows: Sequence[Example]
    ids: np.ndarray
    """int32 (N,), all rows one after the other"""
    supervised: np.ndarray
    """bool (N,)"""
    starts: np.ndarray
    """int64 (R + 1,): row r is ids[starts[r] : starts[r + 1]]"""
    begins: np.ndarray
    """int64 (A,): position in `ids` of the first token of an answer"""
    ends: np.ndarray
    """int64 (A,): position after its last token"""
    row_of: np.ndarray
    """int64 (A,): the row that an answer stands in"""

    @classmethod
    def of(cls, rows: Sequence[Example]) -> Side:
        """The arrays of some examples."""
        lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int64)
        starts = np.concatenate(([0], np.cumsum(lengths)))
        ids = np.concatenate([row.input_ids for row in rows]) if rows else np.zeros(0, np.int32)
        supervised = np.concatenate([row.supervised for row in rows]) if rows else np.zeros(0, bool)
        before = np.concatenate(([False], supervised[:-1])) if len(ids) else supervised
        after = np.concatenate((supervised[1:], [False])) if len(ids) else supervised
        is_first, is_last = np.zeros(len(ids) + 1, bool), np.zeros(len(ids) + 1, bool)
        is_first[starts[:-1]], is_last[starts[1:] - 1] = True, True
        begins = np.flatnonzero(supervised & (~before | is_first[:-1]))
        ends = np.flatnonzero(supervised & (~after | is_last[:-1])) + 1
        return cls(rows, ids, supervised, starts, begins, ends, np.searchsorted(starts, begins, side="right") - 1)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 (R,): tokens of each row."""
        return np.diff(self.starts)

    @cached_property
    def num_labels(self) -> np.ndarray:
        """int64 (R,): supervised tokens of each row."""
        return np.diff(np.concatenate(([0], np.cumsum(self.supervised)))[self.starts])

    def places(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The names of the first three of these rows."""
        return [self.rows[int(row)].where for row in rows[:3]]


@dataclass(frozen=True)
class Whole:
    """All rows of a side, as 12 bytes each."""

    rows: Sequence[Example]
    hashes: np.ndarray
    """uint64 (R,): equal for rows with equal ids"""
    largest: np.ndarray
    """int32 (R,): the largest id of each row"""

    @classmethod
    def of(cls, rows: Sequence[Example]) -> Whole:
        """Reads the ids of all rows."""
        hashes, largest = array("Q"), array("i")
        for ids in ids_of(rows):
            hashes.append(int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little"))
            largest.append(int(ids.max(initial=-1)))
        return cls(rows, np.array(hashes, np.uint64), np.array(largest, np.int32))

    def places(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The names of the first three of these rows."""
        return [self.rows[int(row)].where for row in rows[:3]]


class Facts:
    """Everything a rule may ask."""

    def __init__(
        self,
        config: RunConfig,
        tokenizer: PreTrainedTokenizerBase,
        train: Sequence[Example],
        validation: Sequence[Example],
        report: DataReport,
    ) -> None:
        self.config, self.tokenizer, self.report = config, tokenizer, report
        self._rows = train, validation
        self.train, self.validation = Side.of(judged(train)), Side.of(judged(validation))
        self._known: dict[Any, Any] = {}
        self._blank_of: dict[int, bool] = {}

    def once(self, question: Callable[[Facts], Answer]) -> Answer:
        """`question(self)`, asked once however many rules ask."""
        if question not in self._known:
            self._known[question] = question(self)
        return self._known[question]

    # --- all rows, and those that are judged

    @cached_property
    def whole(self) -> tuple[Whole, Whole]:
        """All rows, of training and of validation."""
        return Whole.of(self._rows[0]), Whole.of(self._rows[1])

    @property
    def is_sample(self) -> bool:
        """Whether there are more training rows than are judged."""
        return len(self.train.rows) < len(self._rows[0])

    def stretches(self) -> Iterator[Side]:
        """All training rows, some at a time."""
        if not self.is_sample:
            yield self.train
            return
        for begin in range(0, len(self._rows[0]), 256):
            yield Side.of(self._rows[0][begin : begin + 256])

    def dropped(self, reason: str) -> int:
        """Rows dropped for a reason; where a sample is judged, as many as belong to it."""
        return round(self.report.dropped[reason] * len(self.train.rows) / max(len(self._rows[0]), 1))

    # --- the tokenizer

    @cached_property
    def control(self) -> ControlTokens:
        """The tokenizer's control tokens."""
        return ControlTokens(self.tokenizer)

    @cached_property
    def encoder(self) -> Encoder:
        """Encodes as the data door does."""
        return Encoder(self.tokenizer)

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The chat template in use; None for a tokenizer without one."""
        return ChatTemplate(self.tokenizer, self.report.day) if self.tokenizer.chat_template is not None else None

    @cached_property
    def own_template(self) -> ChatTemplate | None:
        """The model's, where a file of the user's (`chat_template_path`) takes its place."""
        if self.config.chat_template_path is None:
            return None
        try:
            without = self.config.replaced("findings", chat_template_path=None)
            tokenizer = load_tokenizer(without, model_here(self.config))
            return ChatTemplate(tokenizer, self.report.day) if tokenizer.chat_template is not None else None
        except InputError:  # it is not here
            return None

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that the tokenizer calls special or names (bos, eos, pad, unk)."""
        added = self.tokenizer.added_tokens_decoder
        return frozenset(self.tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}

    @cached_property
    def turn_end_ids(self) -> frozenset[int]:
        """Last ids of what the template ends an assistant turn with, and eos."""
        spellings = self.template.terminators if self.template else ()
        eos = {self.eos_id} if self.eos_id is not None else set()
        return frozenset(self.encode(spelling)[-1] for spelling in spellings) | eos

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that can end generation."""
        return self.turn_end_ids | self.special_ids

    def named_id(self, name: Literal["bos", "eos", "pad", "unk"]) -> int | None:
        """The tokenizer's own bos, eos, pad or unk; of several (a list is allowed), the first."""
        found: Any = getattr(self.tokenizer, f"{name}_token_id")
        return next(iter(found), None) if isinstance(found, list) else found

    @property
    def eos_id(self) -> int | None:
        """The tokenizer's end of text."""
        return self.named_id("eos")

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: np.ndarray) -> str:
        """The text of some ids, as it is."""
        text = self.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
        return text if isinstance(text, str) else "".join(text)

    def spelled(self, index: Any) -> str:
        """One id as the vocabulary spells it."""
        return str(self.tokenizer.convert_ids_to_tokens(int(index)))

    def is_blank(self, ids: np.ndarray) -> np.ndarray:
        """Which of the ids are white space alone."""
        distinct, inverse = np.unique(ids, return_inverse=True)
        for index in map(int, distinct):
            if index not in self._blank_of:
                text = self.decode(np.array([index]))
                self._blank_of[index] = bool(text) and not text.strip()
        return np.array([self._blank_of[int(index)] for index in distinct], dtype=bool)[inverse]

    def last_of_answers(self, side: Side) -> np.ndarray:
        """int64 (A,): position of the last token of each answer that is not blank (templates end turns with `\\n`)."""
        return self._before_blanks(side, side.begins, side.ends - 1)

    def _before_blanks(self, side: Side, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        for _ in range(4 if len(last) else 0):  # more blank tokens than that after an end of turn no template writes
            last = np.where((last > first) & self.is_blank(side.ids[last]), last - 1, last)
        return last

    def is_cut(self, side: Side) -> np.ndarray:
        """bool (R,): something was cut off: the row fills `max_length` without ending, or is a part with a next one."""
        last = self._before_blanks(side, side.starts[:-1], side.starts[1:] - 1)
        cut = (side.lengths >= self.config.max_length) & ~np.isin(side.ids[last], list(self.stop_ids))
        if self.config.overflow == "split":
            parts = [_PART.search(row.where) for row in side.rows]
            cut |= np.array([part is not None and part[1] != part[2] for part in parts], dtype=bool)
        return cut

    # --- rows as text

    @cached_property
    def chats(self) -> list[int]:
        """Training rows that are chats, at most NUM_READ, evenly spaced."""
        return evenly([r for r, row in enumerate(self.train.rows) if row.messages], NUM_READ)

    @cached_property
    def is_chat(self) -> bool:
        """Whether the rows are chats; a run has one format."""
        return bool(self.train.rows) and bool(self.train.rows[0].messages)

    def sample(self, side: Side, *, whole: bool = True) -> list[int]:
        """Rows for decoding, evenly spaced: chats, and unless asked otherwise only those that were not cut.

        Where rows were truncated, one that fills `max_length` is left out even if it ends with a stop: the cut may
        have fallen between two turns.
        """
        fits = ~self.is_cut(side) if whole else np.ones(len(side.rows), bool)
        if whole and self.report.num_truncated:
            fits &= side.lengths < self.config.max_length
        return evenly([r for r, row in enumerate(side.rows) if row.messages and fits[r]], NUM_DECODED)

    @cached_property
    def answers(self) -> list[tuple[int, str]]:
        """(row, last answer as text) of the training rows: of a chat its message, else what is supervised."""
        rows = self.chats or evenly(range(len(self.train.rows)), NUM_READ)
        return [(row, self._answer_of(row)) for row in rows]

    def _answer_of(self, row: int) -> str:
        example = self.train.rows[row]
        for message in reversed(example.messages):
            if message["role"] == "assistant":
                return message["content"] or json.dumps(message.get("tool_calls"), sort_keys=True, default=str)
        ids = example.input_ids[example.supervised]
        text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return text if isinstance(text, str) else "".join(text)

    # --- the model's own numbers

    @cached_property
    def model_files(self) -> dict[str, dict[str, Any]]:
        """config.json and generation_config.json of the model, as far as they lie on this machine; else empty."""
        files = model_here(self.config)
        names = ("config.json", "generation_config.json")
        return {name: {} if files is None else files.json_or_empty(name) for name in names}

    @cached_property
    def num_embeddings(self) -> int | None:
        """Rows of the embedding matrix by config.json; None where that is not at hand."""
        found = self.model_files["config.json"]
        size = (found.get("text_config") or found).get("vocab_size")
        return size if isinstance(size, int) and size > 0 else None

    def model_ids(self, key: str) -> set[int]:
        """`eos_token_id` or `bos_token_id` by generation_config.json, else config.json: one id, a list, or none."""
        for name in ("generation_config.json", "config.json"):
            found = self.model_files[name]
            value = found.get(key, (found.get("text_config") or {}).get(key))
            if value is not None:
                return {v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)}
        return set()


def judged(rows: Sequence[Example]) -> list[Example]:
    """All of the rows, or evenly spaced stretches of them with about NUM_READ rows or NUM_TOKENS tokens in all."""
    num_tokens = sum(lengths_of(rows))
    share = min(NUM_READ / max(len(rows), 1), NUM_TOKENS / max(num_tokens, 1))
    if share >= 1:
        return list(rows)
    num_stretches = max(1, int(share * len(rows) / STRETCH))
    begins = np.linspace(0, max(len(rows) - STRETCH, 0), num_stretches).astype(int)
    return [row for begin in begins for row in rows[int(begin) : int(begin) + STRETCH]]


def evenly(rows: Sequence[int], count: int) -> list[int]:
    """At most `count` of the rows, evenly spaced, the first and the last among them."""
    if len(rows) <= count:
        return list(rows)
    return [rows[i] for i in np.linspace(0, len(rows) - 1, count).astype(int)]


def squeezed(text: str) -> str:
    """For finding a text in a rendering: templates trim and indent, tokenizers fold and may change blanks."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def percent(part: float, whole: float) -> str:
    """`12 %`, `0.4 %`."""
    share = 100 * part / whole if whole else 0.0
    return f"{share:.1f} %" if share < 10 else f"{share:.0f} %"


def is_pattern(count: int, whole: int, share: float) -> bool:
    """Whether `count` of `whole` rows is at least that share, and more than an odd row or two (or all)."""
    return count >= share * whole and (count >= MIN_ROWS or count == whole > 0)


def rendered_prompt(facts: Facts, messages: list[dict[str, Any]], tools: Any) -> np.ndarray | None:
    """What generation would be given for these messages; None where the template refuses them."""
    if facts.template is None:
        return None
    try:
        rendered = facts.template.render_prompt(messages, tools)
        return facts.encoder.encode([rendered], ["the prompt"])[0][0]
    except InputError:
        return None
