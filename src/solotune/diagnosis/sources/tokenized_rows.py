"""Read rows that a trainer has saved as token ids: `Dataset.save_to_disk`, axolotl's `dataset_prepared_path`,
LLaMA-Factory's `tokenized_path`.

    made = read([Path("last_run_prepared/1f3a")], batch_size=2)
    made.examples, made.batches         None: the rows are texts, which have to be rendered

These are the labels that the training saw, so nothing has to be rebuilt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from solotune.dataset import Example
from solotune.dataset.readers.source import Source
from solotune.diagnosis.facts.texts import IGNORED
from solotune.errors import SolotuneError

NUM_ROWS = 5000
NUM_BATCHES = 8
MAX_TOKENS = 1 << 20
_MASKS = ("completion_mask", "assistant_masks")


@dataclass(frozen=True)
class Tokenized:
    """Rows as ids and labels, and the first batches of them, padded on the right."""

    examples: list[Example]
    batches: list[dict[str, torch.Tensor]]


def read(paths: Sequence[Path], batch_size: int) -> Tokenized | None:
    """The rows of saved datasets; None if they have no token ids or cannot be read."""
    try:
        rows = list(islice(Source.of("dataset", [str(path) for path in paths], "train"), NUM_ROWS))
    except (SolotuneError, OSError, ValueError):
        return None
    pairs = []
    for row in rows:
        pair = _pair(row.values)
        if pair is None:
            return None
        pairs.append((*pair, row.where))
    if not pairs:
        return None
    examples = [Example(ids.astype(np.int32), labels != IGNORED, where, []) for ids, labels, where in pairs]
    size = max(1, min(batch_size, 64))
    chunks = [pairs[i : i + size] for i in range(0, min(len(pairs), NUM_BATCHES * size), size)]
    return Tokenized(examples, [_padded([pair[:2] for pair in chunk]) for chunk in chunks])


def _pair(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """int64 ids and labels of a row; None if it has none, or values that are no ids."""
    ids = _ints(row.get("input_ids"))
    if ids is None or not len(ids):
        return None
    if "labels" in row:
        labels = _ints(row["labels"])
        return None if labels is None or len(labels) != len(ids) else (ids, labels)
    mask = next((_ints(row[name]) for name in _MASKS if name in row), np.ones(len(ids), np.int64))
    return None if mask is None or len(mask) != len(ids) else (ids, np.where(mask != 0, ids, IGNORED))


def _ints(value: Any) -> np.ndarray | None:
    if not isinstance(value, list) or len(value) > MAX_TOKENS or not all(type(one) is int for one in value):
        return None
    return np.array(value, np.int64) if all(-(1 << 31) <= one < 1 << 31 for one in value) else None


def _padded(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
    longest = max(len(ids) for ids, _ in pairs)
    ids_BT = torch.zeros((len(pairs), longest), dtype=torch.int64)
    labels_BT, mask_BT = torch.full_like(ids_BT, IGNORED), torch.zeros_like(ids_BT)
    for b, (ids, labels) in enumerate(pairs):
        ids_BT[b, : len(ids)], labels_BT[b, : len(ids)] = torch.as_tensor(ids), torch.as_tensor(labels)
        mask_BT[b, : len(ids)] = 1
    return {"input_ids": ids_BT, "labels": labels_BT, "attention_mask": mask_BT}
