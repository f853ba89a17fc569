"""`solotune verify`: check that the files of a run are unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from solotune.runtime.library_noise import quiet_libraries

if TYPE_CHECKING:
    from solotune.training.verify_run import Verification


@quiet_libraries()
def verify(run: str | Path) -> Verification:
    """Check every file of a run against its recorded sha256, and that all parameters are finite.

        result = solotune.verify("runs/demo")
        print(result.ok, result.problems)

    Raises:
        InputError: there is no run.
    """
    from solotune.training import verify_run

    return verify_run.verify(run)
