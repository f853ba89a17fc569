"""The numbers that turn evidence into a verdict, all of them, and where they come from.

A signal carries its own weight, how surely its fault is there given that signal alone; the rule or probe that makes the
signal sets it. What stands here joins weights:

    confidence = (1 - prod_k (1 - w_k)) * prod_j (1 - w_j)      k: kinds that speak for it    j: signals against it

where w_k is the largest weight of a kind: two measured numbers of one fault mostly come from the same batch, so they do
not count twice, but an experiment and a measurement do.
"""

from __future__ import annotations

ACCUSED = 0.5
"""From this confidence on a fault is named: more likely than not."""
DOUBTED = 0.25
"""From here on it keeps a run from being called healthy."""
SPEAKS_AGAINST = 0.5
"""A signal against a fault rules it out from this weight on, where nothing speaks for it."""
CURVE_ALONE = 0.4
"""The most that the shape of a curve is worth without a probe: a doubt, never a name."""

RANK = {"curve": 0, "measured": 1, "counterfactual": 2, "invariant": 3}
"""Which evidence goes first whatever its weight: an equation that is violated, then an experiment, then a number."""
