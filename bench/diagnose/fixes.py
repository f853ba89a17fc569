"""python -m bench.diagnose.fixes [--only WORD ...]: apply each fix to the config that raised it, and ask again.

Of every program of solotune's own, the config is diagnosed before a run (`diagnose --budget 0`). Each named fault and
each remark has a fix; what it says is done, and the config is diagnosed once more. It works if the finding is gone and
no other fault is named. Printed: a line for each fix, and at the end those that do not work; exit code 1 if there are
any.

A fix is what it begins with: keys of the config (`key: value`, `remove key`, several joined by `, ` or ` and `), of
which an alternative behind `, or` or `;` is not tried. A fix of the data is done by code where the rows say how
(`DATA`); where it is for the model's files, the template or another tool, it is listed as done by hand.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import yaml

from solotune.config.run_config import RunConfig

Rows = list[dict[str, Any]]
GONE = object()
"""Instead of a value: the key is removed."""
PARTS = re.compile(r",? and (?=(?:set |remove )?`?\w+`?:? ?)|, (?=(?:set |remove )?`?\w+: )")
OF_OTHERS = re.compile(r"\((?:TRL|transformers|PEFT|in [^)]*)\)|^in (?:TRL|PEFT|transformers)\b")


@dataclass(frozen=True)
class Case:
    """A config with its rows: what a fix changes."""

    config: dict[str, Any]
    train: Rows
    held_out: Rows


class Said(NamedTuple):
    """What was found, and what to do about it."""

    code: str
    is_fault: bool
    fix: str


class Outcome(NamedTuple):
    """What became of one fix: `works`, `stays`, `brings F..`, or `by hand`."""

    code: str
    is_fault: bool
    fix: str
    result: str

    @property
    def is_wrong(self) -> bool:
        return self.result not in ("works", "by hand")


# --- what a fix says


def changes_in(fix: str) -> dict[str, Any]:
    """Keys and values that the fix begins with; empty if it is not about keys of the config."""
    if OF_OTHERS.search(fix):
        return {}
    first = re.split(r",? or |; | \((?!enough)", fix, maxsplit=1)[0]
    found: dict[str, Any] = {}
    for number, part in enumerate(PARTS.split(first)):
        told = re.fullmatch(r"(?:and )?(?:set )?`?(\w+): (.+?)`?", part.strip())
        removed = re.fullmatch(r"(?:and )?remove `?(\w+)(?:: .+?)?`?(?:, so that .*)?", part.strip())
        if told and told[1] in RunConfig.model_fields:
            found[told[1]] = yaml.safe_load(re.sub(r" \(enough.*", "", told[2]))
        elif removed and removed[1] in RunConfig.model_fields:
            found[removed[1]] = GONE
        elif number == 0:
            return {}
    return found


def with_changes(case: Case, changes: dict[str, Any]) -> Case:
    config = {key: value for key, value in case.config.items() if changes.get(key) is not GONE}
    config |= {key: value for key, value in changes.items() if value is not GONE}
    held_out = [] if changes.get("eval_dataset") is GONE else case.held_out
    return replace(case, config=config, held_out=held_out)


# --- fixes of the data


def _answers(row: dict[str, Any]) -> list[str]:
    return [str(one.get("content") or "") for one in row.get("messages", []) if one.get("role") == "assistant"]


def _without_empty_answers(rows: Rows) -> Rows:
    return [row for row in rows if all(answer.strip() for answer in _answers(row))]


def _few_of_each_answer(rows: Rows) -> Rows:
    """Of the rows with one answer, some."""
    seen: dict[str, int] = {}
    kept = []
    for row in rows:
        key = json.dumps(_answers(row))
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= 1:
            kept.append(row)
    return kept


def _roles_exchanged(rows: Rows) -> Rows:
    other = {"user": "assistant", "assistant": "user"}
    return [
        {**row, "messages": [{**one, "role": other.get(one["role"], one["role"])} for one in row["messages"]]}
        if "messages" in row
        else row
        for row in rows
    ]


def _joined_turns(rows: Rows) -> Rows:
    """Neighbouring messages of one role in one."""
    found = []
    for row in rows:
        joined: list[dict[str, Any]] = []
        for one in row.get("messages", []):
            if joined and joined[-1]["role"] == one["role"]:
                joined[-1] = {**joined[-1], "content": f"{joined[-1]['content']}\n{one['content']}"}
            else:
                joined.append(dict(one))
        found.append({**row, "messages": joined} if joined else row)
    return found


def _decoded(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return value.encode("latin-1").decode("utf-8")
        except UnicodeError:
            return value
    if isinstance(value, dict):
        return {key: _decoded(one) for key, one in value.items()}
    return [_decoded(one) for one in value] if isinstance(value, list) else value


def _decoded_rows(rows: Rows) -> Rows:
    return [_decoded(row) for row in rows]


def _once_each(rows: Rows) -> Rows:
    return list({json.dumps(row, sort_keys=True): row for row in rows}.values())


def _as_messages(rows: Rows) -> Rows:
    return [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str)
        else row
        for row in rows
    ]


DATA: dict[str, tuple[tuple[str, Callable[[Rows], Rows]], ...]] = {
    "F12": ((r'give each row as \{"messages"', _as_messages),),
    "F34": ((r"remove (?:these|the) rows", _without_empty_answers),),
    "F35": ((r"keep only some|rebalance", _few_of_each_answer),),
    "F36": ((r"swap|exchanged|the role assistant", _roles_exchanged), (r"join neighbouring", _joined_turns)),
    "F37": ((r"as UTF-8", _decoded_rows),),
    "F39": ((r"remove (?:the |duplicate|its )|added twice", _once_each),),
}
"""Code -> (what the fix says, what is done with the rows of both files)."""


def repaired(case: Case, said: Said) -> Case | None:
    """The case with its rows as the fix of the data wants them; None: a person's work."""
    for words, repair in DATA.get(said.code, ()):
        if re.search(words, said.fix):
            train, held_out = (repair(copy.deepcopy(rows)) for rows in (case.train, case.held_out))
            return replace(case, train=train, held_out=held_out) if train != case.train else None
    if said.code in ("F43", "F44") and re.search(r"eval_dataset", said.fix) and case.held_out:
        return with_changes(case, {"eval_dataset": GONE, "validation_size": 0.05})
    return None


