"""What training gets of a row: ids and a mask, with what a person needs to recognise it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from solotune.dataset.report import DataReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Example:
    """One row as the model sees it: `label = input_ids where supervised else -100`."""

    input_ids: np.ndarray
    """int32 (T,)"""
    supervised: np.ndarray
    """bool (T,)"""
    where: str
    """The row's place: `chats.jsonl:17`, `owner/name[17]`; with `overflow: split` also `chats.jsonl:17 part 2/3`."""
    messages: list[dict[str, Any]]
    """The normalised messages, for showing and generating; empty for plain text and for later parts of a row."""
    tools: list[dict[str, Any]] | None = None
    """The tool definitions that were rendered with the messages."""
    weights: np.ndarray | None = None
    """float32 (T,), how much each token's loss counts: above 0 where supervised, else 0; None where that is 1 for all.
    """

    @property
    def total_weight(self) -> float:
        """Sum of the weights of the labels (the first token is none, since nothing predicts it)."""
        if self.weights is None:
            return int(np.count_nonzero(self.supervised[1:]))
        return float(self.weights[1:][self.supervised[1:]].sum(dtype=np.float64))

    @property
    def prompt_ids(self) -> np.ndarray:
        """The ids before the last answer, to generate it anew from; empty for a row that is learned whole."""
        begins = np.flatnonzero(self.supervised & ~np.concatenate(([False], self.supervised[:-1])))
        return self.input_ids[: begins[-1]] if len(begins) and begins[-1] > 1 else self.input_ids[:0]

    def pieces(self, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """The row in stretches that are learned alike: `[{"text": ..., "supervised": ..., "ids": [...]}, ...]`.

        A stretch of a row with weights has its `weight` too.
        """
        weights = self.supervised.astype(np.float32) if self.weights is None else self.weights
        edges = np.flatnonzero(np.diff(weights)) + 1
        found = []
        for ids, part in zip(np.split(self.input_ids, edges), np.split(weights, edges), strict=True):
            if len(ids):
                piece = {"text": tokenizer.decode(ids), "supervised": bool(part[0]), "ids": ids.tolist()}
                found.append(piece if self.weights is None else {**piece, "weight": float(f"{part[0]:.6g}")})
        return found


@dataclass(frozen=True)
class Prepared:
    """The rows to train on, the rows to validate on, and the account of both."""

    train: list[Example]
    validation: list[Example]
    report: DataReport
    manifest: dict[str, Any] = field(default_factory=dict)
    """What split.json holds: `rows` says for the hash of each distinct row whether it is `train` or `validation`."""
