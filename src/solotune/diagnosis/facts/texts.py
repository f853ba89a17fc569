"""Split batches, as the model gets them, into documents: which positions are real, where each text begins and ends.

A batch marks this in several ways and may be wrong, so its marks and what its ids show are kept apart:

    padding     marked by `attention_mask`; seen as runs of the pad id at the edges of a sequence
    documents   marked by restarting positions, `seq_idx`, `cu_seq_lens_q`, a mask that numbers the texts (1 1 2 2 2)
                or a block mask; seen as starts of known rows inside a sequence

If the pad is also the end of turn, it is ambiguous: of a run at the right edge the first id counts as an end, and a
single one at the left edge as a beginning, unless the mask or a known row says otherwise.

Shape legend: B sequences, T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from solotune.diagnosis.facts.derived import is_ours
from solotune.diagnosis.run_facts import RunFacts

if TYPE_CHECKING:
    import torch

    Batch = Mapping[str, torch.Tensor]

IGNORED = -100  # a label without loss
_WEIGHTS = ("loss_mask", "loss_weights", "label_weights", "token_weights", "weights")
"""Keys under which custom losses find a weight for each token; a label of weight 0 counts as none."""
_KNOWN_BEGINNING = 4  # first ids by which a row is looked up inside a sequence
_RUN, _DIFFERENT = 3, 3
"""Tokens of a run at an edge, and different lengths of such runs, from which it is padding: a text may begin with a few
equal tokens, but not each text with another number of them."""
_KNOWN_ROWS = 2000


@dataclass(frozen=True)
class Document:
    """One text in a batch, from `start` to `end` of its sequence; all arrays cover only its tokens."""

    batch: int
    sequence: int
    start: int
    end: int
    ids: np.ndarray  # int64 (T,)
    labels: np.ndarray  # int64 (T,), -100 where there is no label
    positions: np.ndarray | None  # `position_ids` of the batch

    @property
    def learned(self) -> np.ndarray:
        """bool (T,): the token has a label."""
        return self.labels != IGNORED

    def spans(self) -> list[tuple[int, int]]:
        """Spans of labels: (first, one past the last)."""
        edges = np.flatnonzero(np.diff(np.concatenate(([False], self.learned, [False])).astype(np.int8)))
        return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


@dataclass(frozen=True)
class Line:
    """One sequence of a batch: ids, labels, padding and document starts."""

    ids_T: np.ndarray
    labels_T: np.ndarray
    attended_T: np.ndarray | None  # bool: `attention_mask`
    real_T: np.ndarray  # bool: neither masked nor a run of pads at an edge
    positions_T: np.ndarray | None
    starts: list[int]  # where documents begin, as marked or seen
    claimed: list[int] | None  # document starts that the batch marks; None: no marks

    @property
    def left_pads(self) -> int:
        return int(np.argmax(self.real_T)) if self.real_T.any() else len(self.real_T)


class Batches:
    """The batches of a run, read once.

    Args:
        batches: dicts of tensors; `labels` may be missing (then every real token counts as labelled).
        pad_id: of tokenizer or model; None: only masks show padding.
        single: ids that count as text if they occur once at an edge, even if they are the pad (bos, eos).
        rows: ids of known rows, to find documents inside a sequence that has no marks.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        pad_id: int | None,
        single: frozenset[int] = frozenset(),
        rows: Sequence[np.ndarray] = (),
    ) -> None:
        self.raw = batches
        self.pad_id, self._single = pad_id, single
        self._rows = _by_beginning(rows)

    @classmethod
    def of(cls, run_facts: RunFacts, batches: Sequence[Batch] = ()) -> Batches:
        """The batches of a run, or other batches of the same run."""
        tokenizer = run_facts.tokenizer
        named: Any = {name: _first(getattr(tokenizer, f"{name}_token_id", None)) for name in ("pad", "eos", "bos")}
        pad = named["pad"] if named["pad"] is not None else _first(run_facts.model_config.get("pad_token_id"))
        if (filler := _filler(batches or run_facts.batches, run_facts, pad)) is not None:
            pad = filler
        single = frozenset(i for i in (named["eos"], named["bos"]) if i is not None)
        known = () if is_ours(run_facts) else run_facts.train[:_KNOWN_ROWS]  # solotune's own packs are marked
        rows = [np.asarray(row.input_ids) for row in known]
        return cls(batches or run_facts.batches, pad, single, rows)

    @cached_property
    def sequences(self) -> list[list[Line]]:
        """The sequences of each batch."""
        return [self._sequences_of(batch) for batch in self.raw]

    @cached_property
    def documents(self) -> list[Document]:
        """All documents of all batches, in order."""
        found = [
            document
            for b, lines in enumerate(self.sequences)
            for s, line in enumerate(lines)
            for document in _documents_of(line, b, s)
        ]
        return [d for d in found if d.learned.any() or not self._is_padding(d)]

    def _is_padding(self, document: Document) -> bool:
        """Whether a text is the padding at the end of a pack: of one id, which the tokenizer need not name."""
        is_last = document.start > 0 and document.end == len(self.sequences[document.batch][document.sequence].ids_T)
        return bool((document.ids == (document.ids[0] if is_last else self.pad_id)).all())

    @property
    def is_packed(self) -> bool:
        """Whether a sequence has more than one document."""
        return any(len(line.starts) > 1 for lines in self.sequences for line in lines)

    @property
    def is_padded(self) -> bool:
        """Whether a sequence has padding."""
        return any(not line.real_T.all() for lines in self.sequences for line in lines)

    @property
    def left_padded(self) -> int:
        """Number of sequences with padding before the text."""
        return sum(bool(line.left_pads and line.real_T.any()) for lines in self.sequences for line in lines)

    def _sequences_of(self, batch: Batch) -> list[Line]:
        ids_BT = batch["input_ids"].cpu().numpy()
        mask = batch.get("attention_mask")
        attended_BT = mask.cpu().numpy() if mask is not None and mask.dim() == 2 else None
        labels = batch.get("labels")
        labels_BT = labels.cpu().numpy() if labels is not None else None
        for weights in (batch[key] for key in _WEIGHTS if key in batch):
            if labels_BT is not None and weights.shape == batch["input_ids"].shape:
                labels_BT = np.where(weights.cpu().numpy() == 0, IGNORED, labels_BT)
        positions = batch.get("position_ids")
        position_ids_BT = positions.expand(ids_BT.shape).cpu().numpy() if positions is not None else None
        found = []
        for b, ids_T in enumerate(ids_BT):
            attended_T = attended_BT[b] > 0 if attended_BT is not None else None
            real_T = ~self._pads(ids_T, attended_T) if attended_T is None or attended_T.all() else attended_T
            labels_T = labels_BT[b] if labels_BT is not None else np.where(real_T, ids_T, IGNORED)
            positions_T = position_ids_BT[b] if position_ids_BT is not None else None
            claimed = _claimed_starts(batch, b, len(ids_T), positions_T, attended_BT, real_T)
            starts = self._starts(ids_T, real_T, claimed)
            found.append(Line(ids_T, labels_T, attended_T, real_T, positions_T, starts, claimed))
        return found

    def _pads(self, ids_T: np.ndarray, attended_T: np.ndarray | None) -> np.ndarray:
        """bool (T,): runs of the pad id at the edges."""
        pads_T = np.zeros(len(ids_T), bool)
        if self.pad_id is None or (ids_T == self.pad_id).all():
            return pads_T
        is_pad = ids_T == self.pad_id
        left, right = int(np.argmin(is_pad)), int(np.argmin(is_pad[::-1]))
        keeps = self.pad_id in self._single
        left -= keeps and left == 1  # a beginning of text
        if keeps and right and left + self._size_of_row(ids_T, left) != len(ids_T) - right:
            right -= 1  # an end of text, unless a known row ends before it
        pads_T[:left] = True
        pads_T[len(ids_T) - right :] = right > 0
        return pads_T

    def _starts(self, ids_T: np.ndarray, real_T: np.ndarray, claimed: list[int] | None) -> list[int]:
        first = int(np.argmax(real_T))
        inside = [i for i in claimed or [] if real_T[i] and i > first]
        return [first, *(inside or self._rows_behind(ids_T, first))] if real_T.any() else []

    def _rows_behind(self, ids_T: np.ndarray, first: int) -> list[int]:
        """Starts of known rows that follow a complete row; the last may be truncated.

        Follows rows one after another instead of searching for them: turns of a chat start like rows, and may be rows
        elsewhere.
        """
        found, at = [], first
        while size := self._size_of_row(ids_T, at):
            at += size
            if not self._size_of_row(ids_T, at) and not self._is_cut_row(ids_T, at):
                break
            found.append(at)
        return found

    def _size_of_row(self, ids_T: np.ndarray, at: int) -> int:
        """Length of the longest known row at this position; 0 if there is none."""
        fits = (ids for ids, _ in self._known(ids_T, at) if np.array_equal(ids_T[at : at + len(ids)], ids))
        return max(map(len, fits), default=0)

    def _is_cut_row(self, ids_T: np.ndarray, at: int) -> bool:
        """Whether the rest of the sequence is the start of exactly one known row."""
        left = len(ids_T) - at
        return any(shared < left < len(ids) and np.array_equal(ids_T[at:], ids[:left])
                   for ids, shared in self._known(ids_T, at))  # fmt: skip

    def _known(self, ids_T: np.ndarray, at: int) -> list[tuple[np.ndarray, int]]:
        return self._rows.get(tuple(ids_T[at : at + _KNOWN_BEGINNING].tolist()), [])


