"""`solotune verify`: are the files of a run what it wrote?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from solotune.training.verify_run import Verification


def verify(run: str | Path) -> Verification:
    """Looks whether every file of a run is what the run wrote, and every parameter a number.

    Raises:
        InputError: no run there.
    """
    from solotune.training import verify_run

    return verify_run.verify(run)
