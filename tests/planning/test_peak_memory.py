"""What a peak says of its phases."""

from __future__ import annotations

import pytest

from solotune.planning.peak_memory import CATEGORIES, HostMemory, PeakMemory, Peaks


@pytest.mark.parametrize(
    ("moment", "peaks", "others"),
    [
        ("head", Peaks(9, 5, 0), [("an evaluation", 5)]),
        ("evaluation", Peaks(5, 9, 4), [("a training step", 5), ("generated answers", 4)]),
        ("answers", Peaks(5, 8, 9), [("a training step", 5), ("an evaluation", 8)]),
    ],
)
def test_the_phases_below_the_peak_are_named(moment, peaks, others):
    sizes = dict.fromkeys(CATEGORIES, 0) | {"weights": 9}
    used = PeakMemory(sizes, moment, 0, 1, HostMemory(), peaks)
    assert used.other_peaks() == others
    assert used.is_of_evaluation == (moment != "head")
    assert (used.peak_bytes, used.card_bytes) == (9, 10)
