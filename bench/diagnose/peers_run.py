"""What each peer is given of a program, the commands that its documentation names for that, and its warnings.

    peer = PEERS["runmedic"]
    warnings = warnings_of(peer, environment, exhibit)

runmedic 0.1.1          `diagnose` on the output folder and on the console log
finetune-doctor 0.2.2   the command on the output folder
soup-cli 0.77           `data validate` and `data doctor` on the rows with the model's tokenizer; `why` on the curve and
                        the settings, entered into its own tracker, since it reads no other tool's runs. Not given: runs
                        to `diagnose`, whose live probes ask a chat model about general knowledge (a base of this
                        benchmark knows a small world alone)
peft-doctor 0.9.2       `check` with script, rows, held-out rows, model and every setting that it has an option for; its
                        Python function with the live model, tokenizer, LoRA config and settings; dataset-doctor,
                        dataset-intel, token-lengths, conflicts, leakage-check, sft-check, chat-template-check,
                        lora-config-check, quantization-check, label-audit on the collator's rows, generation-check,
                        inspect-adapter, adapter-integrity, adapter-tensors, checkpoint-list, analyze-log, investigate,
                        and estimate where the card is known. Not given: `env`, which is about this machine, and
                        `gradients`, for which the owner has to write the gradients down

A level is `error` or `warning` as the peer has it (runmedic's critical, soup's MAJOR and critical are errors); what it
calls info, hint or MINOR is a `note`, and soup's own exit code takes MINOR for passed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.diagnose.exhibits import Exhibit
from bench.diagnose.peers_process import Environment, Output

LIMIT = 60.0
"""Seconds that one command may take."""
LEVELS = {"critical": "error", "error": "error", "major": "error", "warning": "warning"}


class Warned(NamedTuple):
    """One warning: the peer's name of the check, its level, what it says."""

    kind: str
    level: str
    text: str


Ask = Callable[[list[str]], Output]


@dataclass(frozen=True)
class Peer:
    """A public tool: what is installed, and how it is asked."""

    package: str
    preload: tuple[str, ...]
    shares_training_stack: bool
    warnings: Callable[[Exhibit, Ask], Iterator[Warned]]


def warnings_of(peer: Peer, environment: Environment, exhibit: Exhibit) -> tuple[list[Warned], list[str]]:
    """Its warnings, the gravest first and each kind once, and the commands that failed or took too long."""
    failed: list[str] = []

    def ask(words: list[str]) -> Output:
        own = {"SOUP_DB_PATH": str(exhibit.folder / "soup.db"), "HOME": str(exhibit.folder)}
        output = environment.run(words, exhibit.run, LIMIT, own)
        if output.code is None or output.code < 0 or "Traceback (most recent call last)" in output.text[:2000]:
            failed.append(f"{' '.join(words[:3])[:80]}: {output.text.strip()[-200:] or 'took too long'}")
        return output

    found = {}
    for warning in peer.warnings(exhibit, ask):
        known = found.get(warning.kind)
        if known is None or _gravity(warning) < _gravity(known):
            found[warning.kind] = warning
    return sorted(found.values(), key=_gravity), failed


def _gravity(warning: Warned) -> int:
    return ("error", "warning", "note").index(warning.level)


def _level(word: str) -> str:
    return LEVELS.get(word.lower(), "note")


def _json_in(text: str) -> Any:
    """The JSON that a command printed among other lines."""
    begins = sorted(place for place in (text.find("["), text.find("{")) if place >= 0)
    for place in begins:
        try:
            return json.JSONDecoder().raw_decode(text[place:])[0]
        except ValueError:
            continue
    return None


# --- runmedic and finetune-doctor


def _runmedic(exhibit: Exhibit, ask: Ask) -> Iterator[Warned]:
    for name in ("output", "console.log"):
        if exhibit.file(name) is not None:
            for run in _json_in(ask(["runmedic", "diagnose", name, "--json"]).text) or []:
                for one in run["findings"] if isinstance(run, dict) else []:
                    yield Warned(one["check"], _level(one["severity"]), one["title"])


def _finetune_doctor(exhibit: Exhibit, ask: Ask) -> Iterator[Warned]:
    if exhibit.file("output") is not None:
        found = _json_in(ask(["finetune-doctor", "output", "-f", "json"]).text)
        for one in found.get("findings", []) if isinstance(found, dict) else []:
            yield Warned(f"{one['check']}/{one['title']}", _level(one["severity"]), one["summary"])


# --- soup

