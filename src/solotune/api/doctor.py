"""`solotune doctor`: check this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from solotune.runtime.library_noise import quiet_libraries

if TYPE_CHECKING:
    from solotune.hardware.doctor import DoctorReport


@quiet_libraries()
def doctor() -> DoctorReport:
    """Check versions, CUDA, bitsandbytes, memory and disk; each failed check has a fix.

        for check in solotune.doctor().checks:
            print(check.status, check.name, check.found, check.fix)

    A check that fails is part of the report; nothing is raised.
    """
    from solotune.hardware import doctor as fitness

    return fitness.doctor()
