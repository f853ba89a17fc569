"""Runs by TRL's own SFTTrainer and PEFT, diagnosed from their output folder.

    run = clean(load("llama-chatml"), seed=0)       what a plain script does: prompt and completion, LoRA, checkpoints
    run.sft["learning_rate"] = 2e-5                 what trl_faults.py and trl_healthy.py do
    subject = run_facts_of(run, folder)               trained, and read as a stranger reads it

TRL is no requirement of this project: where it is not installed, `is_installed()` is False and these programs are left
out. Rows are TRL's prompt-completion in messages, of which it learns the completion.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.diagnose.bases import Base
from bench.diagnose.foreign import lay_beside
from bench.diagnose.recipe import linears
from bench.diagnose.registry import Needs
from solotune.diagnosis.run_facts import RunFacts
from solotune.diagnosis.sources import detect

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Rows = list[dict[str, Any]]
STEPS = 60


def is_installed() -> bool:
    """Whether TRL can be imported here."""
    return importlib.util.find_spec("trl") is not None


@dataclass
class Run:
    """One script that fine-tunes with TRL, as plain fields."""

    base: Base
    seed: int
    rows: Rows
    held_out: Rows
    tokenizer: PreTrainedTokenizerFast
    sft: dict[str, Any]
    """SFTConfig's arguments."""
    lora: dict[str, Any]
    """peft.LoraConfig's arguments."""

    told: bool = True
    """Whether the config that made it is handed over."""
    wrote: dict[str, Any] = field(default_factory=dict)
    """Of that config: what stands in it beside (or instead of) what held."""
    gives_rows: bool = True
    tells_held_out: bool = False
    looks_at: str = "."
    """The folder that is diagnosed: the output, or a checkpoint in it."""
    saves_state: bool = False
    """`trainer.save_state()`, which TRL's script does not call."""

    prepare: list[Callable[[Any], Any]] = field(default_factory=list)
    """model -> model, before the trainer has it."""
    touch: list[Callable[[Any], None]] = field(default_factory=list)
    """Of the trainer, before it trains."""
    collator: Callable[[Run], Any] | None = None
    optimizers: Callable[[Any], tuple[Any, Any]] | None = None
    saved_at_start: bool = False
    stopped_after: int | None = None
    resumed: Callable[[Path], None] | None = None
    """What happened to the checkpoint of the middle before the run went on from it."""
    left: list[Callable[[Run, Path], None]] = field(default_factory=list)
    """What happened to the output afterwards."""


Change = Callable[[Run, random.Random], None]


@dataclass(frozen=True)
class TrlChange:
    """One change to a clean run; without codes it stays healthy. Several codes are names of the same thing here."""

    codes: tuple[str, ...]
    name: str
    needs: Needs
    change: Change


CHANGES: list[TrlChange] = []


def change(*codes: str, needs: Needs = Needs.INSTRUCT) -> Callable[[Change], Change]:
    """Registers a fault of TRL runs, or with no code a healthy oddity."""

    def registered(function: Change) -> Change:
        CHANGES.append(TrlChange(codes, function.__name__, needs, function))
        return function

    return registered


def as_prompt_and_completion(chats: list[Any]) -> Rows:
    return [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats]


def as_messages(rows: Rows) -> Rows:
    return [{"messages": row["prompt"] + row["completion"]} for row in rows]


def clean(base: Base, seed: int, rows: int = 240) -> Run:
    """A script in which nothing is wrong."""
    chats, held_out = base.world.split(rows, 32, seed)
    return Run(
        base=base,
        seed=seed,
        rows=as_prompt_and_completion(chats),
        held_out=as_prompt_and_completion(held_out),
        tokenizer=base.tokenizer(),
        sft={
            "learning_rate": 6e-3,
            "max_steps": STEPS,
            "per_device_train_batch_size": 8,
            "logging_steps": 3,
            "save_steps": STEPS // 2,
            "max_length": 256,
            "bf16": False,
            "seed": seed % 2**31,
        },
        lora={"r": 8, "lora_alpha": 16, "target_modules": linears(base), "task_type": "CAUSAL_LM"},
    )


