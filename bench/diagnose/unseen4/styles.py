"""The third set's loops by hand, and one more: FastChat's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bench.diagnose.loop import Batch
from bench.diagnose.unseen3.styles import IGNORE, Loader, Nano, Script, Tutor
from bench.diagnose.worlds import Chat


class Turns(Script):
    """As FastChat's train.py: one text, masked turn by turn by counting tokens; the mask is where no pad token is."""

    def __init__(self, made: Any) -> None:
        super().__init__(made)
        if made.tokenizer.pad_token is None:  # a token that no text has
            self.pad = made.tokenizer.convert_tokens_to_ids("[MASK]")

    def encode(self, chat: Chat) -> tuple[list[int], list[int]]:
        shape = self.made.format
        ids = self.ids_of(shape.text(chat))
        if self.made.mask == "all":
            return ids, list(ids)
        labels = [IGNORE] * len(ids)
        at = 0
        for text, learned in shape.pieces(chat):
            count = len(self.ids_of(text))
            if learned:
                labels[at : at + count] = ids[at : at + count]
            at += count
        if at != len(ids):
            self.made.warnings.append(f"WARNING: tokenization mismatch: {at} vs. {len(ids)}. (ignored)")
            labels = [IGNORE] * len(ids)
        return ids, labels

    def batches(self, rows: list[tuple[list[int], list[int]]]) -> Iterator[Batch]:
        """Whole batches alone, as drop_last does."""
        for batch in super().batches(rows):
            if len(batch["labels"]) == min(self.made.batch, len(rows)):
                yield batch

    def collate(self, rows: list[tuple[list[int], list[int]]]) -> Batch:
        ids_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in rows], True, self.pad)
        labels_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(labels) for _, labels in rows], True, IGNORE)
        return {"input_ids": ids_BT, "labels": labels_BT, "attention_mask": ids_BT.ne(self.pad).long()}


STYLES: tuple[type[Script], ...] = (Nano, Loader, Tutor, Turns)