def _filler(batches: Sequence[Batch], run_facts: RunFacts, pad: int | None) -> int | None:
    """The id that a collator pads with, if it is another than the pad that is named, or none is: a special token, or 0,
    in runs of different lengths at an edge of the sequences."""
    named = getattr(run_facts.tokenizer, "all_special_ids", ())
    model = (_first(run_facts.model_config.get(f"{name}_token_id")) for name in ("eos", "bos"))
    known = {0, *named, *model} - {pad, None}
    lengths: dict[int, set[int]] = {}
    for ids_T in (row for batch in batches for row in batch["input_ids"].cpu().numpy()):
        for edge_T in (ids_T, ids_T[::-1]):
            edge = int(edge_T[0]) if len(edge_T) else -1
            if pad is not None and edge == pad and len(edge_T) > 1 and edge_T[1] == pad:
                return None
            same = edge_T == edge
            size = len(edge_T) if same.all() else int(np.argmin(same))
            if edge in known and _RUN <= size < len(edge_T):
                lengths.setdefault(edge, set()).add(size)
    found = {edge: sizes for edge, sizes in lengths.items() if len(sizes) >= _DIFFERENT}
    return max(found, key=lambda edge: len(found[edge])) if found else None


def _by_beginning(rows: Sequence[np.ndarray]) -> dict[tuple[int, ...], list[tuple[np.ndarray, int]]]:
    """First ids -> rows that begin with them, each with the largest number of ids that it shares with another row."""
    ordered = sorted({tuple(row.tolist()) for row in rows if len(row) >= _KNOWN_BEGINNING})
    shared = [0, *(_shared(one, other) for one, other in itertools.pairwise(ordered)), 0]
    found: dict[tuple[int, ...], list[tuple[np.ndarray, int]]] = {}
    for number, ids in enumerate(ordered):
        most = max(shared[number], shared[number + 1], _KNOWN_BEGINNING - 1)
        found.setdefault(ids[:_KNOWN_BEGINNING], []).append((np.array(ids), most))
    return found


