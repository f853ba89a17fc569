"""python -m bench.diagnose [--only WORD ...] [--split fitted|held-out] [--kind KIND ...] [--jobs N] [--minutes M]

    --only F17 healthy F64/qwen3    programs whose name has all parts of one of these words
    --alone data                    folders of other trainers without --dataset, --config and --base
    --minutes 10                    a random part of the programs, as many as there is time for

    --data FOLDER --kind real templated --before      configs over real files and templated tasks, before training

Of all programs, or of a random part of all, bench/results/diagnose.md, .json and .jsonl are written; of all of kind
real and templated, their section of it and diagnose_ordinary.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from pathlib import Path

KINDS_OF_PROGRAMS = ("fault", "healthy", "pair", "foreign", "own", "real", "templated")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a program has one core


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.diagnose", description="Scores the diagnosis.")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="WORD", help="only these programs: code, change, base; F17/qwen3"
    )
    parser.add_argument("--split", choices=("fitted", "held-out"), help="only one split")
    parser.add_argument("--kind", nargs="*", choices=KINDS_OF_PROGRAMS, default=[], help="only these kinds of program")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of bench.real_data, for --kind real")
    parser.add_argument("--before", action="store_true", help="only configs that are diagnosed before training")
    parser.add_argument(
        "--alone", choices=("data", "base"), default="",
        help="other trainers' folders, given alone: data and config lie beside them, or the base too",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=2, help="programs at a time")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="start no program after this time; random order"
    )
    parser.add_argument("--list", action="store_true", help="print the names, run nothing")
    asked = parser.parse_args()

    from bench.diagnose import report
    from bench.diagnose.programs import matching
    from bench.diagnose.run import Result, run_all
    from bench.diagnose.score import ORDINARY, is_hit, ordinary_scores, scores

    chosen = [
        p for p in matching(asked.only, asked.split, asked.data, asked.alone) if not asked.kind or p.kind in asked.kind
    ]
    chosen = [p for p in chosen if p.is_before or not asked.before]
    if asked.list:
        print("\n".join(program.name for program in chosen))
        return

    def say(result: Result) -> None:
        right = is_hit(result, aware=True) if result["truth"] else result["verdict"] == "healthy"
        what = ", ".join(result["named"][:3]) or (result.get("error") or "").strip().split("\n")[-1]
        spent = result.get("train_seconds", 0), result.get("diagnose_seconds", 0)
        print(f"{'ok ' if right else 'NO '} {result['program']:64} {result['verdict']:9} {what:20} "
              f"{spent[0]:5.1f} + {spent[1]:.1f} s", flush=True)  # fmt: skip

    if asked.minutes < math.inf:
        random.Random(0).shuffle(chosen)
    started = time.perf_counter()
    results = run_all(chosen, asked.jobs, say, asked.minutes)
    seconds = time.perf_counter() - started
    is_ordinary = set(asked.kind) == set(ORDINARY)
    if is_ordinary and not (asked.only or asked.split):
        print(json.dumps(report.write_ordinary(results, seconds), indent=1))
    elif asked.only or asked.split or asked.kind or asked.alone:
        print(json.dumps(scores(results), indent=1))
        print(json.dumps(ordinary_scores([r for r in results if r["kind"] in ORDINARY]), indent=1))
    else:
        print(json.dumps(report.write(results, len(chosen), seconds), indent=1))


if __name__ == "__main__":
    main()
