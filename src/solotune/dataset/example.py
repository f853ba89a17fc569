"""Examples: token ids and loss mask of a row, with what a person needs to recognise the row.

    examples = Examples(); examples.append(example); examples[0]     # 12 bytes per example in memory

An example is stored as its ids (int32), its loss mask (bool), a byte that says whether weights (float32) follow, and
the rest as JSON, in one record: one read returns a row, and no second file has to be kept consistent.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from solotune.dataset.data_report import DataReport
from solotune.dataset.row_store import Store
from solotune.dataset.split.split_manifest import Manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LATER_PART = re.compile(r" part (?!1/)\d+/\d+$")


@dataclass(frozen=True, slots=True)
class Example:
    """One row as the model sees it: `label = input_ids where loss_mask else -100`."""

    input_ids: np.ndarray
    """int32 (T,)"""
    loss_mask: np.ndarray
    """bool (T,)"""
    where: str
    """Where the row is: `chats.jsonl:17`, `owner/name[17]`; with `overflow: split` also `chats.jsonl:17 part 2/3`."""
    messages: list[dict[str, Any]]
    """The normalised messages, for showing and generating; empty for plain text and for later parts of a row."""
    tools: list[dict[str, Any]] | None = None
    """The tool definitions that were rendered with the messages."""
    weights: np.ndarray | None = None
    """float32 (T,), the weight of each token's loss: above 0 where loss_mask, else 0. None: 1 for every loss token."""
    group: str | None = None
    """Rows that belong together share it (pieces of one conversation, near-duplicates); None: not known."""

    @property
    def total_weight(self) -> float:
        """Sum of the weights of the labels (the first token is no label, since nothing predicts it)."""
        if self.weights is None:
            return int(np.count_nonzero(self.loss_mask[1:]))
        return float(self.weights[1:][self.loss_mask[1:]].sum(dtype=np.float64))

    @property
    def is_later_part(self) -> bool:
        """Whether the row begins in the middle of one that `overflow: split` has split."""
        return _LATER_PART.search(self.where) is not None

    @property
    def last_loss_token(self) -> int | None:
        """The id of the last token that is trained on; None if there is none."""
        places = np.flatnonzero(self.loss_mask)
        return int(self.input_ids[places[-1]]) if len(places) else None

    @property
    def prompt_ids(self) -> np.ndarray:
        """The ids before the last answer, to generate an answer from; empty for a row that is trained on completely."""
        begins = np.flatnonzero(self.loss_mask & ~np.concatenate(([False], self.loss_mask[:-1])))
        return self.input_ids[: begins[-1]] if len(begins) and begins[-1] > 1 else self.input_ids[:0]

    def pieces(self, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """Split the row into pieces of equal loss weight: `[{"text": ..., "supervised": ..., "ids": [...]}, ...]`.

        In a row with weights each piece also has its `weight`.
        """
        weights = self.loss_mask.astype(np.float32) if self.weights is None else self.weights
        edges = np.flatnonzero(np.diff(weights)) + 1
        pieces = []
        for ids, part in zip(np.split(self.input_ids, edges), np.split(weights, edges), strict=True):
            if len(ids):
                piece = {"text": tokenizer.decode(ids), "supervised": bool(part[0]), "ids": ids.tolist()}
                pieces.append(piece if self.weights is None else {**piece, "weight": float(f"{part[0]:.6g}")})
        return pieces


class Examples(Sequence[Example]):
    """Sequence of examples on disk, each read on access."""

    def __init__(self, store: Store | None = None, lengths: array[int] | None = None) -> None:
        self.store = Store() if store is None else store
        self.lengths = array("i") if lengths is None else lengths
        """Number of tokens of each example."""
        self._digest = hashlib.sha256()

    def append(self, example: Example) -> None:
        """Append an example.

        Raises:
            StorageError: the disk is full.
        """
        ids, mask = example.input_ids.astype("<i4").tobytes(), example.loss_mask.astype("u1").tobytes()
        weights = b"" if example.weights is None else example.weights.astype("<f4").tobytes()
        rest = json.dumps([example.where, example.messages, example.tools, example.group], ensure_ascii=False)
        rest = rest.encode("utf-8", "surrogatepass")
        self.store.append(ids + mask + bytes([example.weights is not None]) + weights + rest)
        self.lengths.append(len(example.input_ids))
        self._digest.update(len(example.input_ids).to_bytes(8, "little") + ids + mask)
        if example.weights is not None:
            self._digest.update(b"weights" + weights)

    def sha256(self) -> str:
        """Hash of ids, loss masks and weights of all appended examples, in order."""
        return self._digest.hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, row: int) -> Example: ...
    @overload
    def __getitem__(self, row: slice) -> list[Example]: ...
    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[one] for one in range(*row.indices(len(self)))]
        length, item = self.lengths[row], self.store[row]
        ids, mask = np.frombuffer(item, "<i4", length), np.frombuffer(item, bool, length, 4 * length)
        weights, end = None, 5 * length + 1
        if item[5 * length]:
            weights, end = np.frombuffer(item, "<f4", length, end).copy(), end + 4 * length  # a copy is aligned
        where, messages, tools, group = json.loads(item[end:].decode("utf-8", "surrogatepass"))
        return Example(ids, mask, where, messages, tools, weights, group)

    def ids(self) -> Iterator[np.ndarray]:
        """Iterate over the ids, int32 (T,) each, without reading the rest."""
        begin = 0
        for length, end in zip(self.lengths, self.store.ends, strict=True):
            yield np.frombuffer(self.store.read(begin, begin + 4 * length), "<i4")
            begin = end


def lengths_of(rows: Sequence[Example]) -> Sequence[int]:
    """Number of tokens of each row."""
    return rows.lengths if isinstance(rows, Examples) else [len(row.input_ids) for row in rows]


def ids_of(rows: Sequence[Example]) -> Iterator[np.ndarray]:
    """Iterate over the ids of each row, int32 (T,)."""
    return rows.ids() if isinstance(rows, Examples) else (row.input_ids for row in rows)


@dataclass(frozen=True)
class Prepared:
    """Training rows, validation rows, and the data report on both."""

    train: Sequence[Example]
    validation: Sequence[Example]
    report: DataReport
    manifest: Manifest = field(default_factory=Manifest)
    """Content of split.json."""
    key: str | None = None
    """Key of the cache entry, if there is one."""

    def with_findings(self, findings: Iterable[dict[str, Any]]) -> Prepared:
        """Return the same rows with these findings in the report."""
        return replace(self, report=replace(self.report, findings=list(findings)))
