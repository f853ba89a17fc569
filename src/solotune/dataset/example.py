"""What training gets of a row: ids and a mask, with what a person needs to recognise it.

    examples = Examples(); examples.append(example); examples[0]     # 12 bytes of each in memory

An example in a `Store` is its ids (int32), its mask (bool), a byte that says whether weights (float32) follow, and the
rest as JSON, one after the other: one read brings a row, and no second file has to fit to it.
"""

from __future__ import annotations

import hashlib
import json
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


@dataclass(frozen=True, slots=True)
class Example:
    """One row as the model sees it: `label = input_ids where loss_mask else -100`."""

    input_ids: np.ndarray
    """int32 (T,)"""
    loss_mask: np.ndarray
    """bool (T,)"""
    where: str
    """The row's place: `chats.jsonl:17`, `owner/name[17]`; with `overflow: split` also `chats.jsonl:17 part 2/3`."""
    messages: list[dict[str, Any]]
    """The normalised messages, for showing and generating; empty for plain text and for later parts of a row."""
    tools: list[dict[str, Any]] | None = None
    """The tool definitions that were rendered with the messages."""
    weights: np.ndarray | None = None
    """float32 (T,), the weight of each token's loss: above 0 where loss_mask, else 0. None: 1 for every loss token."""

    @property
    def total_weight(self) -> float:
        """Sum of the weights of the labels (the first token is none, since nothing predicts it)."""
        if self.weights is None:
            return int(np.count_nonzero(self.loss_mask[1:]))
        return float(self.weights[1:][self.loss_mask[1:]].sum(dtype=np.float64))

    @property
    def prompt_ids(self) -> np.ndarray:
        """The ids before the last answer, to generate it anew from; empty for a row that is learned whole."""
        begins = np.flatnonzero(self.loss_mask & ~np.concatenate(([False], self.loss_mask[:-1])))
        return self.input_ids[: begins[-1]] if len(begins) and begins[-1] > 1 else self.input_ids[:0]

    def pieces(self, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """The row in stretches that are learned alike: `[{"text": ..., "supervised": ..., "ids": [...]}, ...]`.

        A stretch of a row with weights has its `weight` too.
        """
        weights = self.loss_mask.astype(np.float32) if self.weights is None else self.weights
        edges = np.flatnonzero(np.diff(weights)) + 1
        found = []
        for ids, part in zip(np.split(self.input_ids, edges), np.split(weights, edges), strict=True):
            if len(ids):
                piece = {"text": tokenizer.decode(ids), "supervised": bool(part[0]), "ids": ids.tolist()}
                found.append(piece if self.weights is None else {**piece, "weight": float(f"{part[0]:.6g}")})
        return found


class Examples(Sequence[Example]):
    """Examples on disk, each read when it is asked for."""

    def __init__(self, store: Store | None = None, lengths: array[int] | None = None) -> None:
        self.store = Store() if store is None else store
        self.lengths = array("i") if lengths is None else lengths
        """Tokens of each."""
        self._digest = hashlib.sha256()

    def append(self, example: Example) -> None:
        """Adds one.

        Raises:
            StorageError: the disk is full.
        """
        ids, mask = example.input_ids.astype("<i4").tobytes(), example.loss_mask.astype("u1").tobytes()
        weights = b"" if example.weights is None else example.weights.astype("<f4").tobytes()
        rest = json.dumps([example.where, example.messages, example.tools], ensure_ascii=False)
        rest = rest.encode("utf-8", "surrogatepass")
        self.store.append(ids + mask + bytes([example.weights is not None]) + weights + rest)
        self.lengths.append(len(example.input_ids))
        self._digest.update(len(example.input_ids).to_bytes(8, "little") + ids + mask)
        if example.weights is not None:
            self._digest.update(b"weights" + weights)

    def sha256(self) -> str:
        """Over ids, masks and weights of what was appended: equal if the same tokens are learned alike, in order."""
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
        where, messages, tools = json.loads(item[end:].decode("utf-8", "surrogatepass"))
        return Example(ids, mask, where, messages, tools, weights)

    def ids(self) -> Iterator[np.ndarray]:
        """int32 (T,) of each, the rest left unread."""
        begin = 0
        for length, end in zip(self.lengths, self.store.ends, strict=True):
            yield np.frombuffer(self.store.read(begin, begin + 4 * length), "<i4")
            begin = end


def lengths_of(rows: Sequence[Example]) -> Sequence[int]:
    """Tokens of each row."""
    return rows.lengths if isinstance(rows, Examples) else [len(row.input_ids) for row in rows]


def ids_of(rows: Sequence[Example]) -> Iterator[np.ndarray]:
    """int32 (T,) of each row."""
    return rows.ids() if isinstance(rows, Examples) else (row.input_ids for row in rows)


@dataclass(frozen=True)
class Prepared:
    """The rows to train on, the rows to validate on, and the account of both."""

    train: Sequence[Example]
    validation: Sequence[Example]
    report: DataReport
    manifest: Manifest = field(default_factory=Manifest)
    """What split.json holds."""
    key: str | None = None
    """The name of the cache's entry, where there is one."""

    def with_findings(self, findings: Iterable[dict[str, Any]]) -> Prepared:
        """The same rows, whose account also has what the rules on rows say of them."""
        return replace(self, report=replace(self.report, findings=list(findings)))
