"""Write a diagnosis as text: the culprit, its evidence, what to change, what to expect.

    headline   The learning rate is too low.  (F64 rate-too-low: optimizer and learning rate; 94 %)
    evidence   two or three lines with numbers, and what confirmed it
    change     the exact line of the config
    expect     what the change should bring

Checks that could not run are listed too: without the model, more faults stay open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from solotune.diagnosis import catalogue
from solotune.diagnosis.evidence import EXPERIMENTS, Culprit, Diagnosis


@dataclass(frozen=True)
class Told:
    """The text parts of one culprit."""

    headline: str
    where: str
    evidence: list[str]
    change: str
    expect: str
    also: str  # other faults with the same evidence, or ""


def told(culprit: Culprit) -> Told:
    """The text parts of a culprit."""
    fault = catalogue.FAULTS[culprit.fault]
    others = [catalogue.FAULTS[code] for code in culprit.same_evidence]
    confirmed = [f"confirmed by experiment: {culprit.confirmed_by}"] if culprit.confirmed_by else []
    return Told(
        headline=fault.title,
        where=f"{fault.code} {fault.slug}, {catalogue.SUSPECTS[fault.suspect]} ({fault.suspect})",
        evidence=[*culprit.evidence, *confirmed],
        change=culprit.fix,
        expect=culprit.expect,
        also=", ".join(f"{other.code} {other.slug}" for other in others),
    )


def summary(diagnosis: Diagnosis) -> str:
    """The verdict in one line."""
    remarks = f", {len(diagnosis.remarks)} remark{'s' * (len(diagnosis.remarks) > 1)}" if diagnosis.remarks else ""
    if diagnosis.verdict == "healthy":
        so_far = "healthy as far as checked" if diagnosis.not_checked else "healthy"
        return f"{so_far}: no fault found{remarks}"
    if diagnosis.verdict == "undecided":
        names = ", ".join(f"{c.fault} {c.slug}" for c in diagnosis.culprits[:3])
        return f"undecided: possibly {names}" if names else "undecided: no fault found, but some checks could not run"
    first, *others = diagnosis.culprits
    more = f", and {', '.join(f'{c.fault} {c.slug}' for c in others)}" if others else ""
    return f"fault: {first.fault} {first.slug}{more}"


def ruled_out_nearby(diagnosis: Diagnosis) -> str:
    """Faults near the first culprit that were ruled out, each with the reason; of all others only the number.

    Near: of the same suspect, a consequence, or an equivalent.
    """
    if not diagnosis.culprits:
        return _counted(len(diagnosis.ruled_out))
    first = diagnosis.culprits[0]
    family = {first.fault, *catalogue.equivalents(first.fault), *catalogue.EXPLAINS.get(first.fault, ())}
    family |= {fault.code for fault in catalogue.FAULTS.values() if fault.suspect == first.suspect}
    near = [f"{r['fault']} {r['slug']} ({r['because']})" for r in diagnosis.ruled_out if r["fault"] in family]
    others = len(diagnosis.ruled_out) - len(near)
    if not near:
        return _counted(others)
    return "; ".join([*near, *([f"{others} more (reasons: --json)"] if others else [])])


def _counted(ruled_out: int) -> str:
    return f"{ruled_out} fault{'s' * (ruled_out > 1)} (reasons: --json)" if ruled_out else ""


def left_open(diagnosis: Diagnosis) -> list[str]:
    """What was not checked, and which probes and faults that concerns: one line for each reason."""
    lines = list(diagnosis.not_checked)
    for why, names in _by_reason(diagnosis.skipped).items():
        which = "all probes" if set(names) == set(EXPERIMENTS) else f"probe{'s' * (len(names) > 1)} {_listed(names)}"
        lines.append(f"{which}: {why}")
    for why, codes in _by_reason(diagnosis.unasked).items():
        suspects = Counter(catalogue.FAULTS[code].suspect for code in codes)
        where = ", ".join(f"{catalogue.SUSPECTS[suspect]} ({count})" for suspect, count in suspects.most_common())
        lines.append(f"{len(codes)} fault{'s' * (len(codes) > 1)} in {where}: {why}")
    return lines


def _by_reason(skipped: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, why in skipped.items():
        reasons.setdefault(why, []).append(name)
    return reasons


def _listed(names: list[str]) -> str:
    return ", ".join(sorted(names, key=lambda name: (len(name), name)))