# --- apply, and ask again

Ask = Callable[[Case], list[Said]]


def outcomes(case: Case, ask: Ask) -> Iterable[Outcome]:
    """What becomes of each fix of the case."""
    before = ask(case)
    for said in before:
        changes = changes_in(said.fix)
        new = with_changes(case, changes) if changes else repaired(case, said)
        if new is None:
            yield Outcome(*said, "by hand")
            continue
        after = ask(new)
        faults = {one.code for one in after if one.is_fault} - {one.code for one in before if one.is_fault}
        stays = any(one.code == said.code and one.is_fault >= said.is_fault for one in after)
        brings = ", ".join(sorted(faults - {said.code}))
        yield Outcome(*said, "stays" if stays else f"brings {brings}" if brings else "works")


def outcomes_of_program(program: Any, folder: Path) -> list[Outcome]:
    """Of a program of `ours`: its config is diagnosed, each fix is applied, and it is diagnosed again."""
    from bench.diagnose import ours
    from bench.diagnose.bases import load
    from solotune import diagnose
    from solotune.errors import SolotuneError

    job = ours.clean(load(program.base), program.seed)
    for change in program.changes:
        change.change(job, random.Random(program.seed))
    written = yaml.safe_load(ours._written(job, folder).read_text())
    case = Case(written, job.train, job.held_out)
    count = 0

    def ask(case: Case) -> list[Said]:
        nonlocal count
        count += 1
        config = dict(case.config)
        for key, rows in (("dataset", case.train), ("eval_dataset", case.held_out)):
            if rows and key in config:
                config[key] = ours._rows(folder / f"{key}-{count}.jsonl", rows)
        path = folder / f"config-{count}.yaml"
        path.write_text(yaml.safe_dump(config))
        try:
            found = diagnose(path, budget=0)
        except SolotuneError as error:
            return [Said(error.fault or "refused", True, error.change or "")]
        named = [Said(one.fault, True, one.fix) for one in (found.culprits if found.is_fault else ())]
        return named + [Said(one.fault, False, one.fix) for one in found.remarks]

    return list(outcomes(case, ask))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.diagnose.fixes", description="Applies every fix.")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="only these programs")
    asked = parser.parse_args()
    from bench.diagnose.programs import matching

    seen: set[tuple[str, str]] = set()
    wrong = []
    for program in matching(asked.only):
        change = program.changes[0].name if program.changes else ""
        if program.kind != "own" or (change, program.base) in seen:
            continue
        seen.add((change, program.base))
        with tempfile.TemporaryDirectory() as folder:
            for one in outcomes_of_program(program, Path(folder)):
                line = (
                    f"{program.name:48} {one.code} {'fault ' if one.is_fault else 'remark'} {one.result:10} {one.fix}"
                )
                print(line, flush=True)
                wrong += [line] if one.is_wrong else []
    print(f"\n{len(wrong)} fixes that do not work", *wrong, sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
