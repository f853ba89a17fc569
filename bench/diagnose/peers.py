"""python -m bench.diagnose.peers [--peers NAME ...] [--only WORD ...] [--sample N] [--jobs N] [--install]

How many faults public tools for the same purpose name on the programs of this benchmark, and on how many healthy ones
they raise an alarm. Which files each of them is given, and which of its commands: `peers_run.py`. What a warning of
theirs may mean: `peers_codes.py`, one generous table; what stands in no table is advice.

    --install                       makes the peers' virtual environments below --environments, and ends
    --programs MODULE:FUNCTION      where programs come from: a function of no argument that returns objects with
                                    `name`, `codes`, `kind`, and either `recipe()`, `job()`, `trl_run()` as in
                                    `programs.py`, or `exhibit(folder)`, which fills the folder and returns the
                                    settings (`exhibits.py` has the layout)
    --exhibits FOLDER               folders that are filled already, instead of programs
    --sample 60                     so many faults, of as many codes as there are, and half as many healthy programs
    --ours FILE                     what our diagnosis said of the same programs: bench/results/diagnose.jsonl
    --kept FOLDER                   where trained programs are kept, so that all tools see the same files

Named: some warning of level `warning` or `error` maps to the true fault, wherever it stands. Named first: the first of
those that map to any fault does. An alarm: a healthy program with a warning that maps to a fault. Ours is scored by its
first answer alone, under a verdict of `fault`. Of a sample (or all) without --only, bench/results/peers.md and .json
are written.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import queue
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

from bench.diagnose.exhibits import Exhibit, Program, left_by
from bench.diagnose.peers_codes import codes_of
from bench.diagnose.peers_process import Environment, install, installed_version
from bench.diagnose.peers_run import PEERS, warnings_of
from bench.diagnose.score import EQUIVALENT, accepted, is_hit
from bench.machine import RESULTS, machine, table, write_result

KEPT = Path("/tmp/bench-peers")
PREFERRED = ("foreign", "own", "fault", "healthy")
"""Kinds of programs by how much of what a peer reads they leave behind; two faults at once are left out."""

Row = dict[str, Any]


def main() -> None:
    asked = _arguments()
    if asked.install:
        for name in asked.peers:
            peer = PEERS[name]
            install(asked.environments / name, [peer.package], peer.shares_training_stack)
        return
    ours = _ours(asked.ours) if asked.ours.exists() else {}
    if asked.exhibits is not None:
        exhibits = [Exhibit.read(file.parent) for file in sorted(asked.exhibits.glob("*/truth.json"))]
    else:
        chosen = _chosen(_programs(asked.programs), asked.only, asked.sample, set(ours))
        if asked.list:
            print("\n".join(program.name for program in chosen))
            return
        exhibits = _trained(chosen, asked.kept, asked.jobs)
    started = time.perf_counter()
    rows = _asked_all(exhibits, asked.peers, asked.environments, asked.jobs)
    versions = {name: installed_version(asked.environments / name, PEERS[name].package) for name in asked.peers}
    found = result(rows, versions, ours)
    found["seconds"] = round(time.perf_counter() - started)
    print(json.dumps(found["scores"], indent=1))
    if not asked.only:
        write(found, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.diagnose.peers", description="Scores public tools.")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="only these programs: F17/qwen3")
    parser.add_argument("--sample", type=int, default=60, help="faults, and half as many healthy programs; 0: all")
    parser.add_argument("--jobs", type=int, default=1, help="programs at a time")
    parser.add_argument("--programs", default="bench.diagnose.programs:programs", metavar="MODULE:FUNCTION")
    parser.add_argument("--exhibits", type=Path, metavar="FOLDER", help="filled folders instead of programs")
    parser.add_argument("--ours", type=Path, default=RESULTS / "diagnose.jsonl", metavar="FILE")
    parser.add_argument("--kept", type=Path, default=KEPT / "programs", metavar="FOLDER")
    parser.add_argument("--environments", type=Path, default=KEPT / "environments", metavar="FOLDER")
    parser.add_argument("--install", action="store_true", help="make the peers' virtual environments")
    parser.add_argument("--list", action="store_true", help="print the programs' names, run nothing")
    return parser.parse_args()


# --- programs


def _programs(source: str) -> list[Program]:
    module, _, function = source.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    return list(getattr(importlib.import_module(module), function)())


def _ours(file: Path) -> dict[str, Row]:
    """What our diagnosis said, by program."""
    return {row["program"]: row for row in map(json.loads, file.read_text().splitlines())}


def _chosen(programs: list[Program], only: list[str], sample: int, answered: set[str]) -> list[Program]:
    """The programs asked for, or a sample: first one of each code, then the second of each, and so on.

    Those that our results answer come first, so that the same ones are compared. Every third one is healthy, so that
    the beginning of a sample is a sample.
    """
    if only:
        return [one for one in programs if any(all(part in one.name for part in word.split("/")) for word in only)]
    fitting = [one for one in programs if one.kind in PREFERRED and _fits_here(one)]
    if not sample:
        return fitting

    def order(program: Program) -> tuple[bool, int, str]:
        scattered = hashlib.sha256(program.name.encode()).hexdigest()
        return program.name not in answered, PREFERRED.index(program.kind), scattered

    by_code: dict[str, list[Program]] = {}
    for program in sorted((one for one in fitting if one.codes), key=order):
        by_code.setdefault(program.codes[0], []).append(program)
    ranked = [
        (place, hashlib.sha256(code.encode()).hexdigest(), program)
        for code, many in by_code.items()
        for place, program in enumerate(many)
    ]
    faults = [program for _, _, program in sorted(ranked, key=lambda one: one[:2])[:sample]]
    healthy = sorted((one for one in fitting if not one.codes), key=lambda one: (order(one)[0], order(one)[2]))
    groups = [[*faults[2 * place : 2 * place + 2], *healthy[place : place + 1]] for place in range(-(-sample // 2))]
    return [program for group in groups for program in group]


def _fits_here(program: Any) -> bool:
    """A real model takes minutes a program."""
    return getattr(program, "base", "") != "smollm2-135m"


def _trained(programs: Sequence[Program], kept: Path, jobs: int) -> list[Exhibit]:
    """Their files; what is kept from another time is not trained again."""
    kept.mkdir(parents=True, exist_ok=True)
    places = [kept / hashlib.sha256(one.name.encode()).hexdigest()[:16] for one in programs]
    fork = multiprocessing.get_context("spawn")
    with fork.Pool(jobs, maxtasksperchild=20) as pool:
        failures = pool.starmap(_leave, zip(programs, places, strict=True), chunksize=1)
    for program, failure in zip(programs, failures, strict=True):
        if failure:
            print(f"{program.name}: no files ({failure})", flush=True)
    return [Exhibit.read(place) for place, failure in zip(places, failures, strict=True) if not failure]


def _leave(program: Program, folder: Path) -> str:
    """Why it left no files; empty if it did."""
    import warnings

    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    try:
        left_by(program, folder)
    except Exception as error:  # the others go on
        return repr(error)[:300]
    return ""


# --- peers


def _asked_all(exhibits: Sequence[Exhibit], peers: Sequence[str], environments: Path, jobs: int) -> list[Row]:
    """What each peer said of each program; each of the jobs has an environment of each peer."""
    free: queue.SimpleQueue[dict[str, Environment]] = queue.SimpleQueue()
    for _ in range(jobs):
        free.put({name: Environment(environments / name, PEERS[name].preload) for name in peers})

    def asked(exhibit: Exhibit) -> Row:
        processes = free.get()
        row: Row = {"program": exhibit.name, "truth": list(exhibit.truth), "said": {}, "failed": []}
        for name, process in processes.items():
            warned, failed = warnings_of(PEERS[name], process, exhibit)
            row["said"][name] = [(one.kind, one.level) for one in warned]
            row["failed"] += failed
        free.put(processes)
        said = {name: [kind for kind, level in said if level != "note"] for name, said in row["said"].items()}
        print(f"{exhibit.name:60} {said} {row['failed'] or ''}", flush=True)
        return row

    with ThreadPoolExecutor(jobs) as pool:
        rows = list(pool.map(asked, exhibits))
    for _ in range(jobs):
        for process in free.get().values():
            process.close()
    return rows


def answers(row: Row, peer: str, notes: bool = False) -> list[tuple[str, ...]]:
    """The codes of each of its warnings that maps to a fault, in its order."""
    said = (codes_of(peer, kind) for kind, level in row["said"].get(peer, ()) if notes or level != "note")
    return [codes for codes in said if codes]


def is_named(row: Row, peer: str, first: bool = False, notes: bool = False) -> bool:
    found = answers(row, peer, notes)[: 1 if first else None]
    return any(accepted(row["truth"]) & set(codes) for codes in found)


def score(rows: Sequence[Row], named: Callable[[Row], bool], alarmed: Callable[[Row], bool]) -> Row:
    faults, healthy = [row for row in rows if row["truth"]], [row for row in rows if not row["truth"]]
    return {
        "named": sum(map(named, faults)),
        "faults": len(faults),
        "alarms": sum(map(alarmed, healthy)),
        "healthy": len(healthy),
    }


def result(rows: Sequence[Row], versions: dict[str, str], ours: dict[str, Row]) -> Row:
    """The scores of each peer, of all together, and of ours."""
    scores: dict[str, Row] = {}
    for peer in versions:
        scores[peer] = score(rows, lambda row, p=peer: is_named(row, p), lambda row, p=peer: bool(answers(row, p)))
        scores[peer]["named first"] = sum(is_named(row, peer, first=True) for row in rows if row["truth"])
        scores[peer]["named, notes counted"] = sum(is_named(row, peer, notes=True) for row in rows if row["truth"])
        scores[peer]["healthy with any warning"] = sum(
            any(level != "note" for _, level in row["said"][peer]) for row in rows if not row["truth"]
        )
    scores["all peers"] = score(
        rows,
        lambda row: any(is_named(row, peer) for peer in versions),
        lambda row: any(answers(row, peer) for peer in versions),
    )
    known = [row for row in rows if row["program"] in ours]
    if known:
        scores["solotune"] = score(
            known,
            lambda row: is_hit(ours[row["program"]], aware=True),
            lambda row: ours[row["program"]]["verdict"] == "fault",
        )
    return {
        "date": date.today().isoformat(),
        "command": " ".join(["python -m bench.diagnose.peers", *sys.argv[1:]]),
        "machine": machine("torch", "transformers", "peft"),
        "versions": versions,
        "scores": scores,
        "programs": [
            {**row, "ours": ours[row["program"]]["named"][:1] if row["program"] in ours else None} for row in rows
        ],
    }


def write(found: Row, rows: Sequence[Row]) -> None:
    """bench/results/peers.json and peers.md."""
    write_result("peers", found)
    (RESULTS / "peers.md").write_text(page(found, rows), encoding="utf-8")


def page(found: Row, rows: Sequence[Row]) -> str:
    scores, versions = found["scores"], found["versions"]
    lines = [
        "# Public tools on the same programs",
        "",
        f"`{found['command']}`, {found['date']}, {len(rows)} programs.",
        "Each tool is run as its documentation says on the files that the program leaves (listed in",
        "`bench/diagnose/peers_run.py`), and is credited for every warning that may mean the true fault",
        "(`bench/diagnose/peers_codes.py`), wherever it stands; ours by its first answer alone. An alarm is a healthy",
        "program with a warning that may mean a fault; advice (a large batch, no limit of checkpoints) is none.",
        "",
        table(
            ["tool", "version", "named", "of faults", "named first", "alarms", "of healthy", "with any warning"],
            [_line(name, scores[name], versions.get(name, "")) for name in scores],
        ),
        "",
        "Faults that only some of them see, by code (n of the sample's programs):",
        "",
        _by_code(rows, list(versions)),
        "",
        "## Limits",
        "",
        f"Equivalent faults count as one: {', '.join('/'.join(sorted(group)) for group in EQUIVALENT)}.",
        "The programs are this benchmark's own, and our rules were developed beside them; the peers saw none. Faults",
        "in the code of a loop leave only labels and a curve, which a tool that reads scripts cannot see.",
        "",
    ]
    return "\n".join(lines)


def _line(name: str, row: Row, version: str) -> list[Any]:
    told = [row["named"], row["faults"], row.get("named first", "-"), row["alarms"], row["healthy"]]
    return [name, version, *told, row.get("healthy with any warning", "-")]


def _by_code(rows: Sequence[Row], peers: Iterable[str]) -> str:
    peers = list(peers)
    by_code: dict[str, list[Row]] = {}
    for row in rows:
        if row["truth"]:
            by_code.setdefault(row["truth"][0], []).append(row)
    lines = [
        [code, len(many), *(sum(is_named(row, peer) for row in many) or "" for peer in peers)]
        for code, many in sorted(by_code.items())
        if any(is_named(row, peer) for row in many for peer in peers)
    ]
    return table(["fault", "programs", *peers], lines)


if __name__ == "__main__":
    main()
