"""How often the fault was named: strictly, and with equivalent explanations counted as one.

Only what a verdict of `fault` names is scored. `undecided` is an abstention: never a hit, and no false alarm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from solotune.diagnosis.catalogue import FAULTS

Result = dict[str, Any]

EQUIVALENT = ({"F64", "F61"}, {"F67", "F61"}, {"F10", "F24"}, {"F21", "F18"}, {"F57", "F58"})
"""Faults that explain the same evidence; a set-aware score takes one for the other."""


def accepted(truth: Sequence[str]) -> set[str]:
    """The true codes and their equivalents."""
    return set(truth).union(*(group for group in EQUIVALENT if group & set(truth)))


def suspects(codes: Sequence[str] | set[str]) -> set[str]:
    return {FAULTS[code].suspect for code in codes}


def named(result: Result) -> list[str]:
    return result["named"] if result["verdict"] == "fault" else []


def is_hit(result: Result, top: int = 1, aware: bool = False) -> bool:
    """Whether a true culprit is among the first `top`."""
    right = accepted(result["truth"]) if aware else set(result["truth"])
    return bool(right & set(named(result)[:top]))


def is_suspect_hit(result: Result) -> bool:
    first = named(result)[:1]
    return bool(first) and suspects(first) <= suspects(result["truth"])


def _share(hits: Sequence[bool]) -> float | None:
    return round(sum(hits) / len(hits), 4) if hits else None


def scores(results: Sequence[Result]) -> dict[str, Any]:
    """The table of one split; None where there is no such program."""

    def of(kind: str) -> list[Result]:
        return [result for result in results if result["kind"] == kind]

    single, healthy, pairs, foreign = of("fault"), of("healthy"), of("pair"), of("foreign")
    strange = [result for result in foreign if result["truth"]]
    own = [result for result in of("own") if result["truth"]]
    own_healthy = [result for result in of("own") if not result["truth"]]
    healthy = healthy + [result for result in foreign if not result["truth"]]
    return {
        "faults": len(single),
        "fault top-1, strict": _share([is_hit(result) for result in single]),
        "fault top-1, set-aware": _share([is_hit(result, aware=True) for result in single]),
        "fault top-3, strict": _share([is_hit(result, 3) for result in single]),
        "fault top-3, set-aware": _share([is_hit(result, 3, aware=True) for result in single]),
        "suspect top-1": _share([is_suspect_hit(result) for result in single]),
        "faults undecided": _share([result["verdict"] == "undecided" for result in single]),
        "faults called healthy": _share([result["verdict"] == "healthy" for result in single]),
        "failed": sum(result["verdict"] == "failed" for result in results),
        "healthy runs": len(healthy),
        "false alarms": _share([result["verdict"] == "fault" for result in healthy]),
        "healthy undecided": _share([result["verdict"] == "undecided" for result in healthy]),
        "two-fault runs": len(pairs),
        "two faults: a true one first": _share([is_hit(result, aware=True) for result in pairs]),
        "two faults: both in the first three": _share(
            [set(result["truth"]) <= set(named(result)[:3]) for result in pairs]
        ),
        "foreign runs with a fault": len(strange),
        "foreign top-1, set-aware": _share([is_hit(result, aware=True) for result in strange]),
        "foreign suspect top-1": _share([is_suspect_hit(result) for result in strange]),
        "own runs with a fault": len(own),
        "own top-1, strict": _share([is_hit(result) for result in own]),
        "own top-1, set-aware": _share([is_hit(result, aware=True) for result in own]),
        "own suspect top-1": _share([is_suspect_hit(result) for result in own]),
        "own healthy runs": len(own_healthy),
        "own false alarms": _share([result["verdict"] == "fault" for result in own_healthy]),
        "own healthy undecided": _share([result["verdict"] == "undecided" for result in own_healthy]),
    }


ORDINARY = ("real", "templated")
"""Kinds of programs that are a config in which nothing is wrong."""


def is_false_alarm(result: Result) -> bool:
    """Of a program in which nothing is wrong."""
    return not result["truth"] and result["verdict"] == "fault"


def disagrees(result: Result) -> bool:
    """Whether two commands judge the same rows otherwise: `data` and `diagnose`; or `train` accuses and `diagnose` does
    not, which knows all that `train` knew.
    """
    if "data_faults" in result:
        return bool(result["data_faults"]) != (result["verdict"] == "fault")
    return result.get("monitor_verdict") == "fault" and result["verdict"] != "fault"


def ordinary_scores(results: Sequence[Result]) -> dict[str, Any]:
    """Counts of one group of configs in which nothing is wrong."""
    healthy = [result for result in results if result["verdict"] == "healthy"]
    return {
        "programs": len(results),
        "healthy": sum(not result["remarks"] for result in healthy),
        "healthy, with remarks": sum(bool(result["remarks"]) for result in healthy),
        "undecided": sum(result["verdict"] == "undecided" for result in results),
        "fault": sum(is_false_alarm(result) for result in results),
        "failed": sum(result["verdict"] == "failed" for result in results),
        "healthy, share": _share([result["verdict"] == "healthy" for result in results]),
        "commands disagree": sum(map(disagrees, results)),
        "undecided at the end of train": sum(result.get("monitor_verdict") == "undecided" for result in results),
    }


def by_rule(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Code -> how many programs it accused and remarked on, and what it said of the first of them."""
    table: dict[str, dict[str, Any]] = {}
    for result in results:
        accused = zip(named(result), result.get("evidence", []), strict=False)
        told = [("accused", code, " ".join(evidence)) for code, evidence in accused]
        told += [("remarked", code, says) for code, says, _ in result.get("remarks", [])]
        for what, code, says in told:
            row = table.setdefault(code, {"accused": 0, "remarked": 0, "says": {}})
            row[what] += 1
            row["says"].setdefault(what, says)
    return dict(sorted(table.items(), key=lambda entry: (-entry[1]["accused"], -entry[1]["remarked"], entry[0])))


