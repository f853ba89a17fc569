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
    assert message(1, 9) == snapshot("""\
a.jsonl:0: unknown role
  seen:    r0
  allowed: user
  change:  fix it; or on_bad_row: drop leaves out this row\
""")
    assert "on_bad_row" not in message(1, 1), "nothing would be left"


def test_many() -> None:
    assert message(3, 9) == snapshot("""\
a.jsonl:0: unknown role (one of 3 bad rows; 9 were read)
  seen:    r0; also a.jsonl:1; a.jsonl:2
  allowed: user
  change:  fix it; or on_bad_row: drop leaves out the bad rows\
""")
    assert message(2000, 5000) == snapshot("""\
a.jsonl:0: unknown role (one of 2,000 bad rows; 5,000 were read)
  seen:    r0; also a.jsonl:1; a.jsonl:2; ...
  allowed: user
  change:  fix it; or on_bad_row: drop leaves out the bad rows\
""")
    assert "on_bad_row" not in message(9, 9)


def test_the_fault_is_named_where_it_is_one_of_the_data() -> None:
    def fault(num_bad: int, num_read: int) -> str | None:
        bad = BadRows()
        for n in range(num_bad):
            bad.add(RowError(f"a.jsonl:{n}: unknown role", reason="unknown role", fault="F36"))
        return bad.error(num_read).fault

    assert fault(9, 9) == "F36"
    assert fault(2, 9) is None
