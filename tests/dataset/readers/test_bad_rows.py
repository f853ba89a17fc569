"""Bad rows in one message: the first in full, two more in short, all counted."""

from __future__ import annotations

from inline_snapshot import snapshot

from solotune.dataset.readers.bad_rows import BadRows
from solotune.dataset.readers.row import RowError


def message(num_bad: int, num_read: int) -> str:
    bad = BadRows()
    for n in range(num_bad):
        bad.add(
            RowError(f"a.jsonl:{n}: unknown role", reason="unknown role", seen=f"r{n}", allowed="user", change="fix it")
        )
    return str(bad.error(num_read))


def test_one() -> None:
    assert message(1, 9) == snapshot()
    assert "on_bad_row" not in message(1, 1), "nothing would be left"


def test_many() -> None:
    assert message(3, 9) == snapshot()
    assert message(2000, 5000) == snapshot()
    assert "on_bad_row" not in message(9, 9)
