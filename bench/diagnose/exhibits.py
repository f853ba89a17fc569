"""A program as files: what its owner could hand to any tool that looks for mistakes in a fine-tuning.

    exhibit = left_by(program, folder)      trained once, and kept in the folder
    Exhibit.read(folder)                    the same folder again, or one that somebody else has filled in this layout

Layout, of which any file may be missing:

    truth.json              {"name", "truth": ["F17"], "settings": {...}}; never in a tool's way
    run/train.py            the script with TRL that has the settings which the owner wrote down
    run/sft.yaml            the same as SFTConfig's keys; run/lora.yaml as LoraConfig's, run/bnb.json if quantised
    run/train.jsonl, run/eval.jsonl
    run/tokenized.jsonl     the first batches with labels, as the collator made them (only of loops written by hand)
    run/console.log         what the trainer printed, and the error that ended it
    run/model/              config.json, generation_config.json, tokenizer; the weights where they are at hand
    run/output/             trainer_state.json, adapter, checkpoints

The learning rate given to a peer is that of an ordinary model: the tiny bases learn best at 6e-3, where others do at
2e-4, so every learning rate is divided by 30 in script, configs and curve. Otherwise any tool that knows usual rates
would warn of every healthy program.

Of a loop written by hand the curve is written as trainer_state.json, as transformers' Trainer would have written it. A
fault that is in the code of the loop alone (a shifted label, a lost attention mask) is in no script here: of it the
labels and the curve are all there is to see.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from bench.diagnose.loop import Batch, Outcome
    from bench.diagnose.recipe import Recipe

USUAL_RATE = 2e-4
"""Of LoRA on ordinary models."""
LORA = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_layers_to_transform": "layers_to_transform",
    **{key: key for key in ("modules_to_save", "init_lora_weights", "use_rslora", "use_dora")},
}
"""A config's key -> LoraConfig's argument."""
NOT_OF_SFT = frozenset(
    "model_name_or_path base_precision dataset dataset_name eval_dataset format asked use_peft output_dir memory_bytes "
    "load_in_4bit bnb_4bit_compute_dtype model_dtype merged_into serving_template llm_int8_skip_modules adapter_dtype "
    "validation_size split_by overflow num_samples chat_template_path response_template truncation_side".split()
)
"""Keys that are no argument of SFTConfig."""


class Program(Protocol):
    """What a source of programs has to offer: those of `programs.py` do."""

    @property
    def name(self) -> str: ...
    @property
    def codes(self) -> tuple[str, ...]: ...
    @property
    def kind(self) -> str: ...


@dataclass(frozen=True)
class Exhibit:
    """The files of one program."""

    folder: Path
    name: str
    truth: tuple[str, ...]
    settings: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Exhibit:
        known = json.loads((folder / "truth.json").read_text())
        return cls(folder, known["name"], tuple(known["truth"]), known["settings"])

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def file(self, name: str) -> Path | None:
        """The file or folder below run/, if it is there and not empty."""
        path = self.run / name
        there = any(path.iterdir()) if path.is_dir() else path.exists() and path.stat().st_size > 0
        return path if there else None


def left_by(program: Program, folder: Path) -> Exhibit:
    """Trains the program and leaves its files; a folder that is there already is taken as it is."""
    if not (folder / "truth.json").exists():
        making = folder.with_name(f"{folder.name}.{os.getpid()}")
        shutil.rmtree(making, ignore_errors=True)
        (making / "run" / "output").mkdir(parents=True)
        settings = _left(program, making / "run")
        known = {"name": program.name, "truth": list(program.codes), "settings": settings}
        (making / "truth.json").write_text(json.dumps(known, default=str))
        making.rename(folder)
    return Exhibit.read(folder)


def _left(program: Any, run: Path) -> dict[str, Any]:
    if hasattr(program, "exhibit"):  # a source that knows best what its programs leave
        settings, best = program.exhibit(run), USUAL_RATE
    elif (script := program.trl_run()) is not None:
        settings, best = _of_trl(script, run), script.base.kind.learning_rate
    elif program.kind == "own":
        job = program.job()
        settings, best = _of_ours(job, run), job.base.kind.learning_rate
    else:
        recipe = program.recipe()
        leave = _of_trainer if program.kind == "foreign" else _of_loop
        settings, best = leave(recipe, run), recipe.base.kind.learning_rate
    settings = json.loads(json.dumps(settings, default=str).replace(f"{run}{os.sep}", ""))
    _tell_usual_rates(settings, run, USUAL_RATE / best)
    _complete_console(run)
    _write_script(settings, run)
    return settings


# --- one kind of program each


def _of_trl(script: Any, run: Path) -> dict[str, Any]:
    from bench.diagnose import trl_run

    trl_run.train(script, run)
    _tidy(run)
    (run / "chats.jsonl").rename(run / "train.jsonl")
    (run / "held-out.jsonl").unlink(missing_ok=True)
    if script.sft.get("eval_strategy", "no") != "no":
        _write_rows(run / "eval.jsonl", script.held_out)
    if script.looks_at != ".":  # the owner kept a checkpoint alone
        for path in (run / "output").iterdir():
            if path.name != script.looks_at:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    _write_model(script.base.folder, script.tokenizer, run / "model")
    written = {f"lora_{key}" if f"lora_{key}" in LORA else key: value for key, value in script.lora.items()}
    return {**script.sft, **written, "pad_token": script.tokenizer.pad_token}


def _of_trainer(recipe: Recipe, run: Path) -> dict[str, Any]:
    from bench.diagnose import foreign

    foreign._train(recipe, run / "output")
    _tidy(run)
    _write_chats(recipe, run)
    _write_model(recipe.base.folder, recipe.tokenizer, run / "model", recipe.model_config, recipe.generation_config)
    return _told(recipe)


def _of_loop(recipe: Recipe, run: Path) -> dict[str, Any]:
    from bench.diagnose.loop import train

    outcome = train(recipe)
    if recipe.has_live:
        _write_chats(recipe, run)
        _write_tokenized(run / "tokenized.jsonl", outcome.batches)
        _write_model(recipe.base.folder, recipe.tokenizer, run / "model", recipe.model_config, recipe.generation_config)
    else:  # told to be an 8B model's, whose files are not here
        (run / "model").mkdir()
        (run / "model" / "config.json").write_text(json.dumps(recipe.model_config))
    history = [dict(entry) for entry in outcome.log]
    history += [{"eval_loss": loss, "step": step, "epoch": step / recipe.epoch_steps}
                for step, loss in outcome.evaluations]  # fmt: skip
    _write_state(run / "output", history, recipe.steps)
    (run / "console.log").write_text("\n".join(outcome.errors), encoding="utf-8")
    _write_adapter(recipe, outcome, run / "output")
    return _told(recipe)


def _of_ours(job: Any, run: Path) -> dict[str, Any]:
    """A run of solotune: its metrics as Trainer's, its adapter, its files of rows."""
    from bench.diagnose import ours

    ours.carried_out(job, run)
    (run / "sft.yaml").unlink(missing_ok=True)
    if (run / "held_out.jsonl").exists():
        (run / "held_out.jsonl").rename(run / "eval.jsonl")
    if job.template is not None:
        job.tokenizer.chat_template = job.template
        (run / "template.jinja").unlink(missing_ok=True)
    moved = run / "model" if (run / "model").exists() else run / "elsewhere"
    job.tokenizer.save_pretrained(moved)
    moved.rename(run / "model")
    left, output = run / "run", run / "output"
    if left.exists():
        history = _history_of(left / "metrics.jsonl")
        total = max((entry["total_steps"] for entry in history if "total_steps" in entry), default=0)
        _write_state(output, history, total)
        if (left / "adapter").exists():
            shutil.copytree(left / "adapter", output, dirs_exist_ok=True)
        shutil.rmtree(left)
    return {**job.config, "pad_token": job.tokenizer.pad_token}


