"""The same for packs, data sets, settings, steps and files: F01, F02 and F31 to F76."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise
from typing import Any

import torch

from bench.diagnose.loop import build, render
from bench.diagnose.ours import Job
from bench.diagnose.unseen2.verify import _loss, replace_recipe
from bench.diagnose.unseen3.case import (
    Case,
    Shown,
    answer_of,
    differs_packed,
    logits_of,
    messages_of,
    place_of,
    share_of,
)
from bench.diagnose.unseen3.shown_rows import over_of
from bench.diagnose.unseen3.styles import IGNORE, Loader


def f31(c: Case) -> Shown:
    most = max(differs_packed(c, b) for b in c.batches[:2])
    return {"logits differ by": round(most, 2), "is_shown": most > 0.5}


def f33(c: Case) -> Shown:
    if c.batches:
        found = [place_of(b["input_ids"][0].tolist(), row) is not None for b in c.batches[:1] for row, _ in c.rows]
        ends = sum(int((b["input_ids"] == c.end).sum()) for b in c.batches)
        starts = sum(b["position_ids"][0].tolist().count(0) for b in c.batches)
        per_row = sum(row.count(c.end) for row, _ in c.rows) / len(c.rows)
        return {"rows": starts, "ends": ends, "expected": per_row * starts, "whole in pack 1": sum(found),
                "is_shown": ends < 0.8 * per_row * starts}  # fmt: skip
    cut, _ = over_of(c)
    return {"cut": cut, "is_shown": cut > 0.5 and c.config()["packing"]}


def f34(c: Case) -> Shown:
    share = share_of(not answer_of(chat).strip() for chat in c.chats)
    return {"blank": share, "is_shown": share > 0.35}


def f35(c: Case) -> Shown:
    top = Counter(map(answer_of, c.chats)).most_common(1)[0][1] / len(c.chats)
    return {"most frequent": round(top, 2), "is_shown": top > 0.9}


def f36(c: Case) -> Shown:
    odd = share_of(
        chat[0]["role"] == "assistant" or any(a["role"] == b["role"] for a, b in pairwise(chat)) for chat in c.chats
    )
    return {"out of turn": odd, "is_shown": odd > 0.7}


def f37(c: Case) -> Shown:
    def reversible(text: str) -> bool:
        try:
            return len(text.encode("cp1252").decode()) < len(text)
        except UnicodeError:
            return False

    share = share_of(reversible(answer_of(chat)) for chat in c.chats)
    return {"reversible": share, "is_shown": share > 0.8}


def f38(c: Case) -> Shown:
    right = {chat[-2]["content"]: answer_of(chat) for chat in messages_of(c.clean)[0]}
    wrong = share_of(right[chat[-2]["content"]] != answer_of(chat) for chat in c.chats)
    return {"answers of another": wrong, "is_shown": wrong > 0.9}


def f39(c: Case) -> Shown:
    unique = len({json.dumps(chat) for chat in c.chats})
    return {"rows": len(c.chats), "unique": unique, "is_shown": unique * 8 < len(c.chats)}


def f40(c: Case) -> Shown:
    labels = [answer_of(chat) for chat in c.chats]
    pure = share_of(len({tuple(y for y in row if y != IGNORE) for row in b["labels"].tolist()}) == 1 for b in c.batches)
    return {"batches of one label": pure, "is_shown": labels == sorted(labels) and pure > 0.7}


def f41(c: Case) -> Shown:
    rows = [tuple(row) for b in c.batches for row in b["input_ids"].tolist()]
    return {"rows": len(rows), "unique": len(set(rows)), "is_shown": len(set(rows)) * 3 < len(rows)}


def f42(c: Case) -> Shown:
    found = sorted(len(c.ids(text)) for text in c.texts())
    most = min(found[-1], c.config()["max_length"])
    return {"median": found[len(found) // 2], "most": most, "is_shown": most > 5 * found[-5]}


def keys_of(chats: list[Any], cut: int) -> set[str]:
    return {" ".join(m["content"] for m in chat if m["role"] != "system")[:cut] for chat in chats}


def f43(c: Case) -> Shown:
    shared = keys_of(c.held, 10**6) & keys_of(c.chats, 10**6)
    return {"shared": len(shared), "held out": len(c.held), "is_shown": len(shared) == len(c.held)}


def f44(c: Case) -> Shown:
    answers = {answer_of(chat) + chat[-2]["content"][:12] for chat in c.chats}
    shared = share_of(answer_of(chat) + chat[-2]["content"][:12] in answers for chat in c.held)
    return {"near copies": shared, "is_shown": 0.4 < shared < 0.9}


def f45(c: Case) -> Shown:
    model = build(c.made)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    twice = [round(c.script.evaluate(model, c.held_rows), 4) for _ in range(2)]
    return {"twice": twice, "is_shown": abs(twice[0] - twice[1]) > 1e-3}


def f46(c: Case) -> Shown:
    epochs = (
        c.made.config["max_steps"] * 8 / len(c.chats) if isinstance(c.made, Job) else c.made.steps * 8 / len(c.chats)
    )
    return {"epochs": epochs, "is_shown": epochs > 40}


def f47(c: Case) -> Shown:
    share = [
        sum(y != IGNORE for _, r in rows for y in r) / sum(len(r) for _, r in rows) for rows in (c.rows, c.held_rows)
    ]
    return {"shares": [round(s, 2) for s in share], "is_shown": share[1] > 0.98 and share[0] < 0.8}


def f48(c: Case) -> Shown:
    return {"held out": len(c.held), "is_shown": len(c.held) == 2}


def f53(c: Case) -> Shown:
    model = c.base.model()
    for prepare in c.made.prepare:
        prepare(model)
    losses = []
    with torch.no_grad():
        losses = [float(Loader.loss(c.script, model, c.batches[0])), float(c.script.loss(model, c.batches[0]))]
    return {"float32, float16": losses, "is_shown": math.isfinite(losses[0]) and not math.isfinite(losses[1])}


def _few_steps(c: Case, steps: int = 6) -> Any:
    c.made.steps, c.made.evaluates = steps, 0
    return c.script.run()


def f55(c: Case) -> Shown:
    outcome = _few_steps(c, 12)
    logged = [one["loss"] for one in outcome.log]
    norms = [one["grad_norm"] for one in outcome.log]
    bad = share_of(not math.isfinite(norm) for norm in norms)
    return {"norms not finite": bad, "is_shown": bad > 0.1 and all(map(math.isfinite, logged))}


def f56(c: Case) -> Shown:
    names = {name.rpartition(".")[2] for name, _ in c.base.model().named_modules()}
    asked = c.made.config["lora_target_modules"] if isinstance(c.made, Job) else c.made.adapters["target_modules"]
    missed = [name for name in asked if name not in names]
    return {"missed": missed, "is_shown": bool(missed) and len(missed) < len(asked)}


def _gradients(c: Case) -> tuple[float, float]:
    """Share of lora_A, lora_B without any gradient after a step, which gives B values."""
    model = build(c.made)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = c.script.optimizer(parameters)
    for step in range(2):
        c.script.backward(model, [c.batches[step]])
        if step == 0:
            optimizer.step()
            optimizer.zero_grad()
    shares = []
    for half in ("lora_A", "lora_B"):
        dead = [p.grad is None or not p.grad.any() for n, p in model.named_parameters() if half in n]
        shares.append(share_of(dead))
    return shares[0], shares[1]


def f57(c: Case) -> Shown:
    dead = _gradients(c)
    return {"without gradient": dead, "is_shown": dead == (1.0, 1.0)}


def f59(c: Case) -> Shown:
    model = build(c.made)
    batch = {"input_ids": torch.tensor([c.rows[0][0]])}
    on = logits_of(model, batch)
    with model.disable_adapter():
        off = logits_of(model, batch)
    return {"on, off": round(float((on - off).abs().max()), 2), "is_shown": float((on - off).abs().max()) > 0.1}


def f61(c: Case) -> Shown:
    s = c.config()
    scale = s["lora_alpha"] / s["lora_r"]
    return {"scale": scale, "is_shown": scale > 100 or scale < 0.02}


def f62(c: Case) -> Shown:
    s = c.config()
    return {"r": s["lora_r"], "is_shown": s["lora_r"] == 1 and len(s["lora_target_modules"]) == 1}


def f63(c: Case) -> Shown:
    model = build(c.made)
    c.script.backward(model, c.batches[:1])
    dead = [p.grad is None for n, p in model.named_parameters() if "lm_head" in n and "lora_" in n]
    return {"head's adapters": len(dead), "is_shown": bool(dead) and all(dead)}


def f64(c: Case) -> Shown:
    rate = c.config().get("learning_rate", getattr(c.made, "learning_rate", None))
    return {"rate": rate, "is_shown": rate < 1e-4}


def f65(c: Case) -> Shown:
    s = c.config()
    return {"is_shown": s["warmup_steps"] > s["max_steps"]}


def f66(c: Case) -> Shown:
    if c.made.optimizers is not None:
        _, schedule = c.made.optimizers(build(c.made), c.made.steps)
        at = schedule.lr_lambdas[0](c.made.steps // 2)
    else:
        at = c.script.rate(c.made.steps // 2)
    return {"rate at half": at, "is_shown": at == 0}


def f67(c: Case) -> Shown:
    return {"is_shown": c.config()["learning_rate"] > 0.3}


def f68(c: Case) -> Shown:
    s = c.config()
    return {
        "clip": s["max_grad_norm"],
        "is_shown": s["max_grad_norm"] < (1e-8 if "sgd" not in c.program.what else 1e-3),
    }


def f69(c: Case) -> Shown:
    s = c.config()
    total = s["learning_rate"] * s["weight_decay"] * s["max_steps"] / (1 if s["lr_scheduler_type"] == "constant" else 2)
    return {"rate x decay x steps": total, "is_shown": total > 5}


def f74(c: Case) -> Shown:
    if c.made.touch_trainer:
        return {"is_shown": True, "by": "training"}
    model = build(c.made)
    batches = c.batches[: c.made.accumulation]
    logged = c.script.backward(model, batches)
    right = sum(float(c.script.loss(model, b)) for b in batches) / len(batches)
    return {"logged": round(logged, 2), "mean": round(right, 2), "is_shown": logged > 6 * right}


def f76(c: Case) -> Shown:
    c.made.steps, c.made.evaluates = 50, 0
    outcome = c.script.run()
    from peft import set_peft_model_state_dict

    model = build(c.made)
    assert outcome.adapter is not None and outcome.merged is not None
    set_peft_model_state_dict(model, outcome.adapter)
    rows = render(replace_recipe(c.made), c.made.held_out, "answers")[:12]
    losses = [_loss(model, rows), _loss(outcome.merged, rows)]
    return {"adapter, merged": losses, "is_shown": losses[1] > losses[0] + 0.2}


def f01(c: Case) -> Shown:
    errors = "".join(_few_steps(c, 3).errors)
    words = {
        "F01": "bitsandbytes",
        "F70": "adamw.py",
        "F71": "forward",
        "F72": "compute_loss",
        "F73": "recompile_limit",
    }
    return {"error": errors[-160:], "is_shown": words[c.program.codes[0]] in errors}


def f02(c: Case) -> Shown:
    most = max(len(ids) for ids, _ in c.rows)
    told = c.made.settings["max_seq_length"]
    return {"longest": most, "asked": told, "is_shown": most > 1.2 * told}


def f49(c: Case) -> Shown:
    return {"is_shown": "quantization_config" in c.made.model_config and
            (c.config().get("load_in_4bit") or c.config().get("base_precision") == "nf4")}  # fmt: skip


def f50(c: Case) -> Shown:
    s = c.made.settings
    return {"is_shown": s["load_in_4bit"] and s.get("bnb_4bit_compute_dtype", "float32") == "float32"}


def f51(c: Case) -> Shown:
    kinds = {type(module).__name__ for module in build(c.made).modules()}
    return {"is_shown": c.made.settings["load_in_4bit"] and not any("4bit" in kind for kind in kinds)}


def f52(c: Case) -> Shown:
    model = build(c.made)
    levels = max(len(row.unique()) for row in model.get_output_embeddings().weight[:50])
    losses = [_loss(m, c.right_labels()[:12]) for m in (c.base.model(), model)]
    return {"levels": levels, "loss": losses, "is_shown": levels <= 16 and losses[1] > losses[0]}


def f54(c: Case) -> Shown:
    model = build(c.made)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = c.script.optimizer(parameters)
    for batch in c.batches[:3]:
        before = [p.detach().clone() for p in parameters]
        c.script.backward(model, [batch])
        optimizer.step()
        optimizer.zero_grad()
    moved = [(p != b).float().mean() for p, b, (n, _) in zip(parameters, before, _trainable(model), strict=True)
             if "lora_A" in n]  # fmt: skip
    share = float(torch.stack(moved).mean())
    return {"of A moves": round(share, 2), "is_shown": share < 0.7}


def _trainable(model: Any) -> list[Any]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]
