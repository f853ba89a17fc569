"""Near-duplicates: pairs of texts that share at least 70 % of their word triples.

    J(a, b) = |A & B| / |A | B|,   A, B the sets of word 3-grams

MinHash (Broder 1997): the share of equal minima under 128 hash functions estimates J. LSH in 32 bands of 4 finds a
pair with J = 0.7 with probability 1 - (1 - 0.7**4)**32 = 0.9998 and looks at few others; every candidate is then
checked with the exact J, so there are no false pairs. Fewer, longer bands (the usual default) miss a quarter of the
pairs near the threshold.

Texts of fewer than five words have too few triples to be alike by degrees; only exact copies of them count, and those
are found elsewhere. Signatures are never stored: rensa 0.5 changed its hash, and may again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

THRESHOLD = 0.7
_NUM_HASHES, _NUM_BANDS = 128, 32
_CHUNK_ROWS = 2000  # triples of so many rows are strings in memory at one time
_MIN_WORDS = 5
# Chinese, Japanese and Korean do not put blanks between words: each character counts as one
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


def near_duplicates(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs (i, j), i < j, of texts with J >= 0.7; texts are expected folded (`split.folded`)."""
    rensa: Any = import_module("rensa")  # compiled, and without type hints

    @lru_cache(maxsize=4096)
    def triples_of(row: int) -> frozenset[str]:
        return _triples(texts[row])

    index = rensa.RMinHashLSH(threshold=THRESHOLD, num_perm=_NUM_HASHES, num_bands=_NUM_BANDS)
    for start in range(0, len(texts), _CHUNK_ROWS):
        rows = [row for row in range(start, min(start + _CHUNK_ROWS, len(texts))) if triples_of(row)]
        signatures = rensa.RMinHash.from_token_sets([triples_of(row) for row in rows], _NUM_HASHES, 0)
        for row, signature in zip(rows, signatures, strict=True):
            for other in sorted(index.query(signature)):
                if _jaccard(triples_of(other), triples_of(row)) >= THRESHOLD:
                    yield other, row
            index.insert(row, signature)


def _triples(text: str) -> frozenset[str]:
    words = _WORDS.findall(text)
    if len(words) < _MIN_WORDS:
        return frozenset()
    return frozenset(" ".join(words[i : i + 3]) for i in range(len(words) - 2))


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    common = len(a & b)
    return common / (len(a) + len(b) - common) if common else 0.0