def _history_of(metrics: Path) -> list[dict[str, Any]]:
    history = []
    for line in metrics.read_text().splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # a torn line
            continue
        if event.get("event") == "step":
            kept = ("loss", "learning_rate", "grad_norm", "epoch", "step", "total_steps")
            history.append({key: event[key] for key in kept if event.get(key) is not None})
        elif event.get("event") == "eval" and event.get("loss") is not None:
            history.append({"eval_loss": event["loss"], "step": event["step"]})
    return history


def _told(recipe: Recipe) -> dict[str, Any]:
    """The settings that the owner wrote down; the mask of the answers only where it was left to the trainer.

    A loop by hand that masks by itself asks nothing of TRL, which would refuse it under a template without markers.
    """
    told = {**(recipe.asked or recipe.settings), "pad_token": recipe.tokenizer.pad_token}
    if told.get("assistant_only_loss") and recipe.mask != "none":
        del told["assistant_only_loss"]
    return told


# --- files


def _tell_usual_rates(settings: dict[str, Any], run: Path, times: float) -> None:
    """Learning rates as of an ordinary model, in the settings and in every curve."""
    if settings.get("learning_rate"):
        settings["learning_rate"] *= times
    for file in (run / "output").rglob("trainer_state.json"):
        state = json.loads(file.read_text())
        for entry in state["log_history"]:
            if "learning_rate" in entry:
                entry["learning_rate"] *= times
        file.write_text(json.dumps(state))


