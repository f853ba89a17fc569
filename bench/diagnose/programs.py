"""All programs: one base, one or two changes, one seed. Whole bases are held out: nothing is fitted on them.

    programs()                      every program, in a fixed order
    ordinary(FOLDER)                configs over real files and templated tasks, all healthy
    matching("F17", "held-out")     some of both

A held-out program has a tokenizer, a template, a world of data and an architecture that no fitted program has.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from bench.diagnose import (
    faults_batch,
    faults_machine,
    faults_text,
    faults_training,
    healthy,
    ours,
    ours_faults,
    ours_faults_run,
    ours_healthy,
    ranks,
    real_configs,
    templated_configs,
    trl_faults,
    trl_faults_saved,
    trl_healthy,
)
from bench.diagnose import trl_run as trl
from bench.diagnose.bases import KINDS, load, made_here
from bench.diagnose.configs import ConfigProgram
from bench.diagnose.recipe import Recipe, clean
from bench.diagnose.registry import FAULTS, HEALTHY, Injection

REGISTERED = (faults_batch, faults_machine, faults_text, faults_training, healthy, ours_faults, ours_faults_run,
              ours_healthy, ranks, trl_faults, trl_faults_saved, trl_healthy)  # fmt: skip
NOT_INJECTED: dict[str, str] = {}
"""Code -> why there is no program for it."""

PAIRS = (
    ("F21", "F24"), ("F25", "F20"), ("F11", "F64"), ("F11", "F17"), ("F44", "F46"), ("F10", "F65"), ("F17", "F61"),
    ("F12", "F64"), ("F22", "F66"), ("F37", "F20"), ("F34", "F65"), ("F38", "F64"), ("F20", "F67"), ("F28", "F58"),
    ("F35", "F43"), ("F39", "F23"), ("F43", "F69"), ("F47", "F60"), ("F48", "F65"), ("F19", "F62"), ("F29", "F68"),
    ("F56", "F17"), ("F59", "F34"), ("F75", "F24"), ("F36", "F66"), ("F45", "F22"), ("F74", "F20"), ("F78", "F10"),
)  # fmt: skip

FOREIGN = (
    "clean", "empty_answers", "constant_answer", "foreign_roles", "mojibake", "misaligned", "repeated_rows",
    "memorised", "foreign_targets", "scale_too_small", "scale_too_large", "too_little_capacity", "rate_too_low",
    "warmup_too_long", "rate_too_high", "clipped_away", "decays_too_much", "saved_before_training", "keys_unmatched",
    "stops_elsewhere", "markers_as_text", "prompt_fills_window", "half_frozen", "swapped_roles", "alpha_four_times_r",
    "decays_weights", "cosine_with_warmup", "another_language", "several_turns",
)  # fmt: skip
"""What can be seen in a folder: of the loop only its curve, of the collator nothing."""

REAL = (
    "clean", "rate_too_low", "scale_too_large", "pad_masks_terminator", "misaligned", "half_frozen", "random_b",
)  # fmt: skip
"""With a real model: a few, for each takes minutes."""


@dataclass(frozen=True)
class Program:
    """One run of the benchmark."""

    base: str
    changes: tuple[Injection, ...] | tuple[ours.Asked, ...]
    kind: str  # fault, healthy, pair, foreign, own
    repeat: int = 0
    is_before: bool = False  # of our own: the config is diagnosed, and nothing trained
    alone: str = ""  # foreign: the folder alone is given; "data" or "base": what lies beside it

    @property
    def codes(self) -> tuple[str, ...]:
        return tuple(change.code for change in self.changes if change.code)

    @property
    def split(self) -> str:
        return "held-out" if KINDS[self.base].held_out else "fitted"

    @property
    def name(self) -> str:
        """F17/pad_masks_terminator/llama-chatml"""
        what = "+".join(change.name for change in self.changes)
        where = f"{self.base}/{self.kind}" if self.kind in ("foreign", "own") else self.base
        where += "/before" if self.is_before else ""
        return f"{'+'.join(self.codes) or 'healthy'}/{what}/{where}" + (f"/{self.repeat}" if self.repeat else "")

    def trl_run(self) -> trl.Run | None:
        """The script with TRL, changed; None where TRL is not what trains."""
        return None

    def preload(self) -> None:
        """Loads what all programs of this base share."""
        base = load(self.base)
        base.model()
        base.tokenizer()

    @cached_property
    def seed(self) -> int:
        return int(hashlib.sha256(self.name.encode()).hexdigest()[:6], 16)

    def recipe(self) -> Recipe:
        """The training, changed; data first, since other changes look at it."""
        recipe = clean(load(self.base), self.seed)
        for change in self.changes:
            assert isinstance(change, Injection)
            change.change(recipe, random.Random(self.seed))
        return recipe

    def job(self) -> ours.Job:
        """What is asked of solotune, changed."""
        job = ours.clean(load(self.base), self.seed)
        for change in self.changes:
            assert isinstance(change, ours.Asked)
            change.change(job, random.Random(self.seed))
        job.is_before = self.is_before
        return job


@dataclass(frozen=True)
class TrlProgram(Program):
    """One run of a script with TRL's SFTTrainer."""

    trl_change: trl.TrlChange = trl.CHANGES[0]

    @property
    def codes(self) -> tuple[str, ...]:
        return self.trl_change.codes

    @property
    def name(self) -> str:
        """F64+F03/rate_left_out/opt-inst/trl"""
        return f"{'+'.join(self.codes) or 'healthy'}/{self.trl_change.name}/{self.base}/trl"

    def trl_run(self) -> trl.Run:
        run = trl.clean(load(self.base), self.seed)
        self.trl_change.change(run, random.Random(self.seed))
        return run


