"""`solotune explain`: a fault or a suspect explained."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from solotune.diagnosis.explanation import Explanation


def explain(code: str | None = None) -> Explanation:
    """Explain a fault (F17, pad-masks-terminator) or a suspect (S4): symptoms, cause and fix; or list the suspects.

        print(solotune.explain("F17").text)

    Raises:
        InputError: there is no such fault; the message lists similar ones.
    """
    from solotune.diagnosis.explanation import explained

    return explained(code)
