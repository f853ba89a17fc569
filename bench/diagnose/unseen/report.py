"""python -m bench.diagnose.unseen.report: bench/results/unseen.md from the recorded answers beside it.

unseen.jsonl, unseen2.jsonl ... unseen4.jsonl      each set at first sight: no rule had been changed with it in view
*_after.jsonl                    the same programs after their mistakes were read: a set that rules were made beside
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.diagnose.unseen.score import accepted, said
from bench.diagnose.unseen.score import table as scores_of
from bench.machine import RESULTS, table
from solotune.diagnosis.catalogue import FAULTS

SETS = {
    "unseen": "first set",
    "unseen2": "second set",
    "unseen3": "third set",
    "unseen4": "fourth set",
    "unseen_after": "first set, seen",
    "unseen2_after": "second set, seen",
}
LATEST = "unseen4"
KINDS = ("loop", "alone", "folder", "own", "before")

Result = dict[str, Any]


def page(folder: Path = RESULTS) -> str:
    """The page; sets that were not recorded are left out."""
    results = {name: _read(folder / f"{name}.jsonl") for name in SETS if (folder / f"{name}.jsonl").exists()}
    found = {name: scores_of(rows) for name, rows in results.items()}
    head = ["", *(SETS[name] for name in results)]
    whole = [[key, *(_cell(one["all"][key]) for one in found.values())] for key in next(iter(found.values()))["all"]]
    kinds = [[kind, *(_share(one.get(kind)) for one in found.values())] for kind in KINDS]
    return "\n".join([
        "# The diagnosis on programs that were written without sight of its rules",
        "",
        "Their authors had the list of faults, and neither rules nor earlier results. The first set has 323",
        "programs, the second 248, the third 289, the fourth 215, each with other bases, tokenizers, templates,",
        "tasks and mistakes. Each was measured once (29 November 2026, 16 cores, Python 3.12, torch 2.11,",
        "transformers 5.17); then its mistakes were read and rules were changed, so a column that says *seen*",
        "shows what was repaired and nothing about programs to come. After the fourth set no rule was changed.",
        "",
        "    python -m bench.diagnose.unseen        # with --jobs 15: 5 minutes",
        "    python -m bench.diagnose.unseen2       # with --jobs 15: 4 minutes",
        "    python -m bench.diagnose.unseen3       # with --jobs 15: 6 minutes",
        "    python -m bench.diagnose.unseen4       # with --jobs 15: 5 minutes",
        "",
        "On the rules that the fourth set was measured on, the healthy programs of the second and third sets were",
        "run again (0 of 228 called faulty), and all 175 ordinary configs (0). With the fourth set's 1 of 78 this is",
        "1 of 481. The third set's author had also seen one-line notes of docs/faults.md on what else looks like",
        "F01 to F42. The fourth's had read how the third set makes its card errors and NaNs, so F49, F51, F53, F54,",
        "F63 and F70 to F73 are relatives of its programs; 65 of its 78 healthy programs were checked without",
        "training.",
        "",
        table(head, whole),
        "",
        "Fault named first, set-aware, by what the diagnosis was given (programs with a fault):",
        "",
        table(head, kinds),
        "",
        "loop: a training loop by hand, live; alone: the output folder of transformers' Trainer; folder: the same with",
        "`--dataset`, `--config` and `--base`; own: a run of solotune; before: a config of solotune, nothing trained.",
        "",
        f"## Mistakes at first sight, {SETS[LATEST]}",
        "",
        table(["program", "truth", "answer"], [_mistake(one) for one in results[LATEST] if not _is_right(one)]),
        "",
    ])  # fmt: skip


def _read(path: Path) -> list[Result]:
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda one: one["program"])


def _cell(value: Any) -> Any:
    return f"{value:.1%}" if isinstance(value, float) else value


def _share(found: dict[str, Any] | None) -> str:
    if not found or not found["faults"]:
        return "-"
    return f"{found['fault top-1, set-aware']:.1%} of {found['faults']}"


def _is_right(result: Result) -> bool:
    return (
        result["verdict"] == "healthy"
        if not result["truth"]
        else bool(accepted(result["truth"]) & set(said(result)[:1]))
    )


def _mistake(result: Result) -> list[str]:
    truth = " or ".join(f"{code} {FAULTS[code].slug}" for code in result["truth"]) or "healthy"
    first = [f"{code} {FAULTS[code].slug}" for code in said(result)[:1]]
    return [f"`{result['program']}`", truth, *(first or [result["verdict"]])]


if __name__ == "__main__":
    (RESULTS / "unseen.md").write_text(page())