TRACK = """
import json, sys
from soup_cli.experiment.tracker import ExperimentTracker
history, config = json.load(open("output/trainer_state.json"))["log_history"], {config!r}
tracker = ExperimentTracker()
run = tracker.start_run(config, "cpu", "CPU", {{}}, run_id="this")
losses = []
for one in history:
    if "loss" in one or "eval_loss" in one:
        tracker.log_metrics(run, one["step"], one.get("epoch", 0.0), one.get("loss"), one.get("learning_rate", 0.0),
                            one.get("grad_norm"), val_loss=one.get("eval_loss"))
        losses += [one["loss"]] if "loss" in one else []
if losses:
    tracker.finish_run(run, losses[0], losses[-1], history[-1]["step"], 60.0, "output")
"""
ISSUES = ("duplicate rows", "empty fields", "very short", "fail to convert")


def _soup(exhibit: Exhibit, ask: Ask) -> Iterator[Warned]:
    settings = exhibit.settings
    if exhibit.file("train.jsonl"):
        for line in ask(["soup", "data", "validate", "train.jsonl"]).text.splitlines():
            if line.strip().startswith("!"):
                for issue in ISSUES:
                    if issue in line:
                        yield Warned(f"validate/{issue}", "warning", line.strip(" !"))
        if exhibit.file("model/tokenizer_config.json"):
            words = ["soup", "data", "doctor", "train.jsonl", "--model", "model", "--output", "soup.json"]
            words += ["--max-length", str(settings.get("max_length") or 2048)]
            words += [] if settings.get("assistant_only_loss", True) else ["--no-train-on-responses-only"]
            (exhibit.run / "soup.json").unlink(missing_ok=True)
            ask(words)
            if (report := exhibit.file("soup.json")) is not None:
                for check in json.loads(report.read_text())["checks"]:
                    if check["verdict"] != "OK":
                        yield Warned(check["name"], _level(check["verdict"]), check["message"])
    if exhibit.file("output/trainer_state.json"):
        (exhibit.folder / "soup.db").unlink(missing_ok=True)
        training = {"lr": settings["learning_rate"]} if settings.get("learning_rate") else {}
        ask(["python", TRACK.format(config={"base": "model", "task": "sft", "training": training})])
        text = ask(["soup", "why", "this"]).text
        for level, kind, said in re.findall(r"(critical|warning|info)\s*│\s*(\w+)\s*│\s*([^│]*)", text):
            yield Warned(kind, _level(level), said.strip())


# --- peft-doctor

CHECK_OPTIONS = {
    "per_device_train_batch_size": "--batch-size", "gradient_accumulation_steps": "--grad-accum",
    "max_length": "--sequence-length", "learning_rate": "--learning-rate", "optim": "--optim",
    "warmup_ratio": "--warmup-ratio", "warmup_steps": "--warmup-steps", "lr_scheduler_type": "--lr-scheduler-type",
    "save_steps": "--save-steps", "save_total_limit": "--save-total-limit", "seed": "--seed",
    "max_grad_norm": "--max-grad-norm", "logging_steps": "--logging-steps", "response_template": "--response-template",
}  # fmt: skip
CHECK_FLAGS = {
    "packing": ("--packing", None), "assistant_only_loss": ("--assistant-only-loss", None),
    "completion_only_loss": ("--completion-only-loss", None), "torch_compile": ("--torch-compile", None),
    "load_in_4bit": ("--load-in-4bit", None), "bf16": ("--bf16", "--no-bf16"), "fp16": ("--fp16", "--no-fp16"),
    "gradient_checkpointing": ("--gradient-checkpointing", "--no-gradient-checkpointing"),
}  # fmt: skip
LIVE = """
import json, yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft_doctor import diagnose_peft
lora, args = yaml.safe_load(open("lora.yaml")), yaml.safe_load(open("sft.yaml")) or {}
rows = [json.loads(line) for line in open("train.jsonl")]
report = diagnose_peft(model=AutoModelForCausalLM.from_pretrained("model"),
                       tokenizer=AutoTokenizer.from_pretrained("model"), peft_config=lora, training_args=args,
                       train_dataset=rows)
print("REPORT", report.to_json())
"""
"""The base as it is before adapters are on: inside PEFT's layers it looks for no target modules."""


def _peft_doctor(exhibit: Exhibit, ask: Ask) -> Iterator[Warned]:
    for words in _peft_doctor_commands(exhibit):
        text = ask(words).text
        found = _json_in(text.partition("REPORT")[2] or text)
        for one in found.get("issues", []) if isinstance(found, dict) else []:
            yield Warned(one["code"], _level(one["severity"]), one["message"])


