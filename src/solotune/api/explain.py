"""`solotune explain`: a fault or a suspect in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from solotune.diagnosis.explanation import Explanation


def explain(code: str) -> Explanation:
    """What a fault (F17, pad-masks-terminator) or a suspect (S4) is, how it is recognised and how it is mended.

    Raises:
        InputError: there is no such fault; the nearest are in the message.
    """
    from solotune.diagnosis.explanation import explained

    return explained(code)
