"""Near-duplicates: find pairs of texts that share at least 70 % of their word triples, with MinHash and LSH.

    J(a, b) = |A & B| / |A | B|,   A, B the sets of word 3-grams

Method
------
MinHash (Broder 1997): with a random hash h, the minimum of h over A and over B is the same with probability J. Here 128
hashes h_i(x) = (a_i x mod 2**64) >> 32, a_i odd, over 64-bit hashes of the triples: numbers, not strings, since strings
would fill the memory. LSH in 32 bands of 4 finds a pair with J = 0.7 with probability 1 - (1 - 0.7**4)**32 = 0.9998 and
compares few others; every candidate is then checked with the exact J, so there are no false pairs. Fewer, longer bands
(the usual default) miss a quarter of the pairs near the threshold.

Why in numpy
------------
It is ten lines and half a second for 200,000 short chats. Nothing depends on the process (as Python's `hash` of a text
does) or on a library's version, so the split stays the same. The bands, 256 bytes per row, are kept in a `Store` on
disk, since only one of the 32 is needed at a time.

Limits
------
Texts of fewer than five words have too few triples to be near-duplicates; only exact duplicates of them count, and
those are found elsewhere. If many texts fall into one bucket, each is compared with the first 4 of them only: one pair
is enough to join a group, and all pairs of 100,000 rows made from one pattern would take days.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from solotune.dataset.row_store import Store

THRESHOLD = 0.7
_NUM_HASHES, _NUM_BANDS = 128, 32
_CHUNK_ROWS, _CHUNK_TRIPLES = 1000, 1 << 20  # rows whose triples are in memory at a time
_CACHED_ROWS, _CACHED_TRIPLES = 4096, 4 << 20  # cached for the exact comparison: 32 MiB
_MIN_WORDS = 5
_MAX_PARTNERS = 4
_MAX_WORDS = 1 << 20  # cached hashes of words: about 150 MB
# Chinese, Japanese and Korean do not put blanks between words: each character counts as one
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd: mixes the parts of a triple or of a band


def _hash_of(text: str) -> int:
    """64 bits; Python's own `hash` differs from process to process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


_MULTIPLIERS = np.array([_hash_of(f"multiplier {i}") | 1 for i in range(_NUM_HASHES)], np.uint64)


def near_duplicates(texts: Sequence[str], progress: Callable[[int], None] | None = None) -> Iterator[tuple[int, int]]:
    """Yield pairs (i, j), i < j, of texts with J >= 0.7, in order of j; texts must be normalised (`records.folded`).

    Args:
        progress: called with the number of texts hashed so far.
    """
    triples_of = _TriplesOf(texts)
    rows, bands = array("q"), Store()  # an item of the store: uint64 (bands, rows of a chunk)
    chunk: list[np.ndarray] = []
    num_triples = 0
    for row in range(len(texts)):
        if len(triples := triples_of(row)):
            rows.append(row)
            chunk.append(triples)
            num_triples += len(triples)
        is_last = row + 1 == len(texts)
        if chunk and (is_last or len(chunk) == _CHUNK_ROWS or num_triples >= _CHUNK_TRIPLES):
            bands.append(_bands(chunk).T.tobytes())
            chunk, num_triples = [], 0
        if progress is not None and (is_last or (row + 1) % _CHUNK_ROWS == 0):
            progress(row + 1)
    for earlier, later in _candidates(len(rows), lambda band: _read_band(bands, band)):
        a, b = rows[earlier], rows[later]
        if _jaccard(triples_of(a), triples_of(b)) >= THRESHOLD:
            yield a, b


class _TriplesOf:
    """Triples of a row, with a cache of the last rows limited by number of triples, since rows may be long."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self._word_hashes: dict[str, int] = {}
        self._known: OrderedDict[int, np.ndarray] = OrderedDict()
        self._num_known = 0

    def __call__(self, row: int) -> np.ndarray:
        if row in self._known:
            self._known.move_to_end(row)
            return self._known[row]
        triples = self._known[row] = _triples(self._texts[row], self._word_hashes)
        self._num_known += len(triples)
        while self._num_known > _CACHED_TRIPLES or len(self._known) > _CACHED_ROWS:
            self._num_known -= len(self._known.popitem(last=False)[1])
        return triples


def _triples(text: str, word_hashes: dict[str, int]) -> np.ndarray:
    """uint64, sorted, unique."""
    words = _WORDS.findall(text)
    if len(words) < _MIN_WORDS:
        return np.empty(0, np.uint64)
    if len(word_hashes) > _MAX_WORDS:
        word_hashes.clear()
    for word in words:
        if word not in word_hashes:
            word_hashes[word] = _hash_of(word)
    hashes = np.array([word_hashes[word] for word in words], np.uint64)
    return _each_once((hashes[:-2] * _MIX + hashes[1:-1]) * _MIX + hashes[2:])


def _bands(sets: Sequence[np.ndarray]) -> np.ndarray:
    """uint64 (rows, bands): two rows are equal in a band if all four minima of that band are equal."""
    triples = np.concatenate(sets)
    starts = np.cumsum([0, *map(len, sets[:-1])])
    minima = np.stack([np.minimum.reduceat((triples * a) >> np.uint64(32), starts) for a in _MULTIPLIERS])
    grouped = minima.reshape(_NUM_BANDS, _NUM_HASHES // _NUM_BANDS, len(sets))
    mixed = grouped[:, 0]
    for part in range(1, grouped.shape[1]):
        mixed = (mixed ^ (mixed >> np.uint64(29))) * _MIX + grouped[:, part]
    return mixed.T


def _read_band(bands: Store, band: int) -> np.ndarray:
    """uint64 (rows,)"""
    parts, begin = [], 0
    for end in bands.ends:
        size = (end - begin) // _NUM_BANDS
        parts.append(bands.read(begin + band * size, begin + (band + 1) * size))
        begin = end
    return np.frombuffer(b"".join(parts), np.uint64)


def _candidates(num_rows: int, band_of: Callable[[int], np.ndarray]) -> Iterator[tuple[int, int]]:
    """Yield pairs of rows that are equal in at least one band, each once, in order of the later row."""
    pairs = np.empty(0, np.int64)  # later * num_rows + earlier
    for number in range(_NUM_BANDS if num_rows > 1 else 0):
        band = band_of(number)
        order = np.argsort(band, kind="stable")
        is_new = np.concatenate(([True], band[order][1:] != band[order][:-1]))
        places = np.arange(num_rows)
        first = np.maximum.accumulate(np.where(is_new, places, 0))  # index of the first row of the bucket
        places = places[~is_new]
        found = [pairs]
        for partner in range(_MAX_PARTNERS):
            places = places[places - first[places] > partner]
            # rows of a bucket are ascending, because the sort is stable
            found.append(order[places] * num_rows + order[first[places] + partner])
        pairs = _each_once(np.concatenate(found))  # after each band, because most pairs are found in many
    for pair in pairs:
        later, earlier = divmod(int(pair), num_rows)
        yield earlier, later


def _each_once(values: np.ndarray) -> np.ndarray:
    """Sort and remove duplicates; numpy 2.3's `unique` uses hashing and is three times slower here."""
    values = np.sort(values)
    return values[np.concatenate((np.ones(min(len(values), 1), bool), values[1:] != values[:-1]))]


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)
