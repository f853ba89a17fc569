"""One program: train it, hand over what its owner would have, and take down the diagnosis.

    results = run_all(programs(), jobs=2)

Each program has a process of its own, forked from one that has torch loaded, so that none sees what another left.
"""

from __future__ import annotations

import math
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

import solotune
from bench.diagnose import foreign, ours, trl_run
from bench.diagnose.configs import ConfigProgram
from bench.diagnose.forks import Result, forked
from bench.diagnose.loop import train
from bench.diagnose.programs import Program
from bench.diagnose.run_facts import plain, run_facts_of
from solotune.diagnosis.run_diagnosis import examine
from solotune.diagnosis.run_facts import RunFacts

if TYPE_CHECKING:
    from solotune.diagnosis.evidence import Diagnosis

BUDGET = 60.0
"""Seconds that the probes of one program may take."""
LIMIT = 900
"""Seconds after which a program is given up."""


def run_facts(program: Program, scratch: Path) -> RunFacts:
    """The program's training, really run; a foreign one leaves its folder in `scratch`."""
    if (script := program.trl_run()) is not None:
        return trl_run.run_facts_of(script, scratch, program.alone)
    recipe = program.recipe()
    if program.kind == "foreign":
        return foreign.run_facts_of(recipe, scratch, program.alone)
    return run_facts_of(recipe, train(recipe))


def run(program: Program | ConfigProgram) -> Result:
    """The program's truth and its diagnosis."""
    with tempfile.TemporaryDirectory() as scratch:
        started = time.process_time()  # of a core, whatever else runs on this machine
        if isinstance(program, ConfigProgram):
            found, also = program.asked(Path(scratch), BUDGET)
            return {**told(found), **also, "diagnose_seconds": time.process_time() - started}
        if program.kind == "own":
            target = ours.carried_out(program.job(), Path(scratch))
            trained = time.process_time()
            found = solotune.diagnose(target, budget=BUDGET)
            ended = time.process_time()
            return {**told(found), "train_seconds": trained - started, "diagnose_seconds": ended - trained}
        examined = run_facts(program, Path(scratch))
        trained = time.process_time()
        found = examine(examined, budget=BUDGET)
        ended = time.process_time()
    return {**told(found), "train_seconds": trained - started, "diagnose_seconds": ended - trained}


def told(found: Diagnosis) -> Result:
    """A diagnosis in short."""
    return {
        "verdict": found.verdict,
        "named": [culprit.fault for culprit in found.culprits],
        "confidence": [culprit.confidence for culprit in found.culprits],
        "same_evidence": [list(culprit.same_evidence) for culprit in found.culprits],
        "evidence": [culprit.evidence[:1] for culprit in found.culprits],
        "remarks": [(remark.fault, remark.says, remark.affected) for remark in found.remarks],
        "not_checked": list(found.not_checked),
        "confirmed": [culprit.confirmed_by for culprit in found.culprits],
        "next_experiment": found.next_experiment,
        "cost": plain(found.cost),
        "skipped": dict(found.skipped),
    }


def _one(program: Program | ConfigProgram) -> Result:
    """`run`, in a child."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    try:
        return {**_known(program), **run(program)}
    except Exception as error:  # a diagnosis that fails is a mistake, and the campaign goes on
        return _failed(program, f"{error!r}\n{traceback.format_exc()[-1500:]}")


def _known(program: Program | ConfigProgram) -> Result:
    return {
        "program": program.name,
        "kind": program.kind,
        "split": program.split,
        "base": program.base,
        "truth": list(program.codes),
    }


def _failed(program: Program | ConfigProgram, error: str, _seconds: float = 0.0) -> Result:
    return {**_known(program), "verdict": "failed", "named": [], "error": error}


def run_all(
    chosen: Sequence[Program | ConfigProgram],
    jobs: int = 1,
    say: Callable[[Result], None] = lambda _: None,
    minutes: float = math.inf,
) -> list[Result]:
    """Results in the programs' order; after so many minutes no further program starts."""
    for program in {program.base: program for program in chosen}.values():
        program.preload()  # before the forks, so that they share it
    results = []
    for result in forked(chosen, jobs, time.perf_counter() + 60 * minutes, _one, _failed, LIMIT):
        say(result)
        results.append(result)
    place = {program.name: number for number, program in enumerate(chosen)}
    return sorted(results, key=lambda result: place[result["program"]])
