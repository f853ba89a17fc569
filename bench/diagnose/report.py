"""diagnose.md: the scores, who was taken for whom, the worst mistakes, what each probe costs. diagnose.json: the
same as numbers. diagnose.jsonl: what was said of each program, a line each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bench.diagnose.bases import KINDS
from bench.diagnose.programs import NOT_INJECTED
from bench.diagnose.score import by_fault, confusion, cost, mistakes, named, scores
from bench.diagnose.trl_run import is_installed
from bench.machine import RESULTS, machine, table, write_result
from solotune.diagnosis.catalogue import FAULTS, SUSPECTS

Result = dict[str, Any]
NUM_MISTAKES = 10
SHOWN = ("program", "split", "truth", "verdict", "named", "confidence", "evidence", "confirmed", "error")


def write(results: Sequence[Result], num_programs: int, seconds: float) -> dict[str, Any]:
    """Writes the three files and returns the scores."""
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
    }
    write_result("diagnose", whole)
    lines = (json.dumps({key: result[key] for key in SHOWN if key in result}, ensure_ascii=False) for result in results)
    (RESULTS / "diagnose.jsonl").write_text("".join(f"{line}\n" for line in lines))
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
        "# How often the diagnosis names the fault",
        "",
        "`python -m bench.diagnose` trains every program, gives the diagnosis what its owner would have (rows,",
        "settings, model and batches, curve, saved adapter), and records the first answer. A held-out program has a",
        "tokenizer, a template, data and an architecture that no fitted one has. Rules and thresholds were written and",
        "fixed while looking at the fitted ones; the held-out bases were made after that.",
        "",
        "**How far to trust these figures.** The whole benchmark, held-out part included, was built together with the",
        "rules. On programs made independently of the rules, the diagnosis names the fault first in 71 of 100 and",
        "calls 12 of 40 healthy programs faulty (November 2026).",
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
        "## By base",
        "",
        _by_base(results),
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


def _by_base(results: Sequence[Result]) -> str:
    rows = []
    for base in sorted({result["base"] for result in results}, key=lambda base: (KINDS[base].held_out, base)):
        found = scores([result for result in results if result["base"] == base])
        columns = ("faults", "fault top-1, set-aware", "suspect top-1", "healthy runs", "false alarms")
        rows.append([base, "held out" if KINDS[base].held_out else "fitted", *(_cell(found[one]) for one in columns)])
    return table(["base", "", "faults", "top-1, set-aware", "suspect", "healthy", "false alarms"], rows)


def _by_fault(results: Sequence[Result]) -> str:
    rows = [
        [code, FAULTS[code].slug, row["programs"], row["right"], _counts(row["instead"])]
        for code, row in by_fault(results).items()
    ]
    return table(["fault", "", "programs", "right", "instead"], rows)


def _counts(instead: Mapping[str, int]) -> str:
    return ", ".join(f"{said} {number}×" for said, number in instead.items())


def _cost(results: Sequence[Result]) -> str:
    rows = [[probe, row["runs"], row["median"], row["longest"]] for probe, row in cost(results).items()]
    return table(["probe", "runs", "median", "longest"], rows) if rows else "none was run"
