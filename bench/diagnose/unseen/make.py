"""From a program to what its owner has: a recipe or a job, changed; trained; handed over."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch

import solotune
from bench.diagnose import loop, ours
from bench.diagnose import recipe as recipes
from bench.diagnose.loop import build, collate, render, train
from bench.diagnose.recipe import Recipe
from bench.diagnose.run_facts import run_facts_of
from bench.diagnose.unseen.registry import Parts, Unseen
from bench.diagnose.worlds import Chat
from solotune.diagnosis.run_diagnosis import examine

ROWS, HELD_OUT, STEPS = 192, 24, 80


@dataclass
class Made(Recipe):
    """A recipe, and what a script around Trainer has beside."""

    layout: str = "plain"  # plain, llamafactory, axolotl
    row_of: Callable[[Chat], dict[str, Any]] = lambda chat: {"messages": chat}
    optimizers: Callable[[Any, int], tuple[Any, Any]] | None = None
    touch_trainer: list[Callable[[Any], None]] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    """TrainingArguments beside those of the recipe; None leaves one out."""
    told: dict[str, Any] = field(default_factory=dict)
    """Of the config file, beside or instead of what held; None leaves a key out."""
    resumed: Callable[[Path], None] | None = None
    left: list[Callable[[Path], None]] = field(default_factory=list)
    looks_at: str = "."
    collated: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None
    """Another collator: what it makes of a batch."""
    script: Any = None
    """Another loop by hand: a class that is made of the recipe, whose `facts` trains and says what its owner has."""


def recipe_of(program: Unseen, parts: Parts) -> Made:
    base = parts.load(program.base)
    plain = recipes.clean(base, program.seed, rows=8, held_out=4)
    made = Made(**{f.name: getattr(plain, f.name) for f in fields(Recipe)})
    made.chats, made.held_out = parts.split(program.task, base.world, ROWS, HELD_OUT, program.seed)
    made.steps = STEPS
    made.adapters["target_modules"] = parts.linears(base)
    made.generation_config["eos_token_id"] = parts.end_ids(base)
    longest = max(len(made.tokenizer(made.format.text(chat))["input_ids"]) for chat in made.chats)
    made.max_length = 256 if longest <= 250 else 384
    made.set(lora_target_modules=parts.linears(base), max_steps=STEPS, max_length=made.max_length)
    if program.kind in ("alone", "folder"):
        made.layout = ("plain", "llamafactory", "axolotl")[program.seed % 3]
        if not base.kind.is_instruct:  # the script gives the base model a template, as people do, and saves it
            made.tokenizer.chat_template = made.format.jinja()
    program.change(made, random.Random(program.seed))
    if "messages" not in made.row_of(made.chats[0]) or not base.kind.is_instruct:
        made.layout = "plain"
    return made


def job_of(program: Unseen, parts: Parts) -> ours.Job:
    base = parts.load(program.base)
    job = ours.clean(base, program.seed, rows=8, held_out=4)
    train_chats, held_out = parts.split(program.task, base.world, ROWS, HELD_OUT, program.seed)
    job.train = [{"messages": chat} for chat in train_chats]
    job.held_out = [{"messages": chat} for chat in held_out]
    longest = max(len(job.tokenizer(job.format.text(chat))["input_ids"]) for chat in train_chats)
    job.config.update(max_steps=STEPS, eval_steps=20, max_length=256 if longest <= 250 else 384)
    job.is_before = program.kind == "before"
    program.change(job, random.Random(program.seed))
    return job


def diagnosed(
    program: Unseen, folder: Path, budget: float, parts: Parts
) -> tuple[Callable[[], Any], Callable[[], None]]:
    """What trains, and what diagnoses afterwards; the second is called once the first has ended."""
    state: dict[str, Any] = {}

    def trained() -> None:
        if program.kind in ("own", "before"):
            state["target"] = ours.carried_out(job_of(program, parts), folder)
            return
        recipe = recipe_of(program, parts)
        if recipe.collated is not None:
            plain, change = loop.collate, recipe.collated
            loop.collate = lambda recipe, rows: change(plain(recipe, rows))  # of this process only
        if program.kind == "loop":
            by_hand = recipe.script
            state["facts"] = by_hand(recipe).facts() if by_hand else run_facts_of(recipe, train(recipe))
        else:
            state["recipe"] = recipe
            write(recipe, folder, parts.templates)

    def found() -> Any:
        if "target" in state:
            return solotune.diagnose(state["target"], budget=budget)
        if "facts" in state:
            return examine(state["facts"], budget=budget)
        target = folder / "output" / state["recipe"].looks_at
        if program.kind == "alone":
            return solotune.diagnose(target, budget=budget)
        return solotune.diagnose(
            target,
            budget=budget,
            dataset=str(folder / ROWS_FILE[state["recipe"].layout]),
            config=folder / CONFIG_FILE[state["recipe"].layout],
            base=str(folder / "base"),
        )

    return found, trained


# --- a folder as another tool leaves it

ROWS_FILE = {"plain": "train.jsonl", "llamafactory": "data/desk.json", "axolotl": "chats.jsonl"}
HELD_OUT_FILE = {"plain": "eval.jsonl", "llamafactory": "data/desk_eval.json", "axolotl": "chats_test.jsonl"}
CONFIG_FILE = {"plain": "sft.yaml", "llamafactory": "train_lora.yaml", "axolotl": "axolotl.yml"}


def write(recipe: Made, folder: Path, templates: dict[str, str]) -> None:
    """Base, rows and config, and beside them the output of Trainer."""
    model = folder / "base"
    shutil.copytree(recipe.base.folder, model, ignore=shutil.ignore_patterns("base.json"))
    for name, values in (("config.json", recipe.model_config), ("generation_config.json", recipe.generation_config)):
        known = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**known, **values}))
    for file, chats in ((ROWS_FILE, recipe.chats), (HELD_OUT_FILE, recipe.held_out)):
        if chats:
            _rows(folder / file[recipe.layout], [recipe.row_of(chat) for chat in chats])
    _train(recipe, folder / "output", model)
    _config(recipe, folder, model, templates)
    for change in recipe.left:
        change(folder / "output")


def _rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".json":
        file.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _config(recipe: Made, folder: Path, model: Path, templates: dict[str, str]) -> None:
    s = recipe.settings
    targets = recipe.adapters["target_modules"]
    if recipe.layout == "llamafactory":
        rows = [recipe.row_of(chat) for chat in recipe.chats[:1]]
        columns = {"messages": "messages"} if "messages" in rows[0] else {"messages": "conversations"}
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
        entry = {"formatting": "sharegpt", "columns": columns} | ({"tags": tags} if "messages" in rows[0] else {})
        if "instruction" in rows[0]:
            entry = {"formatting": "alpaca"}
        info = {"desk": {"file_name": "desk.json", **entry}, "desk_eval": {"file_name": "desk_eval.json", **entry}}
        (folder / "data" / "dataset_info.json").write_text(json.dumps(info, indent=2))
        told = {
            "model_name_or_path": str(model), "stage": "sft", "do_train": True, "finetuning_type": "lora",
            "lora_rank": recipe.adapters["r"], "lora_alpha": recipe.adapters["lora_alpha"],
            "lora_target": ",".join(targets), "dataset": "desk", "eval_dataset": "desk_eval", "dataset_dir": "data",
            "template": templates[recipe.base.kind.name], "cutoff_len": recipe.max_length,
            "output_dir": str(folder / "output"),
            "per_device_train_batch_size": recipe.batch, "gradient_accumulation_steps": recipe.accumulation,
            "learning_rate": recipe.learning_rate, "max_steps": recipe.steps, "lr_scheduler_type": recipe.decay,
            "warmup_steps": recipe.warmup, "logging_steps": 2, "seed": recipe.seed % 2**31,
            "weight_decay": recipe.weight_decay, "max_grad_norm": recipe.clip,
            "train_on_prompt": recipe.mask == "all",
        }  # fmt: skip
    elif recipe.layout == "axolotl":
        told = {
            "base_model": str(model), "adapter": "lora", "lora_r": recipe.adapters["r"],
            "lora_alpha": recipe.adapters["lora_alpha"], "lora_target_modules": targets,
            "datasets": [{"path": str(folder / "chats.jsonl"), "type": "chat_template"}],
            "test_datasets": [{"path": str(folder / "chats_test.jsonl"), "type": "chat_template"}],
            "sequence_len": recipe.max_length, "micro_batch_size": recipe.batch,
            "gradient_accumulation_steps": recipe.accumulation, "learning_rate": recipe.learning_rate,
            "max_steps": recipe.steps, "lr_scheduler": recipe.decay, "warmup_steps": recipe.warmup,
            "optimizer": s["optim"], "weight_decay": recipe.weight_decay, "train_on_inputs": recipe.mask == "all",
            "output_dir": str(folder / "output"), "max_grad_norm": recipe.clip, "seed": recipe.seed % 2**31,
        }  # fmt: skip
    else:
        told = {name: s[name] for name in FROM_SETTINGS if name in s}
        told |= {"model_name_or_path": str(model), "dataset_name": str(folder / "train.jsonl"),
                 "output_dir": str(folder / "output"), "use_peft": True}  # fmt: skip
        if recipe.held_out:
            told["eval_dataset"] = str(folder / "eval.jsonl")
    told |= recipe.told
    lines = [f"{name}: {json.dumps(value)}\n" for name, value in told.items() if value is not None]
    (folder / CONFIG_FILE[recipe.layout]).write_text("".join(lines))


FROM_SETTINGS = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "max_steps",
                 "per_device_train_batch_size", "gradient_accumulation_steps", "lora_r", "lora_alpha", "lora_dropout",
                 "lora_target_modules", "max_length", "assistant_only_loss", "packing", "optim", "seed",
                 "modules_to_save", "use_rslora", "init_lora_weights")  # fmt: skip


def _train(recipe: Made, output: Path, model: Path) -> None:
    import transformers

    learned = render(recipe, recipe.chats, recipe.mask)
    held_out = render(recipe, recipe.held_out, recipe.held_out_mask or recipe.mask)
    given: dict[str, Any] = {
        "output_dir": str(output), "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "remove_unused_columns": False, "logging_steps": 2, "save_steps": max(recipe.steps // 2, 1),
        "eval_strategy": "steps" if held_out else "no", "eval_steps": max(recipe.steps // 5, 1),
        "max_steps": recipe.steps, "per_device_train_batch_size": recipe.batch,
        "gradient_accumulation_steps": recipe.accumulation, "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.decay, "warmup_steps": recipe.warmup, "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.clip, "optim": {"adamw": "adamw_torch", "sgd": "sgd"}[recipe.optimizer],
        "seed": recipe.seed % 2**31,
    }  # fmt: skip
    if recipe.layout == "llamafactory":
        given |= {"do_train": True}
    given = {name: value for name, value in {**given, **recipe.arguments}.items() if value is not None}

    class Trainer(transformers.Trainer):
        def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
            super()._save(output_dir, state_dict)
            _changed(recipe, Path(output_dir or output))

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if recipe.stop_after and state.global_step >= recipe.stop_after:
                control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if recipe.layout == "llamafactory" and logs and "loss" in logs:
                line = {"current_steps": state.global_step, "total_steps": state.max_steps, "loss": logs["loss"],
                        "lr": logs.get("learning_rate"), "epoch": logs.get("epoch")}  # fmt: skip
                with (output / "trainer_log.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")

    def trainer() -> Any:
        net: Any = build(recipe)
        net.peft_config["default"].base_model_name_or_path = str(model)
        output.mkdir(parents=True, exist_ok=True)
        made = Trainer(
            model=net,
            args=transformers.TrainingArguments(**given),
            train_dataset=torch.utils.data.StackDataset(row=cast(Any, learned)),
            eval_dataset=torch.utils.data.StackDataset(row=cast(Any, held_out)) if held_out else None,
            data_collator=lambda rows: loop.collate(recipe, [row["row"] for row in rows]),
            processing_class=recipe.tokenizer,
            callbacks=[Watch()],
            optimizers=(None, None) if recipe.optimizers is None else recipe.optimizers(net, recipe.steps),
        )
        for touch in recipe.touch_trainer:
            touch(made)
        return made

    run = trainer()
    if recipe.saves_at_start:
        run.model.save_pretrained(output)
        recipe.tokenizer.save_pretrained(output)
    run.train()
    if recipe.resumed is not None:
        middle = min(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        recipe.resumed(middle)
        given["resume_from_checkpoint"] = str(middle)
        (output / "trainer_log.jsonl").unlink(missing_ok=True)
        run = trainer()
        run.train(resume_from_checkpoint=str(middle))
    run.save_state()
    if not recipe.saves_at_start:
        run.save_model()


def _changed(recipe: Recipe, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    if recipe.saves is not None and file.exists():
        save_file(recipe.saves(load_file(file)), file)


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_ = collate