def run_facts_of(run: Run, folder: Path, alone: str = "") -> RunFacts:
    """Trains into this folder, and reads what lies there as the diagnosis does.

    Args:
        alone: as `foreign.run_facts_of`; what this owner does not have lies nowhere.
    """
    train(run, folder)
    if not alone:
        return read(run, folder)
    for name, has in (("sft.yaml", run.told), ("chats.jsonl", run.gives_rows)):
        if not has:
            (folder / name).unlink()
    lay_beside(Path(_base(folder) or ""), folder, alone)
    return detect.run_facts_of(folder / "output" / run.looks_at)


def read(run: Run, folder: Path) -> RunFacts:
    """The subject of a folder that `train` has filled, with what its owner hands over."""
    config, rows = folder / "sft.yaml" if run.told else None, str(folder / "chats.jsonl") if run.gives_rows else None
    return detect.run_facts_of(folder / "output" / run.looks_at, config=config, dataset=rows, base=_base(folder))


def _base(folder: Path) -> str | None:
    """The base that the newest adapter names: its owner knows that it is the right one to give."""
    found = sorted((folder / "output").rglob("adapter_config.json"), key=lambda path: len(path.parts))
    return json.loads(found[0].read_text())["base_model_name_or_path"] if found else None


def train(run: Run, folder: Path) -> None:
    """Leaves chats.jsonl, sft.yaml and output/ in the folder."""
    chats = _written(folder / "chats.jsonl", run.rows)
    output = folder / "output"
    _train(run, output)
    for change_it in run.left:
        change_it(run, output)
    lora = {name if name.startswith("lora") else f"lora_{name}": value for name, value in run.lora.items()}
    kept = ("modules_to_save", "use_rslora", "use_dora", "init_lora_weights")
    lora = {name.removeprefix("lora_") if name.removeprefix("lora_") in kept else name: value
            for name, value in lora.items() if name != "lora_task_type"}  # fmt: skip
    told = {"model_name_or_path": str(run.base.folder), "dataset_name": str(chats), "use_peft": True}
    told |= run.sft | lora | run.wrote
    if run.tells_held_out:
        told["eval_dataset"] = str(_written(folder / "held-out.jsonl", run.held_out))
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in told.items() if value is not None]
    (folder / "sft.yaml").write_text("".join(lines))


def _written(file: Path, rows: Rows) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


def _train(run: Run, output: Path) -> None:
    """What a script with SFTTrainer does; once more from the middle where it was resumed."""
    trainer = _trainer(run, output)
    if run.saved_at_start:
        trainer.save_model()
    trainer.train()
    if run.resumed is not None:
        middle = min(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        run.resumed(middle)
        run.sft["resume_from_checkpoint"] = str(middle)
        trainer = _trainer(run, output)
        trainer.train(resume_from_checkpoint=str(middle))
    if run.saves_state:
        trainer.save_state()
    if run.stopped_after is None and not run.saved_at_start:
        trainer.save_model()


def _trainer(run: Run, output: Path) -> Any:
    import datasets
    import peft
    import transformers
    import trl  # pyright: ignore[reportMissingImports]

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == run.stopped_after

    datasets.disable_progress_bars()
    model = run.base.model()
    for prepared in run.prepare:
        model = prepared(model)
    arguments = trl.SFTConfig(output_dir=str(output), use_cpu=True, report_to=[], disable_tqdm=True, **run.sft)
    evaluates = arguments.eval_strategy != "no"
    trainer = trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(run.rows),
        eval_dataset=datasets.Dataset.from_list(run.held_out) if evaluates else None,
        processing_class=run.tokenizer,
        peft_config=None if isinstance(model, peft.PeftModel) else peft.LoraConfig(**run.lora),
        data_collator=None if run.collator is None else run.collator(run),
        optimizers=(None, None) if run.optimizers is None else run.optimizers(model),
        callbacks=[Stop()] if run.stopped_after else None,
    )
    for touch in run.touch:
        touch(trainer)
    return trainer
