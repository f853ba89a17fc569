"""diagnose.json and diagnose.md: the scores, who was taken for whom, the worst mistakes, what each probe costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.diagnose.programs import NOT_INJECTED
from bench.diagnose.score import by_fault, confusion, cost, mistakes, named, scores
from bench.diagnose.trl_run import is_installed
from bench.machine import RESULTS, machine, table, write_result
from solotune.diagnosis.catalogue import FAULTS, SUSPECTS

Result = dict[str, Any]
NUM_MISTAKES = 10


def write(results: Sequence[Result], num_programs: int, seconds: float) -> dict[str, Any]:
    """Writes both files and returns the scores."""
    found = {split: scores([r for r in results if r["split"] == split]) for split in ("fitted", "held-out")}
    packages = machine("torch", "transformers", "peft")
    injected = sorted({code for result in results if result["kind"] == "fault" for code in result["truth"]})
    whole = {
        "machine": packages,
        "seconds": round(seconds),
        "programs": num_programs,
        "scores": found,
        "faults_injected": injected,
        "not_injected": NOT_INJECTED,
        "cost": cost(results),
        "results": list(results),
    }
    write_result("diagnose", whole)
    (RESULTS / "diagnose.md").write_text(
        _page(results, found, f"{len(results)} of {num_programs} programs, {len(injected)}", seconds, packages)
    )
    return found


def _cell(value: Any) -> Any:
    if value is None:
        return "-"
    return f"{value:.1%}" if isinstance(value, float) else value


def _page(results: Sequence[Result], found: dict[str, Any], ran: str, seconds: float, on: dict[str, Any]) -> str:
    lines = [
        "# How often the culprit is named",
        "",
        "`python -m bench.diagnose` trains every program, hands over what its owner would have (rows, settings, model",
        "and batches, curve, saved adapter), and takes down the first diagnosis. A held-out program has a tokenizer, a",
        "template, a world of data and an architecture that no fitted one has. While rules were written, mistakes on",
        "held-out programs were read too, and rules mended after them (P2's equality in float32, P8, P10, what F26 and",
        "F36 explain): a clean figure needs programs that nobody has seen.",
        "",
        "Foreign runs are folders that transformers' Trainer left"
        + (
            " and folders of TRL's SFTTrainer."
            if is_installed()
            else "; TRL was not installed, its scripts were left out."
        ),
        "",
        f"{ran} of {len(FAULTS)} faults, {seconds / 60:.0f} minutes on {on['cores']} "
        f"cores of {on['cpu']} (torch {on['torch']}, transformers {on['transformers']}, peft {on['peft']}).",
        "",
        table(
            ["", "fitted", "held out"],
            [[name, _cell(found["fitted"][name]), _cell(found["held-out"][name])] for name in found["fitted"]],
        ),
        "",
        "Set-aware: one of {F64, F61}, {F67, F61}, {F10, F24}, {F21, F18}, {F57, F58} counts for the other. Only a",
        "verdict of `fault` is scored; `undecided` is never a hit.",
        "",
        "## Suspects: true, and named first (held-out programs)",
        "",
        _confusion([result for result in results if result["split"] == "held-out"]),
        "",
        f"## The worst {NUM_MISTAKES} mistakes",
        "",
    ]
    lines += [f"{number}. {_mistake(one)}" for number, one in enumerate(mistakes(results)[:NUM_MISTAKES], start=1)]
    lines += ["", "## By fault", "", _by_fault(results), "", "## What a probe costs, seconds", "", _cost(results), ""]
    if NOT_INJECTED:
        lines += ["## Not injected", "", *[f"- {code}: {why}" for code, why in NOT_INJECTED.items()], ""]
    return "\n".join(lines)


def _confusion(results: Sequence[Result]) -> str:
    counted = confusion(results)
    said = [
        name for name in (*SUSPECTS, "healthy", "undecided", "failed") if any(row[name] for row in counted.values())
    ]
    rows = [[name, *(counted[name][one] or "" for one in said)] for name in (*SUSPECTS, "healthy") if name in counted]
    return table(["true", *said], rows)


def _mistake(result: Result) -> str:
    truth = " and ".join(f"{code} ({FAULTS[code].slug})" for code in result["truth"]) or "healthy"
    first = named(result)[:1]
    said = f"{first[0]} ({FAULTS[first[0]].slug})" if first else result["verdict"]
    why = (result.get("evidence") or [[]])[0][:1] if first else [result.get("error", "").strip().split("\n")[0]]
    return f"`{result['program']}`: {truth}, called {said}. {' '.join(why)}".strip()


def _by_fault(results: Sequence[Result]) -> str:
    rows = [
        [
            code,
            FAULTS[code].slug,
            row["programs"],
            row["right"],
            ", ".join(f"{c} {n}×" for c, n in row["instead"].items()),
        ]
        for code, row in by_fault(results).items()
    ]
    return table(["fault", "", "programs", "right", "instead"], rows)


def _counts(instead: Mapping[str, int]) -> str:
    return ", ".join(f"{said} {number}×" for said, number in instead.items())


def _cost(results: Sequence[Result]) -> str:
    rows = [[probe, row["runs"], row["median"], row["longest"]] for probe, row in cost(results).items()]
    return table(["probe", "runs", "median", "longest"], rows) if rows else "none was run"
