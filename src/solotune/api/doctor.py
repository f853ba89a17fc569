"""`solotune doctor`: is this machine fit for training?"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from solotune.hardware.doctor import DoctorReport


def doctor() -> DoctorReport:
    """Checks the machine: versions, CUDA, bitsandbytes, memory, disk; each finding with its fix."""
    from solotune.hardware import doctor as fitness

    return fitness.doctor()
