"""Packs: every row once, none cut, and full."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from solotune.dataset.packing import account, fill, pack


@given(st.lists(st.integers(1, 64), max_size=200))
def test_every_row_once_and_no_pack_too_full(lengths):
    packs = pack(lengths, 64)
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in rows) <= 64 for rows in packs)
    assert packs == pack(lengths, 64)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_no_two_packs_could_be_one(lengths):
    """Best fit opens a pack only for a row that fits in no other, so at most one pack is half empty."""
    sums = sorted(sum(lengths[row] for row in rows) for rows in pack(lengths, 64))
    assert len(sums) < 2 or sums[0] + sums[1] > 64


@pytest.mark.parametrize("mean", [200, 600])
def test_chats_fill_their_packs(mean):
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(mean), 0.8, 5000).astype(int), 10, 2048).tolist()
    packs = pack(lengths, 2048)
    assert fill(lengths, packs, 2048) >= 0.98


def test_the_account_adds_up():
    lengths = [1024, 600, 500, 400, 24]
    found = account(lengths, 1024)
    assert found == {
        "sequences": 3,
        "sequence_tokens": 1024,
        "rows": 5,
        "fill": round(sum(lengths) / (3 * 1024), 4),
        "tokens_empty": 3 * 1024 - sum(lengths),
    }
