"""What this set's changes violate, where the third set's checks (by code) do not fit: a function per change."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.diagnose.loop import build
from bench.diagnose.ours import Job
from bench.diagnose.unseen3 import verify as third
from bench.diagnose.unseen3.case import Case, Shown, answer_of, base_loss, logits_of, place_of, share_of
from bench.diagnose.unseen3.styles import IGNORE


def shown(program: Any) -> Shown:
    case = Case(program)
    check = globals().get(program.what) or third.CHECKS.get(program.codes[0], third.by_training)
    return check(case)


def sound(program: Any) -> Shown:
    """A chat that ends with its user has no last answer, whose prompt could be a prefix."""
    found = _sound(program)
    if program.what == "some_chats_end_with_the_user":
        found["is_sound"] = 0.75 < found["prompt is a prefix"] < 0.85 and not found["shared"] and not found["over"]
    return found


_sound = third.sound


def tokenizer_of_another_release(c: Case) -> Shown:
    same = c.base.tokenizer()
    text = " ".join(m["content"] for chat in c.chats[:20] for m in chat)
    ids, right = c.ids(text), same(text, add_special_tokens=False)["input_ids"]
    rows = [(row[:200], row[:200]) for row in (ids, right)]
    losses = [base_loss(c, [row]) for row in rows]
    return {"loss": losses, "sizes": [len(c.tokenizer), len(same)], "is_shown": losses[0] > 1.5 * losses[1]}


def pad_token_added_without_resize(c: Case) -> Shown:
    most = max(int(b["input_ids"].max()) for b in c.batches)
    rows = c.base.model().get_input_embeddings().weight.shape[0]
    return {"id": most, "rows": rows, "is_shown": most >= rows}


def template_of_llama2_shipped(c: Case) -> Shown:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "chat_template.jinja"
        file.write_text(c.tokenizer.chat_template)
        c.made.left[0](Path(folder))
        return {"is_shown": file.read_text() != c.base.tokenizer().chat_template}


def template_ignores_the_generation_prompt(c: Case) -> Shown:
    asked = [{"role": "user", "content": "Q?"}]
    both = [c.tokenizer.apply_chat_template(asked, add_generation_prompt=add, tokenize=False) for add in (False, True)]
    return {"is_shown": both[0] == both[1] and not c.made.deployed("Q?").endswith(c.shape.head("assistant"))}


def asked_without_add_generation_prompt(c: Case) -> Shown:
    return {"asked": c.made.deployed("Q?"), "is_shown": not c.made.deployed("Q?").endswith(c.shape.head("assistant"))}


def header_is_learned(c: Case) -> Shown:
    header = c.ids(c.base.kind.format.head("assistant"))
    learned = share_of(place_of([y for y in labels if y != IGNORE], header) is not None for _, labels in c.rows)
    return {"header learned": learned, "is_shown": learned > 0.9}


def loss_without_any_shift(c: Case) -> Shown:
    model, batch = c.base.model(), c.batches[0]
    logits = logits_of(model, batch)
    wanted = batch["labels"]
    at_place = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORE))
    losses = [float(c.script.loss(model, batch)), at_place, float(model(**batch, use_cache=False).loss)]
    return {"this, unshifted, right": losses,
            "is_shown": abs(losses[0] - losses[1]) < 1e-3 and losses[0] > 1.5 * losses[2]}  # fmt: skip


def utf8_read_as_latin1(c: Case) -> Shown:
    def reversible(text: str) -> bool:
        try:
            return len(text.encode("latin1").decode()) < len(text)
        except UnicodeError:
            return False

    share = share_of(reversible(answer_of(chat)) for chat in c.chats)
    return {"reversible": share, "is_shown": share > 0.9}


def escaped_twice(c: Case) -> Shown:
    share = share_of("\\n" in answer_of(chat) and "\n" not in answer_of(chat) for chat in c.chats)
    return {"escaped": share, "is_shown": share > 0.9}


def three_rows_held_out(c: Case) -> Shown:
    return {"held out": len(c.held), "is_shown": len(c.held) == 3}


def rate_not_given(c: Case) -> Shown:
    return {"is_shown": c.made.learning_rate < 1e-4 and "learning_rate" not in c.made.settings}


def config_object_not_passed_on(c: Case) -> Shown:
    rates = c.made.asked["learning_rate"], c.script.rate(0)
    return {"asked, used": rates, "is_shown": rates[0] > 50 * rates[1]}


def mean_of_the_micro_batches_means(c: Case) -> Shown:
    """The gradient of this step is another than that of all its tokens."""
    batches = c.batches[: c.made.accumulation]
    grads = []
    for backward in (c.script.backward, super(type(c.script), c.script).backward):
        model = build(c.made)
        backward(model, batches)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    cosine = float(torch.nn.functional.cosine_similarity(grads[0], grads[1], dim=0))
    counts = [int((b["labels"] != IGNORE).sum()) for b in batches]
    return {"cosine": cosine, "labels": counts, "is_shown": cosine < 0.95 and max(counts) > 3 * min(counts)}


def _file(c: Case) -> dict[str, torch.Tensor]:
    """What the adapter's file has after this change, of a model whose B is not zero."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    model = get_peft_model(c.base.model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    state = {n: t.detach().clone() for n, t in get_peft_model_state_dict(model).items()}
    if not isinstance(c.made, Job):
        return c.made.saves(state) if c.made.saves else state
    with tempfile.TemporaryDirectory() as folder:
        save_file(state, Path(folder) / "adapter_model.safetensors")
        for change in c.made.after:
            change(Path(folder), Path(folder))
        return load_file(Path(folder) / "adapter_model.safetensors")


def saved_above_train(c: Case) -> Shown:
    return {"is_shown": c.made.saves_at_start}


def state_dict_taken_twice(c: Case) -> Shown:
    return {"is_shown": _file(c) == {}}


def fresh_adapter_copied_over(c: Case) -> Shown:
    b = [float(t.abs().max()) for n, t in _file(c).items() if "lora_B" in n]
    return {"tensors": len(b), "is_shown": bool(b) and max(b) == 0}


def keys_of_another_version(c: Case) -> Shown:
    """None of the names is one that loading looks for."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    model = get_peft_model(c.base.model(), LoraConfig(target_modules=["q_proj"]))
    state = _file(c)
    loaded = set_peft_model_state_dict(model, state)
    b = max(float(p.abs().max()) for n, p in model.named_parameters() if "lora_B" in n)
    return {"unexpected": len(loaded.unexpected_keys), "of": len(state), "B after loading": b, "is_shown": b == 0}


prefix_stripped = keys_of_another_version


def checkpoint_without_optimizer(c: Case) -> Shown:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("optimizer.pt", "scheduler.pt", "adapter_model.safetensors"):
            (Path(folder) / name).touch()
        c.made.resumed(Path(folder))
        left = sorted(file.name for file in Path(folder).iterdir())
    return {"left": left, "is_shown": left == ["adapter_model.safetensors"]}


def only_weights_loaded_again(c: Case) -> Shown:
    seam = c.made.seam[0]
    rates = [c.script.rate(step) for step in (seam - 1, seam, seam + 6)]
    return {"rates at the seam": rates, "is_shown": rates[2] > 1.5 * rates[0] > 3 * rates[1] / 2}
