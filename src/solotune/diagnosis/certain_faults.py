"""Faults that are certain before the first step: `train` stops for them, `data` and `plan` say them too.

    found = of_run(run_facts, ask_all(run_facts)[0])      the findings
    refusal(found, allowed)                               the error that stops the run; None: nothing does

Certain is a violated equation (`invariant`) that `verdict.decide` names: a rate at which one step changes a weight by
half of its size, rows without any label. Such a run cannot be meant, so it costs nothing to ask first. A statistic
(`measured`) does not stop a run, however far it is beyond its control: unusual data may be meant, and only its owner
knows. Neither does a remark. A fault that follows from another is not named beside it.

`allow_faults` in the config lets a run start with the faults that it names. A run that goes on from a checkpoint is not
stopped: what its first steps did, they did.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from solotune.config.run_config import RunConfig
from solotune.diagnosis import catalogue
from solotune.diagnosis.catalogue import FAULTS
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import ask_all
from solotune.diagnosis.run_facts import RunFacts
from solotune.diagnosis.thresholds import RANK
from solotune.diagnosis.verdict import decide, weigh
from solotune.errors import CheckError, InputError


def allowed_codes(config: RunConfig) -> frozenset[str]:
    """The codes of the faults that the config allows.

    Raises:
        InputError: there is no such fault; the message gives the nearest names.
    """
    names = [config.allow_faults] if isinstance(config.allow_faults, str) else config.allow_faults
    return frozenset(_code(name, config.source_of("allow_faults")) for name in names)


def _code(name: str, source: str) -> str:
    try:
        code = catalogue.find(name)
    except InputError as error:
        problem = f"{source}, allow_faults: {error.problem}"
        raise InputError(problem, seen=name, allowed="F01 to F81, or a fault's name", change=error.change) from None
    if code not in FAULTS:
        known = ", ".join(fault.code for fault in FAULTS.values() if fault.suspect == code)
        raise InputError(f"{source}, allow_faults: {code} is a suspect, not a fault", seen=name, allowed=known)
    return code


def of_run(run_facts: RunFacts, signals: Sequence[Signal] | None = None) -> list[Finding]:
    """The faults that are certain, as findings; empty if there are none.

    Args:
        signals: of the rules, if they ran.
    """
    signals = ask_all(run_facts)[0] if signals is None else signals
    weighed = weigh(signals)
    found = []
    for culprit in decide(run_facts.name, signals).culprits:
        one = weighed[culprit.fault]
        if one.is_accused and one.rank == RANK["invariant"]:
            says = one.supporting[0]
            found.append(
                Finding.of(
                    culprit.fault,
                    "error",
                    message=says.says,
                    evidence=says.numbers,
                    fix=culprit.fix,
                    affected=one.affected,
                )
            )
    return found


def refusal(found: Sequence[Finding], allowed: Collection[str]) -> CheckError | None:
    """The error that stops a run with these faults before its first step; None if all of them are allowed."""
    stopping = [finding for finding in found if finding.code not in allowed]
    if not stopping:
        return None
    names = ", ".join(f"{finding.code} {finding.slug}" for finding in stopping)
    titles = [FAULTS[finding.code].title.rstrip(".") for finding in stopping]
    what = "; ".join(title[0].lower() + title[1:] for title in titles)
    codes = ", ".join([*sorted(allowed), *(finding.code for finding in stopping)])
    fixes = "; ".join(dict.fromkeys(finding.fix for finding in stopping))
    return CheckError(
        f"stopped before the first step, and nothing is written: {what} ({names})",
        seen="; ".join(finding.message.rstrip(".") for finding in stopping),
        change=f"{fixes}. To train all the same: allow_faults: [{codes}]",
        fault=stopping[0].code,
    )