def _peft_doctor_commands(exhibit: Exhibit) -> Iterator[list[str]]:
    settings, there = exhibit.settings, exhibit.file
    length = str(settings.get("max_length") or 2048)
    rows, held_out = there("train.jsonl") is not None, there("eval.jsonl") is not None
    tokenizer = there("model/tokenizer_config.json") is not None

    def command(*words: str) -> list[str]:
        return ["peft-doctor", *words, "--output", "json"]

    yield command("check", "train.py", *_check_options(exhibit, rows, held_out))
    if there("model/model.safetensors") is not None and rows:
        yield ["python", LIVE]
    if rows:
        packs = ["--packing"] if settings.get("packing") else []
        yield command("dataset-doctor", "train.jsonl", "--sequence-length", length, *packs)
        yield command("dataset-intel", "train.jsonl", "--limit", "5000")
        yield command("conflicts", "train.jsonl")
        template = ["--chat-template", "model/chat_template.jinja"] if there("model/chat_template.jinja") else []
        yield command("sft-check", "sft.yaml", "--dataset", "train.jsonl", *template)
        if tokenizer:
            yield command("token-lengths", "train.jsonl", "--model", "model", "--max-length", length)
    if rows and held_out:
        yield command("leakage-check", "train.jsonl", "eval.jsonl", "--threshold", "0.90", "--limit", "10000")
    if there("model/chat_template.jinja") and rows:
        asked = ["--assistant-only-loss"] if settings.get("assistant_only_loss") else []
        yield command("chat-template-check", "model/chat_template.jinja", "--dataset", "train.jsonl", *asked)
    if there("tokenized.jsonl") is not None:
        yield command("label-audit", "tokenized.jsonl", "--pad-token-id", str(_pad_id(exhibit.run / "model")))
    yield command(
        "lora-config-check", "output/adapter_config.json" if there("output/adapter_config.json") else "lora.yaml"
    )
    if there("bnb.json") is not None:
        yield command("quantization-check", "bnb.json", "--training")
    if tokenizer:
        yield command("generation-check", "model")
    if there("output/adapter_config.json") is not None:
        yield command("inspect-adapter", "output", "--base-model", str(_base_of(exhibit)))
        yield command("adapter-integrity", "output")
        yield command("adapter-tensors", "output")
    if any((exhibit.run / "output").glob("checkpoint-*")):
        yield command("checkpoint-list", "output")
    if there("console.log") is not None:
        yield command("analyze-log", "console.log", "--no-explain")
    yield command("investigate", ".")
    if settings.get("memory_bytes"):
        gigabytes = f"{settings['memory_bytes'] / 2**30:.0f}"
        keeps = [] if settings.get("gradient_checkpointing") else ["--no-gradient-checkpointing"]
        told = ["--model", str(settings["model_name_or_path"]), "--seq-len", length, "--qlora"]
        told += ["--batch-size", str(settings["per_device_train_batch_size"]), "--target-vram", gigabytes]
        yield command("estimate", *told, *keeps)


def _check_options(exhibit: Exhibit, rows: bool, held_out: bool) -> list[str]:
    settings = exhibit.settings
    words = ["--model", "model", "--local-files-only"]
    words += ["--dataset", "train.jsonl"] if rows else []
    words += ["--eval-dataset", "eval.jsonl"] if held_out else []
    for key, option in CHECK_OPTIONS.items():
        if settings.get(key) is not None:
            words += [option, str(settings[key])]
    for key, (on, off) in CHECK_FLAGS.items():
        if settings.get(key):
            words.append(on)
        elif key in settings and off is not None:
            words.append(off)
    return words


def _pad_id(model: Path) -> int:
    """The id of the pad token, from the tokenizer's files."""
    told = json.loads((model / "tokenizer_config.json").read_text())
    pad = told.get("pad_token") or told.get("eos_token")
    pad = pad["content"] if isinstance(pad, dict) else pad
    added = json.loads((model / "tokenizer.json").read_text())["added_tokens"]
    return next((one["id"] for one in added if one["content"] == pad), 0)


def _base_of(exhibit: Exhibit) -> Any:
    """The base as the owner names it: what the adapter was trained on."""
    told = json.loads((exhibit.run / "output" / "adapter_config.json").read_text())
    return exhibit.settings.get("model_name_or_path") or told.get("base_model_name_or_path")


AUTO = "transformers:AutoConfig,AutoTokenizer,AutoModelForCausalLM,PreTrainedTokenizerFast"
SOUP_MODULES = ("cli", "commands.data", "commands.data_doctor", "commands.why", "data.loss_mask", "experiment.tracker")

PEERS: dict[str, Peer] = {
    "runmedic": Peer("runmedic", ("runmedic.cli",), False, _runmedic),
    "finetune-doctor": Peer("finetune-doctor", ("finetune_doctor.cli",), False, _finetune_doctor),
    "soup": Peer("soup-cli", (*(f"soup_cli.{name}" for name in SOUP_MODULES), AUTO), True, _soup),
    "peft-doctor": Peer("peft-doctor", ("peft_doctor.cli", AUTO), True, _peft_doctor),
}