def _tidy(run: Path) -> None:
    """Takes away what leads to a file elsewhere."""
    (run / "sft.yaml").unlink(missing_ok=True)
    for state in (run / "output").rglob("*.bin"):
        if state.name == "training_args.bin":
            state.unlink()


def _write_rows(file: Path, rows: Iterable[Any]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _write_chats(recipe: Recipe, run: Path) -> None:
    _write_rows(run / "train.jsonl", ({"messages": chat} for chat in recipe.chats))
    if recipe.held_out:
        _write_rows(run / "eval.jsonl", ({"messages": chat} for chat in recipe.held_out))


def _write_tokenized(file: Path, batches: list[Batch]) -> None:
    names = ("input_ids", "labels", "attention_mask")
    rows = [
        {name: batch[name][place].tolist() for name in names if name in batch and batch[name].ndim == 2}
        for batch in batches
        for place in range(len(batch["input_ids"]))
    ]
    _write_rows(file, rows)


def _write_model(
    base: Path,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    model_config: dict[str, Any] | None = None,
    generation_config: dict[str, Any] | None = None,
) -> None:
    """The base's folder with this tokenizer and these changes to its configs; the weights by a link."""
    folder.mkdir()
    for name, changes in (("config.json", model_config), ("generation_config.json", generation_config)):
        if (base / name).exists():
            (folder / name).write_text(json.dumps({**json.loads((base / name).read_text()), **(changes or {})}))
    tokenizer.save_pretrained(folder)
    for weights in base.glob("*.safetensors"):
        (folder / weights.name).symlink_to(weights)


def _write_state(output: Path, history: list[dict[str, Any]], steps: int) -> None:
    if not history:
        return
    ordered = sorted(history, key=lambda entry: (entry["step"], "eval_loss" in entry))
    kept = [{key: value for key, value in entry.items() if key != "total_steps"} for entry in ordered]
    state = {
        "best_metric": None,
        "best_model_checkpoint": None,
        "epoch": ordered[-1].get("epoch", 0.0),
        "eval_steps": 500,
        "global_step": ordered[-1]["step"],
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": kept,
        "logging_steps": 1,
        "max_steps": steps,
        "num_train_epochs": math.ceil(ordered[-1].get("epoch", 1.0)),
        "save_steps": 500,
        "total_flos": 0.0,
        "train_batch_size": 8,
    }
    (output / "trainer_state.json").write_text(json.dumps(state))


def _complete_console(run: Path) -> None:
    """What Trainer printed, a dict for each entry of its history, before the errors that are there already."""
    states = sorted((run / "output").rglob("trainer_state.json"), key=lambda file: file.stat().st_size)
    history = json.loads(states[-1].read_text())["log_history"] if states else []
    lines = [str({key: value for key, value in entry.items() if key != "step"}) for entry in history]
    file = run / "console.log"
    errors = file.read_text(encoding="utf-8") if file.exists() else ""
    file.write_text("\n".join([*lines, errors]).strip() + "\n", encoding="utf-8")


def _write_adapter(recipe: Recipe, outcome: Outcome, output: Path) -> None:
    if outcome.adapter is None or not recipe.has_live:
        return
    from safetensors.torch import save_file

    save_file({name: t.contiguous() for name, t in outcome.adapter.items()}, output / "adapter_model.safetensors",
              {"format": "pt"})  # fmt: skip
    config = {"peft_type": "LORA", "base_model_name_or_path": recipe.settings.get("model_name_or_path"), "bias": "none",
              **recipe.adapters}  # fmt: skip
    (output / "adapter_config.json").write_text(json.dumps(config))


def _write_script(settings: dict[str, Any], run: Path) -> None:
    """The script that has these settings, and the config files that say the same."""
    left_out = NOT_OF_SFT | set(LORA) | {"pad_token", "task_type"}
    sft = {key: v for key, v in settings.items() if key not in left_out and not key.startswith("lora_")}
    lora = {"lora_dropout": 0.0} | {LORA[key]: value for key, value in settings.items() if key in LORA}
    lora["task_type"] = "CAUSAL_LM"
    quantised = settings.get("base_precision") == "nf4" or settings.get("load_in_4bit")
    bnb = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    bnb |= {key: settings[key] for key in ("bnb_4bit_compute_dtype", "llm_int8_skip_modules") if key in settings}
    for name, values in (("sft.yaml", sft), ("lora.yaml", lora)):
        (run / name).write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()))
    if quantised:
        (run / "bnb.json").write_text(json.dumps(bnb))

    def call(name: str, values: dict[str, Any]) -> str:
        return f"{name}(\n" + "".join(f"    {key}={value!r},\n" for key, value in values.items()) + ")"

    evaluates = (run / "eval.jsonl").exists()
    lines = [
        "from datasets import load_dataset",
        "from peft import LoraConfig",
        f"from transformers import AutoModelForCausalLM, AutoTokenizer{', BitsAndBytesConfig' if quantised else ''}",
        "from trl import SFTConfig, SFTTrainer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("model")',
        f"tokenizer.pad_token = {settings.get('pad_token')!r}",
        *([f"quantization_config = {call('BitsAndBytesConfig', bnb)}"] if quantised else []),
        'model = AutoModelForCausalLM.from_pretrained("model"'
        + (", quantization_config=quantization_config)" if quantised else ")"),
        "model.config.use_cache = False",
        'train = load_dataset("json", data_files="train.jsonl", split="train")',
        *(['held_out = load_dataset("json", data_files="eval.jsonl", split="train")'] if evaluates else []),
        f"peft_config = {call('LoraConfig', lora)}",
        f"args = {call('SFTConfig', {'output_dir': 'output', **sft})}",
        "trainer = SFTTrainer(",
        "    model=model,",
        "    args=args,",
        "    train_dataset=train,",
        *(["    eval_dataset=held_out,"] if evaluates else []),
        "    processing_class=tokenizer,",
        "    peft_config=peft_config,",
        ")",
        "trainer.train()",
        "trainer.save_model()",
    ]
    (run / "train.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
