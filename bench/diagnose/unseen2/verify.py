"""python -m bench.diagnose.unseen2.verify [--static | --trained] [WORD ...]: each program, without the diagnosis.

A line of JSON per program: what its change does to rows, labels and settings (bench.diagnose.unseen.verify), and, after
its training, the held-out loss of base and tuned model under right labels, and the share of answers that stop.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.diagnose import loop, ours
from bench.diagnose.loop import render
from bench.diagnose.recipe import Row
from bench.diagnose.unseen.make import Made, job_of, recipe_of, write
from bench.diagnose.unseen.verify import effect_on_job, effect_on_recipe
from bench.diagnose.unseen2.parts import PARTS


@torch.no_grad()
def _loss(model: Any, rows: list[Row]) -> float:
    """Per label, a row at a time."""
    model.eval()
    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor([[i if y else -100 for i, y in zip(row.ids, row.learned, strict=True)]])
        number = int((labels[:, 1:] != -100).sum())
        if number:
            total += float(model(input_ids=torch.tensor([row.ids]), labels=labels, use_cache=False).loss) * number
            count += number
    return round(total / count, 3) if count else float("nan")


@torch.no_grad()
def _stops(model: Any, tokenizer: Any, prompts: list[str], ends: list[int], most: int) -> tuple[float, str]:
    """Share of answers that end by themselves; the first answer."""
    model.eval()
    ended, first = 0, ""
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False,
            eos_token_id=ends, pad_token_id=ends[0], use_cache=True,
        )[0, ids.shape[1] :]  # fmt: skip
        ended += int(out[-1]) in ends
        first = first or tokenizer.decode(out)
    return round(ended / max(len(prompts), 1), 2), first[:160]


def _measured(made: Any, tuned: Any, base: Any, chats: list[Any], ends: list[int]) -> dict[str, Any]:
    shape, tokenizer = made.format, made.tokenizer
    plain = replace_recipe(made)
    rows = render(plain, chats, "all" if getattr(made, "mask", "") == "all" else "answers")
    prompts = [shape.text(chat[:-1], begun=True) for chat in chats[:4] if chat[-1]["role"] == "assistant"]
    stops, first = _stops(tuned, tokenizer, prompts, ends, 70) if len(chats[0]) > 1 else (None, "")
    return {"base": _loss(base, rows), "tuned": _loss(tuned, rows), "stops": stops, "first": first}


def replace_recipe(made: Any) -> Any:
    """What render needs, with nothing edited."""
    plain = Made.__new__(Made)
    plain.__dict__.update(format=made.format, tokenizer=made.tokenizer, edit_row=[], max_length=10**6, cut="start",
                          drops_empty=False)  # fmt: skip
    return plain


def of_recipe(program: Any, folder: Path) -> dict[str, Any]:
    from peft import PeftModel

    made = recipe_of(program, PARTS)
    chats = made.held_out or PARTS.split(program.task, None, 192, 24, program.seed)[1]
    ends = made.generation_config["eos_token_id"]
    ends = ends if isinstance(ends, list) else [ends]
    base = made.base.model()
    for prepare in made.prepare:
        prepare(base)
    assert made.collated is None, "no program of this set changes its batches"
    if program.kind == "loop":
        outcome = loop.train(made)
        told: dict[str, Any] = {"curve": _curve([one["loss"] for one in outcome.log]), "eval": outcome.evaluations[-6:],
                                "errors": [error[-160:] for error in outcome.errors]}  # fmt: skip
        if outcome.adapter is None:
            return told
        from peft import set_peft_model_state_dict

        tuned = loop.build(made)
        set_peft_model_state_dict(tuned, outcome.adapter)
        return told | _measured(made, tuned, base, chats, ends)
    write(made, folder, PARTS.templates)
    output = folder / "output"
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    told = {"curve": _curve([one["loss"] for one in log if "loss" in one]), "layout": made.layout,
            "eval": [round(one["eval_loss"], 3) for one in log if "eval_loss" in one]}  # fmt: skip
    tuned = PeftModel.from_pretrained(made.base.model(), str(output))
    return told | _measured(made, tuned, base, chats, ends)


def of_job(program: Any, folder: Path) -> dict[str, Any]:
    from peft import PeftModel

    job = job_of(program, PARTS)
    if job.is_before:
        return {}
    target = ours.carried_out(job, folder)
    if target.is_file():
        return {"refused": True, "why": _why(target)}
    log = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]
    told: dict[str, Any] = {"curve": _curve([one["loss"] for one in log if "loss" in one]),
                            "files": sorted(p.name for p in target.iterdir())}  # fmt: skip
    adapters = list(target.rglob("adapter_config.json"))
    if not adapters:
        return told
    from transformers import AutoModelForCausalLM

    model = folder / "model"
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
                                      str(adapters[0].parent))  # fmt: skip
    if "messages" not in (job.held_out or [{}])[0]:
        chats = PARTS.split(program.task, None, 192, 24, program.seed)[1]
    else:
        chats = [row["messages"] for row in job.held_out]
    ends = json.loads((model / "generation_config.json").read_text())["eos_token_id"]
    return told | _measured(job, tuned, base, chats, ends if isinstance(ends, list) else [ends])


def _why(config: Path) -> str:
    import solotune

    try:
        solotune.train(config)
    except Exception as error:
        return str(error)[:300]
    return "it trains now"


def _curve(losses: list[float]) -> list[float]:
    """Nine points of it."""
    if not losses:
        return []
    return [round(losses[i * (len(losses) - 1) // 8], 2) for i in range(9)]


def _doubts(program: Any, line: dict[str, Any]) -> dict[str, Any]:
    """What a healthy program should not show."""
    if program.codes or "tuned" not in line:
        return {}
    base, tuned, stops = line["base"], line["tuned"], line["stops"]
    found = [
        *(["learns little"] if not tuned < 0.75 * base else []),
        *(["loss stays high"] if not tuned < 1.2 else []),
        *(["does not stop"] if stops is not None and stops < 0.75 else []),
    ]
    return {"DOUBT": found} if found else {}


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    programs = [
        p for p in PARTS.programs() if not words or any(all(x in p.name for x in word.split("/")) for word in words)
    ]
    random.Random(1).shuffle(programs)
    for program in programs:
        started = time.process_time()
        is_ours = program.kind in ("own", "before")
        line: dict[str, Any] = {"program": program.name}
        try:
            if "--trained" not in sys.argv:
                line["effect"] = (effect_on_job if is_ours else effect_on_recipe)(program, PARTS)
            if "--static" not in sys.argv:
                with tempfile.TemporaryDirectory() as scratch:
                    line |= (of_job if is_ours else of_recipe)(replace(program), Path(scratch))
        except Exception:
            line["ERROR"] = traceback.format_exc()[-700:]
        line |= _doubts(program, line)
        line["cpu"] = round(time.process_time() - started, 1)
        print(json.dumps(line, ensure_ascii=False, default=str), flush=True)


if __name__ == "__main__":
    main()