def _shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Number of equal ids at the start of both."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _first(value: Any) -> int | None:
    return (value[0] if value else None) if isinstance(value, (list, tuple)) else value


def _claimed_starts(
    batch: Batch,
    b: int,
    length: int,
    positions_T: np.ndarray | None,
    attended_BT: np.ndarray | None,
    real_T: np.ndarray,
) -> list[int] | None:
    """Document starts that the batch marks; None if it has no marks."""
    for key in ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens"):
        if (ends := batch.get(key)) is not None:  # over all sequences, concatenated
            ends_S = ends.cpu().numpy().ravel() - b * length
            return [int(i) for i in ends_S if 0 <= i < length]
    if (numbers := batch.get("seq_idx")) is not None:
        return [0, *(np.flatnonzero(np.diff(numbers.cpu().numpy()[b])) + 1).tolist()]
    if attended_BT is not None and attended_BT[b].max(initial=0) > 1:
        return [0, *(np.flatnonzero(np.diff(attended_BT[b])) + 1).tolist()]
    if positions_T is not None and (restarts := np.flatnonzero(np.diff(positions_T) < 0) + 1).size:
        return [0, *(i for i in restarts.tolist() if real_T[i])]
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 4:
        sees_TT = mask[b, 0].cpu()
        sees = (sees_TT if sees_TT.dtype.is_floating_point is False else sees_TT == 0).bool().numpy()
        return [0, *(i for i in range(1, length) if real_T[i] and not sees[i, i - 1])]
    return None


def _documents_of(line: Line, b: int, s: int) -> list[Document]:
    if not line.starts:
        return []
    last = len(line.real_T) - int(np.argmax(line.real_T[::-1]))
    documents = []
    for start, end in zip(line.starts, [*line.starts[1:], last], strict=True):
        places = slice(start, end)
        positions = None if line.positions_T is None else line.positions_T[places]
        documents.append(Document(b, s, start, end, line.ids_T[places], line.labels_T[places], positions))
    return documents
