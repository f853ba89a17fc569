"""python -m bench.diagnose.unseen (or unseen2) [--only WORD ...] [--kind KIND] [--jobs N] [--minutes M]
    [--out FILE.jsonl] [--list | --bases]

Each program has a process of its own. A line of the file per program, then the table.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import re
import tempfile
import time
import traceback
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.diagnose.forks import forked

if TYPE_CHECKING:
    from bench.diagnose.unseen.registry import Parts

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of a core alone; and CUDA does not survive a fork

BUDGET, LIMIT = 60.0, 400


def one(program: Any, parts: Parts) -> dict[str, Any]:
    import torch
    import transformers

    from bench.diagnose.unseen.make import diagnosed
    from solotune.errors import SolotuneError

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    started = time.perf_counter()
    trained = started
    try:
        with tempfile.TemporaryDirectory() as scratch:
            found_by, train = diagnosed(program, Path(scratch), BUDGET, parts)
            train()
            trained = time.perf_counter()
            try:
                found = found_by()
                said = {
                    "verdict": found.verdict,
                    "named": [culprit.fault for culprit in found.culprits],
                    "confidence": [round(culprit.confidence, 3) for culprit in found.culprits],
                    "evidence": [str(culprit.evidence[:1])[:300] for culprit in found.culprits[:2]],
                    "remarks": sorted({remark.fault for remark in getattr(found, "remarks", ())}),
                }
            except SolotuneError as refusal:  # at the door; it may name the fault
                codes = re.findall(r"\bF\d\d\b", f"{refusal} {getattr(refusal, 'fault', '')}")
                said = {"verdict": "fault" if codes else "refused", "named": codes, "error": str(refusal)[:400]}
    except Exception as error:
        said = {"verdict": "failed", "named": [], "error": f"{error!r}\n{traceback.format_exc()[-1200:]}"}
    ended = time.perf_counter()
    said["cpu"] = round(time.process_time(), 1)
    return {
        **_known(program),
        **said,
        "train_seconds": round(trained - started, 1),
        "seconds": round(ended - started, 1),
    }


def run_all(chosen: list[Any], jobs: int, minutes: float, say: Any, parts: Parts) -> list[dict[str, Any]]:
    _bases(sorted({program.base for program in chosen}), jobs, parts)
    for name in sorted({program.base for program in chosen}):
        base = parts.load(name)
        base.model()
        base.tokenizer()
    results = []
    for result in forked(chosen, jobs, time.perf_counter() + 60 * minutes, partial(one, parts=parts), _failed, LIMIT):
        results.append(result)
        say(result)
    return results


def _known(program: Any) -> dict[str, Any]:
    return {"program": program.name, "kind": program.kind, "base": program.base, "task": program.task,
            "truth": list(program.codes)}  # fmt: skip


def _failed(program: Any, error: str, seconds: float) -> dict[str, Any]:
    return {**_known(program), "verdict": "failed", "named": [], "error": error, "seconds": round(seconds, 1)}


def _bases(names: list[str], jobs: int, parts: Parts) -> None:
    """Makes those that this machine has not; each in a process, which keeps torch's threads out of this one."""
    missing = [name for name in names if not (parts.folder_of(name) / "base.json").exists()]
    fork = multiprocessing.get_context("fork")
    for begin in range(0, len(missing), max(jobs, 1)):
        some = missing[begin : begin + max(jobs, 1)]
        processes = [fork.Process(target=_quiet, args=(parts.load, name)) for name in some]
        for process in processes:
            process.start()
        for process in processes:
            process.join()


def _quiet(load: Any, name: str) -> None:
    import torch

    torch.set_num_threads(1)
    load(name)


def main(parts: Parts) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m bench.diagnose.{parts.name}")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--kind")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--out", default=f"{parts.name}.jsonl")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--bases", action="store_true", help="make the bases and end")
    asked = parser.parse_args()

    from bench.diagnose.unseen import score

    chosen = [
        p for p in parts.programs()
        if asked.kind in (None, p.kind)
        and (not asked.only or any(all(part in p.name for part in word.split("/")) for word in asked.only))
    ]  # fmt: skip
    if asked.bases:
        _bases(sorted({p.base for p in parts.programs()}), asked.jobs, parts)
        return
    if asked.list:
        for p in chosen:
            print(f"{p.name:75} {p.why}")
        return
    random.Random(0).shuffle(chosen)
    started = time.perf_counter()
    with Path(asked.out).open("w") as file:

        def say(result: dict[str, Any]) -> None:
            file.write(json.dumps({**result, "named": result["named"][:3], "all_named": result["named"]}) + "\n")
            file.flush()

        results = run_all(chosen, asked.jobs, asked.minutes, say, parts)
    print(json.dumps(score.table(results), indent=1))
    spent = time.perf_counter() - started
    print(f"{len(results)} of {len(chosen)} programs, {spent / 60:.1f} minutes, "
          f"{sum(r['seconds'] for r in results) / 60:.0f} program minutes, "
          f"{sum(r.get('cpu', 0) for r in results) / 60:.0f} of them of a core; {asked.out}")  # fmt: skip