def _bases(change: Injection | ours.Asked, place: int, num_fitted: int, num_held_out: int) -> list[str]:
    """Some fitted and some held-out bases, other ones for every change."""
    found = []
    for held_out, count in ((False, num_fitted), (True, num_held_out)):
        fitting = [name for name, kind in made_here().items() if kind.held_out == held_out and change.fits(name)]
        found += [fitting[(place + i) % len(fitting)] for i in range(min(count, len(fitting)))]
    return found


def programs() -> list[Program]:
    """Every program."""
    found = []
    for place, change in enumerate(FAULTS):
        found += [Program(base, (change,), "fault") for base in _bases(change, place, 1, 2)]
    for place, change in enumerate(HEALTHY):
        found += [Program(base, (change,), "healthy") for base in _bases(change, place, 1, 1)]
    clean_runs = HEALTHY[0]
    found += [Program(base, (clean_runs,), "healthy", repeat) for base in made_here() for repeat in range(1, 4)]
    by_code = {change.code: change for change in reversed(FAULTS)}
    for place, codes in enumerate(PAIRS):
        changes = tuple(by_code[code] for code in codes)
        fitting = [
            name
            for name, kind in made_here().items()
            if kind.held_out == bool(place % 2) and all(change.fits(name) for change in changes)
        ]
        if fitting:
            found.append(Program(fitting[place % len(fitting)], changes, "pair"))
    by_name = {change.name: change for change in [*FAULTS, *HEALTHY]}
    for name in REAL:
        found.append(Program("smollm2-135m", (by_name[name],), "fault" if by_name[name].code else "healthy"))
    for place, name in enumerate(FOREIGN):
        change = by_name[name]
        held_out = bool(place % 2)
        fitting = [
            base
            for base, kind in made_here().items()
            if kind.held_out == held_out and change.fits(base) and kind.is_instruct  # Trainer's users render by it
        ]
        found.append(Program(fitting[place % len(fitting)], (change,), "foreign"))
    for place, change in enumerate([*ours.FAULTS, *ours.HEALTHY]):
        for base in _bases(change, place, 1, 1):
            found.append(Program(base, (change,), "own"))
            found += [Program(base, (change,), "own", is_before=True)] if change.is_seen_before else []
    return found + (_trl_programs() if trl.is_installed() else [])


def _trl_programs() -> list[Program]:
    """Each change on a fitted base and on one that is held out."""
    found: list[Program] = []
    for place, change in enumerate(trl.CHANGES):
        for held_out in (False, True):
            fitting = [n for n, kind in made_here().items() if kind.held_out == held_out and change.needs.met_by(kind)]
            found.append(TrlProgram(fitting[place % len(fitting)], (), "foreign", trl_change=change))
    return found


def ordinary(data: Path | None = None) -> list[ConfigProgram]:
    """Configs over real files and over templated tasks, in which nothing is wrong.

    Args:
        data: folder of `bench.real_data`; without its files only what is made here.
    """
    folder = data or real_configs.default_folder()
    return [*real_configs.programs(folder), *templated_configs.programs(folder / "tokenizers")]


def matching(
    only: list[str], split: str | None = None, data: Path | None = None, alone: str = ""
) -> list[Program | ConfigProgram]:
    """Programs whose name has one of the words in it (all if there are none), of one split or of both.

    Args:
        alone: only folders of other trainers, given alone; see `Program.alone`.
    """
    if alone:
        known = [replace(program, alone=alone) for program in programs() if program.kind == "foreign"]
    else:
        known = [*programs(), *ordinary(data)]
    return [
        program
        for program in known
        if (split is None or program.split == split)
        and (not only or any(all(part in program.name for part in word.split("/")) for word in only))
    ]
