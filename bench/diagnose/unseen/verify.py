"""python -m bench.diagnose.unseen.verify [WORD ...]: that each change takes effect, without the diagnosis.

Nothing trains: what of rows, labels, batches, texts, settings and files differs from the program without its change.
"""

from __future__ import annotations

import random
import sys
import traceback
from dataclasses import replace
from itertools import islice
from typing import Any, cast

import torch

from bench.diagnose import loop
from bench.diagnose.loop import micro_batches, render
from bench.diagnose.unseen.make import job_of, recipe_of
from bench.diagnose.unseen.registry import Parts


def _nothing(_made: Any, _rng: random.Random) -> None: ...


def effect_on_recipe(program: Any, parts: Parts) -> dict[str, Any]:
    clean, made = recipe_of(replace(program, change=_nothing), parts), recipe_of(program, parts)
    clean.seed = made.seed
    found: dict[str, Any] = {}
    sides = []
    for recipe in (clean, made):
        rows = render(recipe, recipe.chats, recipe.mask)
        held = render(recipe, recipe.held_out, recipe.held_out_mask or recipe.mask)
        plain = loop.collate
        if recipe.collated is not None:
            loop.collate = lambda r, x, c=recipe.collated, plain=plain: c(plain(r, x))
        batches = list(islice(micro_batches(recipe, rows), 3)) if rows else []
        loop.collate = plain
        sides.append((rows, held, batches))
    (rows0, held0, b0), (rows1, held1, b1) = sides
    if len(rows0) != len(rows1):
        found["rows"] = f"{len(rows0)}->{len(rows1)}"
    both = list(zip(rows0, rows1, strict=False))
    found["ids"] = round(sum(a.ids != b.ids for a, b in both) / max(len(both), 1), 2)
    found["learned"] = (
        round(sum(sum(r.learned) for r in rows0) / sum(len(r.ids) for r in rows0), 2),
        round(sum(sum(r.learned) for r in rows1) / max(sum(len(r.ids) for r in rows1), 1), 2),
    )
    found["no label"] = round(sum(not any(r.learned[1:]) for r in rows1) / max(len(rows1), 1), 2)
    ends = {cast(int, made.tokenizer.convert_tokens_to_ids(made.format.end))} if made.format.end else set()
    ended = sum(any(is_learned and i in ends for i, is_learned in zip(r.ids, r.learned, strict=False)) for r in rows1)
    found["ends learned"] = round(ended / max(len(rows1), 1), 2)
    found["longest"] = (max(len(r.ids) for r in rows0), max((len(r.ids) for r in rows1), default=0), made.max_length)
    found["max id"] = max(max(r.ids) for r in rows1) if rows1 else None
    unknown = sum(i == made.tokenizer.unk_token_id for r in rows1 for i in r.ids)
    found["unk"] = round(unknown / max(sum(len(r.ids) for r in rows1), 1), 3)
    differ = sum(a.ids != b.ids or a.learned != b.learned for a, b in zip(held0, held1, strict=False))
    found["held"] = (len(held0), len(held1), round(differ / max(len(held1), 1), 2))
    if b1 and b0:
        found["batch"] = sorted(b1[0]), tuple(b1[0]["input_ids"].shape), int((b1[0]["labels"] != -100).sum())
        right = b1[0]["labels"]
        found["labels=ids"] = bool(((right == -100) | (right == b1[0]["input_ids"])).all())
    found["settings"] = {
        k: v for k, v in made.settings.items() if clean.settings.get(k) != v and k != "lora_target_modules"
    }
    for name in ("adapters", "generation_config", "model_config", "learning_rate", "warmup", "clip", "weight_decay",
                 "schedule_steps", "steps", "batch", "accumulation", "normalise", "shuffles", "copies", "seam",
                 "saves_at_start", "is_static", "has_live", "pad_left", "sends_mask", "packing", "cut"):  # fmt: skip
        if getattr(clean, name) != getattr(made, name):
            value = getattr(made, name)
            if isinstance(value, dict):
                value = {k: v for k, v in value.items() if getattr(clean, name).get(k) != v}
            found[name] = value
    for name in ("touch", "prepare", "touch_trainer", "left"):
        if getattr(made, name):
            found[name] = len(getattr(made, name))
    for name in ("loss_of", "saves", "merged", "crash", "optimizers", "resumed"):
        if getattr(made, name) is not None:
            found[name] = True
    if made.deployed("Q?") != clean.deployed("Q?"):
        found["deployed"] = made.deployed("Q?")
    found["same prefix"] = _prefix(made)
    return found


def _prefix(recipe: Any) -> float:
    right = []
    for chat in recipe.chats[:40]:
        whole = recipe.tokenizer(recipe.format.text(chat), add_special_tokens=False)["input_ids"]
        prompt = recipe.tokenizer(recipe.format.text(chat[:-1], begun=True), add_special_tokens=False)["input_ids"]
        right.append(whole[: len(prompt)] == prompt)
    return sum(right) / len(right)


def effect_on_job(program: Any, parts: Parts) -> dict[str, Any]:
    clean, made = job_of(replace(program, change=_nothing), parts), job_of(program, parts)
    keys = sorted({*made.config, *clean.config})
    held_changed = sum(a != b for a, b in zip(clean.held_out, made.held_out, strict=False))
    found: dict[str, Any] = {
        "config": {k: made.config.get(k) for k in keys if made.config.get(k) != clean.config.get(k)},
        "rows": (len(made.train), len(made.held_out)),
        "changed": round(sum(a != b for a, b in zip(clean.train, made.train, strict=False)) / len(made.train), 2),
        "held changed": round(held_changed / max(len(made.held_out), 1), 2),
    }
    if "messages" in made.train[0]:
        texts = [made.format.text(row["messages"]) for row in made.train]
        lengths = sorted(len(made.tokenizer(text)["input_ids"]) for text in texts)
        found["lengths"] = (lengths[0], lengths[len(lengths) // 2], lengths[-1], made.config.get("max_length"))
        found["over"] = round(sum(n > made.config["max_length"] for n in lengths) / len(lengths), 2)
        unk = made.tokenizer.unk_token_id
        ids = [i for text in texts[:50] for i in made.tokenizer(text)["input_ids"]]
        found["unk"] = ids.count(unk) if unk is not None else 0
    text = "The quick brown fox of Anna."
    if made.tokenizer(text)["input_ids"] != clean.tokenizer(text)["input_ids"]:
        found["tokenizer"] = "ids differ"
    if len(made.tokenizer) != len(clean.tokenizer):
        found["tokens"] = len(clean.tokenizer), len(made.tokenizer)
    for name in ("template", "model_config", "generation_config", "stops_after"):
        if getattr(made, name) != getattr(clean, name):
            found[name] = str(getattr(made, name))[:200]
    if made.tokenizer.chat_template != clean.tokenizer.chat_template:
        found["chat_template"] = str(made.tokenizer.chat_template)[:300]
    found["after"] = len(made.after)
    return found


def main(parts: Parts) -> None:
    torch.set_num_threads(1)
    for program in parts.programs():
        if sys.argv[1:] and not any(word in program.name for word in sys.argv[1:]):
            continue
        try:
            effect = (effect_on_job if program.kind in ("own", "before") else effect_on_recipe)(program, parts)
            print(program.name, effect, flush=True)
        except Exception:
            print(program.name, "ERROR", traceback.format_exc()[-500:], flush=True)


if __name__ == "__main__":
    from bench.diagnose.unseen.parts import PARTS

    main(PARTS)
