"""Runs by Hugging Face's own Trainer, diagnosed from its output folder, the data and the script's config.

The folder holds what everyone's does: trainer_state.json, training_args.bin, the adapter in PEFT's format, checkpoints,
tokenizer files. Nothing of the process that wrote it is handed over.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from bench.diagnose.loop import build, collate, render
from bench.diagnose.recipe import Recipe
from solotune.diagnosis.run_facts import RunFacts
from solotune.diagnosis.sources import detect

CONFIG = ("model_name_or_path", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm",
          "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "lora_r", "lora_alpha",
          "lora_dropout", "lora_target_modules", "max_length", "assistant_only_loss", "packing", "optim", "seed",
          "init_lora_weights", "modules_to_save")  # fmt: skip
"""Keys of TRL's script config that are the same as ours."""


def run_facts_of(recipe: Recipe, folder: Path, alone: str = "") -> RunFacts:
    """Trains into this folder, and reads that folder as the diagnosis does.

    Args:
        alone: nothing but the folder is given; data and config lie beside it (`data`), or the base too (`base`).
    """
    rows = folder / "chats.jsonl"
    rows.write_text("".join(json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in recipe.chats))
    config = folder / "sft.yaml"
    told = {name: recipe.settings[name] for name in CONFIG if name in recipe.settings}
    told["dataset_name"] = str(rows)
    config.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in told.items()))
    output = folder / "output"
    _train(recipe, output)
    if alone:
        lay_beside(Path(str(recipe.settings["model_name_or_path"])), folder, alone)
        return detect.run_facts_of(output)
    return detect.run_facts_of(output, config=config, dataset=str(rows))


def lay_beside(base: Path, folder: Path, alone: str) -> None:
    """The base as its owner has it who downloaded it into the project."""
    if alone == "base" and base.is_dir():
        shutil.copytree(base, folder / base.name, dirs_exist_ok=True)


def _train(recipe: Recipe, output: Path) -> None:
    """Trainer, with the recipe's rows, collator, model and numbers."""
    import transformers

    learned = render(recipe, recipe.chats, recipe.mask)
    held_out = render(recipe, recipe.held_out, recipe.held_out_mask or recipe.mask)
    arguments = transformers.TrainingArguments(
        output_dir=str(output),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_steps=3,
        save_steps=max(recipe.steps // 2, 1),
        eval_strategy="steps" if held_out else "no",
        eval_steps=max(recipe.steps // 3, 1),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(recipe.decay, recipe.decay),
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        optim={"adamw": "adamw_torch", "sgd": "sgd"}[recipe.optimizer],
        seed=recipe.seed % 2**31,
    )

    class Trainer(transformers.Trainer):
        def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
            super()._save(output_dir, state_dict)
            _change_saved(recipe, Path(output_dir or output))

    trainer = Trainer(
        model=build(recipe),
        args=arguments,
        train_dataset=torch.utils.data.StackDataset(row=learned),
        eval_dataset=torch.utils.data.StackDataset(row=held_out) if held_out else None,
        data_collator=lambda rows: collate(recipe, [row["row"] for row in rows]),
        processing_class=recipe.tokenizer,
    )
    if recipe.saves_at_start:
        trainer.model.save_pretrained(output)
    trainer.train()
    trainer.save_state()
    if recipe.saves_at_start:
        recipe.tokenizer.save_pretrained(output)
    else:
        trainer.save_model()


def _change_saved(recipe: Recipe, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    if recipe.saves is not None and file.exists():
        save_file(recipe.saves(load_file(file)), file)
