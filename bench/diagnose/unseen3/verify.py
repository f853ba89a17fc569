"""python -m bench.diagnose.unseen3.verify [--trained] [--healthy | --faults] [--jobs N] [--out FILE] [WORD ...]

Without the diagnosis.
A line of JSON per program. Of a fault: `shown` is what in rows, batches, texts, files or a step violates what holds
for the same program without its change (`is_shown` must be true). With --trained every program trains, and the line has
curve, held-out loss of base and tuned model under right labels, and the share of answers that end by themselves.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
import traceback
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.diagnose import loop
from bench.diagnose.forks import forked
from bench.diagnose.loop import build, render
from bench.diagnose.unseen.make import recipe_of, write
from bench.diagnose.unseen2 import verify as second
from bench.diagnose.unseen2.verify import _curve, _loss, _stops, of_job, replace_recipe
from bench.diagnose.unseen3 import shown_rows, shown_steps
from bench.diagnose.unseen3.case import (
    Case,
    Shown,
    differs_alone,
    differs_packed,
    share_of,
)
from bench.diagnose.unseen3.parts import PARTS
from bench.diagnose.unseen3.styles import IGNORE


def by_training(_c: Case) -> Shown:
    return {"is_shown": None}


CHECKS: dict[str, Any] = {
    name.upper(): check
    for module in (shown_rows, shown_steps)
    for name, check in vars(module).items()
    if name[0] == "f" and name[1:].isdigit()
}
CHECKS |= {
    "F70": shown_steps.f01,
    "F71": shown_steps.f01,
    "F72": shown_steps.f01,
    "F73": shown_steps.f01,
    "F21": shown_rows.f18,
    "F28": shown_rows.f27,
    "F32": shown_steps.f31,
    "F58": lambda c: {**shown_steps.f57(c)},
    "F60": shown_steps.f57,
}


def shown(program: Any) -> Shown:
    check = CHECKS.get(program.codes[0], by_training)
    return check(Case(program))


def sound(program: Any) -> Shown:
    """What must hold in a healthy program before it trains."""
    c = Case(program)
    if not c.chats:
        return {}
    right = share_of(
        c.ids(c.shape.text(chat))[: len(p)] == p
        for chat in c.chats[:40]
        for p in [c.ids(c.shape.text(chat[:-1], begun=True))]
    )
    lengths = sorted(len(c.ids(text)) for text in c.texts())
    shared = len(shown_steps.keys_of(c.held, 10**6) & shown_steps.keys_of(c.chats, 10**6))
    most = c.config().get("max_length") or c.made.max_length
    over = share_of(n > most for n in lengths)
    found: Shown = {"prompt is a prefix": right, "longest": lengths[-1], "over": over, "shared": shared}
    is_sound = right == 1.0 and (over == 0 or c.config().get("overflow") == "drop") and not shared
    if c.rows and c.config()["assistant_only_loss"]:
        told = [c.tokenizer.decode([y for y in labels if y != IGNORE]) for _, labels in c.rows]
        wanted = []
        for chat in c.chats:
            pieces = [text for text, learned in c.shape.pieces(chat) if learned]
            wanted.append(c.tokenizer.decode([i for text in pieces for i in c.ids(text)]))
        found["labels are the answers"] = share_of(a == b for a, b in zip(told, wanted, strict=True))
        is_sound = is_sound and found["labels are the answers"] == 1.0
    if "packed_apart" in program.what:
        found["packed"] = round(max(differs_packed(c, b) for b in c.batches[:2]), 4)
        is_sound = is_sound and found["packed"] < 1e-3
    if "padded_left" in program.what:
        found["padded"] = round(max(differs_alone(c, b) for b in c.batches[:2]), 4)
        is_sound = is_sound and found["padded"] < 1e-3
    return found | {"is_sound": is_sound}


# --- after training


def trained(program: Any, folder: Path) -> Shown:
    from peft import PeftModel, set_peft_model_state_dict

    if program.kind == "before":
        return {}
    if program.kind == "own":
        return _of_job(program, folder)
    made = recipe_of(program, PARTS)
    clean = recipe_of(replace(program, change=lambda made, rng: None), PARTS)
    chats = made.held_out or PARTS.split(program.task, None, 192, 24, program.seed)[1]
    ends = PARTS.end_ids(made.base)
    base = made.base.model()
    measured = clean if program.codes else made  # under right labels and the right template
    measured.deployed = made.deployed
    if program.kind == "loop":
        outcome = made.script(made).run() if made.script else loop.train(made)
        told: Shown = {"curve": _curve([one["loss"] for one in outcome.log]),
                       "eval": [(s, round(x, 3)) for s, x in outcome.evaluations[-6:]],
                       "errors": [error[-700:] for error in outcome.errors]}  # fmt: skip
        if not outcome.adapter:
            return told
        tuned = build(made)
        set_peft_model_state_dict(tuned, outcome.adapter)
    else:
        write(made, folder, PARTS.templates)
        output = folder / "output"
        log = json.loads((output / "trainer_state.json").read_text())["log_history"]
        told = {"curve": _curve([one["loss"] for one in log if "loss" in one]), "layout": made.layout,
                "eval": [round(one["eval_loss"], 3) for one in log if "eval_loss" in one]}  # fmt: skip
        tuned = PeftModel.from_pretrained(made.base.model(), str(output))
    return told | measured_of(measured, tuned, base, chats[:16], ends)


def measured_of(made: Any, tuned: Any, base: Any, chats: list[Any], ends: list[int]) -> Shown:
    """As the second set's, with answers of up to 130 tokens."""
    rows = render(replace_recipe(made), chats, "all" if getattr(made, "mask", "") == "all" else "answers")
    prompts = [made.format.text(chat[:-1], begun=True) for chat in chats[:4]]
    stops, first = _stops(tuned, made.tokenizer, prompts, ends, 130)
    return {"base": _loss(base, rows), "tuned": _loss(tuned, rows), "stops": stops, "first": first}


