"""python -m bench.diagnose.unseen [--only WORD ...] [--kind KIND] [--jobs N] [--minutes M] [--out FILE.jsonl]
    [--list | --bases]

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
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of a core alone; and CUDA does not survive a fork

BUDGET, LIMIT = 60.0, 400


def one(program: Any) -> dict[str, Any]:
    import torch
    import transformers

    from bench.diagnose.unseen.make import diagnosed
    from solotune.errors import SolotuneError

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    known = {"program": program.name, "kind": program.kind, "base": program.base, "task": program.task,
             "truth": list(program.codes)}  # fmt: skip
    started = time.perf_counter()
    trained = started
    try:
        with tempfile.TemporaryDirectory() as scratch:
            found_by, train = diagnosed(program, Path(scratch), BUDGET)
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
    return {**known, **said, "train_seconds": round(trained - started, 1), "seconds": round(ended - started, 1)}


def _child(program: Any, pipe: Any) -> None:
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        pipe.send(one(program))
    os._exit(0)


def run_all(chosen: list[Any], jobs: int, minutes: float, say: Any) -> list[dict[str, Any]]:
    from bench.diagnose.unseen.bases import load

    _bases(sorted({program.base for program in chosen}), jobs)
    for name in sorted({program.base for program in chosen}):
        base = load(name)
        base.model()
        base.tokenizer()
    fork = multiprocessing.get_context("fork")
    until = time.perf_counter() + 60 * minutes
    waiting, running, results = list(reversed(chosen)), [], []
    while waiting or running:
        if time.perf_counter() > until:
            waiting.clear()
        while waiting and len(running) < jobs:
            program = waiting.pop()
            mine, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=_child, args=(program, theirs))
            process.start()
            theirs.close()
            running.append((program, process, mine, time.perf_counter()))
        for entry in list(running):
            program, process, pipe, started = entry
            late = time.perf_counter() - started > LIMIT
            if not (pipe.poll(0.05) or late or not process.is_alive()):
                continue
            known = {"program": program.name, "kind": program.kind, "base": program.base, "task": program.task,
                     "truth": list(program.codes), "verdict": "failed", "named": [],
                     "error": "took too long" if late else "the process ended",
                     "seconds": round(time.perf_counter() - started, 1)}  # fmt: skip
            try:
                result = pipe.recv() if pipe.poll(0) else known
            except EOFError:
                result = known
            if late:
                process.kill()
            process.join()
            running.remove(entry)
            results.append(result)
            say(result)
    return results


def _bases(names: list[str], jobs: int) -> None:
    """Makes those that this machine has not; each in a process, which keeps torch's threads out of this one."""
    from bench.diagnose.unseen.bases import folder_of, load

    missing = [name for name in names if not (folder_of(name) / "base.json").exists()]
    fork = multiprocessing.get_context("fork")
    for begin in range(0, len(missing), max(jobs, 1)):
        processes = [fork.Process(target=_quiet, args=(load, name)) for name in missing[begin : begin + max(jobs, 1)]]
        for process in processes:
            process.start()
        for process in processes:
            process.join()


def _quiet(load: Any, name: str) -> None:
    import torch

    torch.set_num_threads(1)
    load(name)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.diagnose.unseen")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--kind")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--out", default="unseen.jsonl")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--bases", action="store_true", help="make the bases and end")
    asked = parser.parse_args()

    from bench.diagnose.unseen import score
    from bench.diagnose.unseen.programs import programs

    chosen = [
        p for p in programs()
        if asked.kind in (None, p.kind)
        and (not asked.only or any(all(part in p.name for part in word.split("/")) for word in asked.only))
    ]  # fmt: skip
    if asked.bases:
        _bases(sorted({p.base for p in programs()}), asked.jobs)
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

        results = run_all(chosen, asked.jobs, asked.minutes, say)
    print(json.dumps(score.table(results), indent=1))
    spent = time.perf_counter() - started
    print(f"{len(results)} of {len(chosen)} programs, {spent / 60:.1f} minutes, "
          f"{sum(r['seconds'] for r in results) / 60:.0f} program minutes, "
          f"{sum(r.get('cpu', 0) for r in results) / 60:.0f} of them of a core; {asked.out}")  # fmt: skip


if __name__ == "__main__":
    main()