def confusion(results: Sequence[Result]) -> dict[str, Counter[str]]:
    """True suspect -> the suspect that was named first (or the verdict), counted; single faults and healthy runs."""
    table: dict[str, Counter[str]] = {}
    for result in results:
        if result["kind"] not in ("fault", "healthy"):
            continue
        truth = next(iter(suspects(result["truth"])), "healthy")
        first = named(result)[:1]
        said = next(iter(suspects(first)), result["verdict"])
        table.setdefault(truth, Counter())[said] += 1
    return table


def mistakes(results: Sequence[Result]) -> list[Result]:
    """The worst first: false alarms and failures, then another suspect named surely, then silence."""

    def is_wrong(result: Result) -> bool:
        if not result["truth"]:
            return result["verdict"] != "healthy"
        return not is_hit(result, aware=True)

    def badness(result: Result) -> tuple[int, float]:
        sure = (result.get("confidence") or [0.0])[0]
        if result["verdict"] == "failed" or (not result["truth"] and result["verdict"] == "fault"):
            return (0, -sure)
        if result["verdict"] == "fault":
            return (1 if not is_suspect_hit(result) else 2, -sure)
        return (3 if result["verdict"] == "healthy" else 4, 0.0)

    return sorted(filter(is_wrong, results), key=badness)


def by_fault(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Code -> its programs, how many were right, and what was said instead."""
    table: dict[str, dict[str, Any]] = {}
    for result in results:
        if result["kind"] != "fault":
            continue
        row = table.setdefault(result["truth"][0], {"programs": 0, "right": 0, "instead": Counter()})
        row["programs"] += 1
        if is_hit(result, aware=True):
            row["right"] += 1
        else:
            row["instead"][(named(result)[:1] or [result["verdict"]])[0]] += 1
    return dict(sorted(table.items()))


def cost(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Probe -> runs, median and longest seconds."""
    seconds: dict[str, list[float]] = {}
    for result in results:
        for probe, spent in (result.get("cost") or {}).items():
            seconds.setdefault(probe, []).append(float(spent or 0.0))
    return {
        probe: {
            "runs": len(spent),
            "median": round(sorted(spent)[len(spent) // 2], 3),
            "longest": round(max(spent), 3),
        }
        for probe, spent in sorted(seconds.items(), key=lambda entry: (len(entry[0]), entry[0]))
    }
