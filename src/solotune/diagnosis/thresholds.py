"""Thresholds that turn evidence into a verdict, and how weights are combined.

Each signal has a weight, the probability of its fault given only this signal; its rule or probe sets it. Weights are
combined as

    confidence = (1 - prod_k (1 - w_k)) * prod_j (1 - w_j)      k: kinds of signals for it    j: signals against it

where w_k is the largest weight of a kind: two measured numbers of one fault mostly come from the same batch, so they
count once, but an experiment and a measurement count twice.
"""

from __future__ import annotations

ACCUSED = 0.5
"""A fault is named at this confidence: more likely than not."""
DOUBTED = 0.25
"""At this confidence a fault prevents the verdict "healthy"."""
SPEAKS_AGAINST = 0.5
"""A signal against a fault rules it out at this weight, if there is no evidence for it."""
CURVE_ALONE = 0.4
"""Largest confidence from the shape of a curve without a probe: enough for a doubt, not for a name."""

AS_MANY = 0.9
"""Share concerned by a cause / by its effect from which it explains it: one counts rows, the other answers."""

RANK = {"remark": -1, "curve": 0, "measured": 1, "counterfactual": 2, "invariant": 3}
"""Order of evidence, whatever its weight: a violated equation, then an experiment, then a measured number."""
