"""`solotune doctor`: check this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from solotune.hardware.doctor import DoctorReport


def doctor() -> DoctorReport:
    """Check versions, CUDA, bitsandbytes, memory and disk; each failed check has a fix.

    for check in solotune.doctor().checks:
        print(check.status, check.name, check.found, check.fix)
    """
    from solotune.hardware import doctor as fitness

    return fitness.doctor()