def _of_job(program: Any, folder: Path) -> Shown:
    second.PARTS, second._measured = PARTS, measured_of  # of this process only
    return of_job(program, folder)


def doubts(program: Any, line: Shown) -> Shown:
    """What a healthy program should not show."""
    if program.codes or "tuned" not in line:
        return {}
    base, tuned, stops = line["base"], line["tuned"], line["stops"]
    found = [
        *(["learns little"] if not tuned < 0.7 * base else []),
        *(["loss stays high"] if not tuned < 1.0 else []),
        *(["does not stop"] if stops is not None and stops < 0.75 else []),
        *(["held-out loss rises"] if _rises(line) else []),
    ]
    return {"DOUBT": found} if found else {}


def _rises(line: Shown) -> bool:
    losses = [one[1] if isinstance(one, (list, tuple)) else one for one in line.get("eval", [])]
    return len(losses) > 1 and losses[-1] > 1.15 * min(losses)


def line_of(program: Any, is_trained: bool) -> Shown:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    started = time.process_time()
    line: Shown = {"program": program.name}
    try:
        if is_trained:
            with tempfile.TemporaryDirectory() as scratch:
                line |= trained(program, Path(scratch))
        else:
            line |= shown(program) if program.codes else sound(program)
    except Exception:
        line["ERROR"] = traceback.format_exc()[-900:]
    line |= doubts(program, line)
    return {**line, "cpu": round(time.process_time() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.diagnose.unseen3.verify")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--healthy", action="store_true")
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", default="verified.jsonl", help="beside it, Trainer prints its log")
    asked = parser.parse_args()
    programs = [
        p
        for p in PARTS.programs()
        if (not asked.words or any(all(x in p.name for x in word.split("/")) for word in asked.words))
        and not (asked.healthy and p.codes)
        and not (asked.faults and not p.codes)
    ]
    random.Random(1).shuffle(programs)
    for name in sorted({program.base for program in programs}):
        PARTS.load(name)
    one = partial(line_of, is_trained=asked.trained)
    with Path(asked.out).open("w") as file:
        for line in forked(programs, asked.jobs, math.inf, one, _failed, 600):
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
            file.flush()


def _failed(program: Any, error: str, _seconds: float) -> Shown:
    return {"program": program.name, "ERROR": error}


if __name__ == "__main__":
    main()
