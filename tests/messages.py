"""Messages as they are printed, for snapshots: temporary folders, which differ from run to run, are <tmp> in them.

After a change of wording, this writes the new messages into the tests; read the diff before you commit it:

    sh scripts/test -n 0 --inline-snapshot=fix

Otherwise, and always in several processes, a snapshot is compared and never written (pyproject.toml, `addopts`).
"""

from __future__ import annotations

import re

temporary = "/nowhere"
"""The folder in which pytest makes one for each test; conftest.py sets it."""


def stable(text: object) -> str:
    """What an error or a command says, without line breaks at its end."""
    return re.sub(rf"{re.escape(temporary)}/[\w.-]+", "<tmp>", str(text)).rstrip("\n")


def error_in(stderr: str) -> str:
    """The error message at the end of a command's stderr, without the lines of progress before it."""
    before, begin, message = f"\n{stderr}".rpartition("\nerror: ")
    assert begin, f"no error in {before or message}"
    return stable(message)
