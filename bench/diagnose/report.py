"""diagnose.md: the scores, who was taken for whom, the worst mistakes, what each probe costs. diagnose.json: the
same as numbers. diagnose.jsonl: what was said of each program, a line each. diagnose_ordinary.jsonl: the same of the
configs over real files and templated tasks, whose section of the page `write_ordinary` replaces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.diagnose.bases import KINDS
from bench.diagnose.programs import NOT_INJECTED
from bench.diagnose.score import (
    ORDINARY,
    by_fault,
    by_rule,
    confusion,
    cost,
    disagrees,
    is_false_alarm,
    mistakes,
    named,
    ordinary_scores,
    scores,
)
from bench.diagnose.trl_run import is_installed
from bench.machine import RESULTS, machine, table, write_result
from solotune.diagnosis.catalogue import FAULTS, SUSPECTS

Result = dict[str, Any]
NUM_MISTAKES = 10
HEADING = "## Ordinary configs and templated tasks"
SHOWN = ("program", "split", "truth", "verdict", "named", "confidence", "evidence", "confirmed", "error")
ALSO = ("kind", "base", "remarks", "not_checked", "data_faults", "data_messages", "monitor_verdict",
        "monitor_messages", "monitor_next", "next_experiment", "diagnose_seconds")  # fmt: skip
"""Shown of ordinary configs, whose accusations and remarks a person judges."""


def write(results: Sequence[Result], num_programs: int, seconds: float) -> dict[str, Any]:
    """Writes the three files and returns the scores; ordinary configs among the results have a file and a section of
    their own.
    """
    ordinary = [result for result in results if result["kind"] in ORDINARY]
    results = [result for result in results if result["kind"] not in ORDINARY]
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
    _write_lines("diagnose.jsonl", results, SHOWN)
    page = RESULTS / "diagnose.md"
    section = _section_of(page)
    page.write_text(
        _page(results, found, f"{len(results)} of {num_programs} programs, {len(injected)}", seconds, packages)
        + section
    )
    if ordinary:
        found = {**found, "ordinary": write_ordinary(ordinary, seconds)}
    return found


def write_ordinary(results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """Writes diagnose_ordinary.jsonl and the section of diagnose.md on them, and returns the counts.

    Groups of which nothing was run this time (those that are trained take an hour) keep their last results.
    """
    known = RESULTS / "diagnose_ordinary.jsonl"
    earlier = [json.loads(line) for line in known.read_text().splitlines()] if known.exists() else []
    kept = {name: group for name, group in _groups(earlier).items() if name not in _groups(results)}
    results = [*results, *(result for group in kept.values() for result in group)]
    _write_lines("diagnose_ordinary.jsonl", results, SHOWN + ALSO)
    page, on = RESULTS / "diagnose.md", machine("torch", "transformers", "peft")
    rest = page.read_text().split(f"\n{HEADING}", 1)[0]
    others = [json.loads(line) for line in (RESULTS / "diagnose.jsonl").read_text().splitlines()]
    page.write_text(f"{rest}\n{HEADING}\n\n{ordinary_section(results, others, seconds, on)}\n")
    return {name: ordinary_scores(group) for name, group in _groups(results).items()}


def _write_lines(name: str, results: Sequence[Result], shown: Sequence[str]) -> None:
    lines = (json.dumps({key: result[key] for key in shown if key in result}, ensure_ascii=False) for result in results)
    (RESULTS / name).write_text("".join(f"{line}\n" for line in lines))


def _section_of(page: Path) -> str:
    """What the page says of ordinary configs, if anything."""
    _, heading, section = (page.read_text() if page.exists() else "").partition(f"\n{HEADING}")
    return heading + section


def _groups(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Those that there are of: real files and templated tasks, before training and after."""
    found = {
        f"{kind}, {when}": [r for r in results if r["kind"] == kind and r["program"].endswith("/before") == is_before]
        for kind in ORDINARY
        for when, is_before in (("before training", True), ("trained", False))
    }
    return {name: group for name, group in found.items() if group}


def ordinary_section(results: Sequence[Result], others: Sequence[Result], seconds: float, on: Mapping[str, Any]) -> str:
    """The section in Markdown.

    Args:
        others: results of the other programs, whose healthy ones are counted too.
    """
    groups = _groups(results)
    counted = {name: ordinary_scores(group) for name, group in groups.items()}
    every = [result for result in [*results, *others] if not result["truth"]]
    alarms = sum(map(is_false_alarm, every))
    lines = [
        "Configs as ordinary people write them, in which nothing is wrong: over real files (alpaca, identity, tool",
        "calls, preferred answers, web text, ShareGPT, chitchat) with the tokenizers and templates of SmolLM2, Llama 3",
        "and Qwen 3; and over twelve kinds of templated tasks. Before training, `solotune data` and `solotune diagnose",
        "--budget 0` are asked; of those that are trained, `solotune diagnose` with its probes. Each accusation is a",
        "mistake. `diagnose_ordinary.jsonl` has what was said of each.",
        "",
        f"`python -m bench.diagnose --data FOLDER --kind real templated`: {len(results)} programs, "
        f"the last run of it {seconds / 60:.0f} minutes on {on['cores']} cores of {on['cpu']}.",
        "",
        table(
            ["", *counted],
            [[row, *(_cell(column[row]) for column in counted.values())] for row in next(iter(counted.values()), {})],
        ),
        "",
        f"Of all {len(every)} healthy programs of this benchmark, {alarms} are called faulty, "
        f"{alarms / max(len(every), 1):.1%}.",
        "",
        table(
            ["fault", "", "accused", "remarked", "for example"],
            [
                [code, FAULTS[code].slug, row["accused"], row["remarked"], _line(next(iter(row["says"].values())))]
                for code, row in by_rule(results).items()
            ],
        ),
    ]
    wrong = [r for r in results if r["verdict"] != "healthy" or disagrees(r)]
    if wrong:
        lines += ["", *(f"- {_mistake(result)}{_other_door(result)}" for result in wrong)]
    return "\n".join(lines)


def _other_door(result: Result) -> str:
    if not disagrees(result):
        return ""
    return (
        f" `data` says {', '.join(result['data_faults']) or 'no fault'}."
        if "data_faults" in result
        else " `train` accuses."
    )


def _line(text: str) -> str:
    """In one cell of a table."""
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= 160 else text[:157] + "..."


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
        "rules. What it says of programs that were written without sight of them: [unseen.md](unseen.md).",
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
