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

    @property
    def prompt_ids(self) -> np.ndarray:
        """The ids before the last answer, to generate it anew from; empty for a row that is learned whole."""
        begins = np.flatnonzero(self.supervised & ~np.concatenate(([False], self.supervised[:-1])))
        return self.input_ids[: begins[-1]] if len(begins) and begins[-1] > 1 else self.input_ids[:0]

    def pieces(self, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """The row in stretches of equal supervision: `[{"text": ..., "supervised": ..., "ids": [...]}, ...]`."""
        edges = np.flatnonzero(np.diff(self.supervised.astype(np.int8))) + 1
        runs = zip(np.split(self.input_ids, edges), np.split(self.supervised, edges), strict=True)
        return [
            {"text": tokenizer.decode(ids), "supervised": bool(mask[0]), "ids": ids.tolist()}
            for ids, mask in runs
            if len(ids)
        ]


@dataclass(frozen=True)
class Prepared:
    """The rows to train on, the rows to validate on, and the account of both."""

    train: list[Example]
    validation: list[Example]
    report: DataReport
    manifest: dict[str, Any] = field(default_factory=dict)
    """What split.json holds: `rows` says for the hash of each distinct row whether it is `train` or `validation`."""
