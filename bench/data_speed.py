"""Chats to tokens with a loss mask: solotune's `prepare` against TRL's preparation, same rows, tokenizer and template.

    python -m bench.real_data FOLDER
    python -m venv TRL && TRL/bin/pip install -c constraints.txt torch transformers datasets trl==1.16.0
    python -m bench.data_speed FOLDER --trl TRL/bin/python

5,000 distinct chats, `max_length` 2048, answers alone learned, templates as TRL ships them. Theirs is `load_dataset`
and `SFTTrainer._prepare_dataset` with `assistant_only_loss`, called without a trainer around it (a model is not
needed): it renders by TRL's training template, tokenises, builds labels and truncates by `Dataset.map`; with 1 and 2
processes. Ours does the same and looks for copies, near-duplicates and groups, splits, and fills the label budget. Each
run is a process of its own; they take turns; imports and loading the tokenizer are left out; nothing is cached. CPU
seconds are those of all processes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TEMPLATES = {"llama3": "llama3", "qwen3": "qwen3_instruct_2507"}  # those TRL ships, with their training twins
NUM_CHATS, MAX_LENGTH, NUM_RUNS = 5000, 2048, 3


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class Clock:
    def __init__(self) -> None:
        self.started = time.perf_counter(), cpu_seconds()

    def read(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self.started[0], "cpu_seconds": cpu_seconds() - self.started[1]}


def ours(model: str, template: str, file: str) -> dict[str, Any]:
    from solotune.config.load import load_config
    from solotune.dataset import load_tokenizer, prepare

    keys = {"model_name_or_path": model, "chat_template_path": template, "dataset": file, "max_length": MAX_LENGTH}
    config = load_config(keys)
    tokenizer = load_tokenizer(config)
    whole = tokenising = Clock()

    def progress(done: int, total: int, what: str) -> None:
        nonlocal tokenising
        if what != "tokenising rows":
            tokenising = Clock()

    report = prepare(config, tokenizer, progress=progress, use_cache=False).report
    counts = {"rows": report.num_kept, "tokens": report.num_tokens, "supervised": report.num_supervised}
    return {**counts, "whole": whole.read(), "tokenising": tokenising.read()}


def theirs(model: str, template: str, file: str, num_proc: int) -> dict[str, Any]:
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    from trl.chat_template_utils import get_training_chat_template

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = Path(template).read_text()
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_length=MAX_LENGTH,
            assistant_only_loss=True,
            dataset_num_proc=num_proc if num_proc > 1 else None,
            use_cpu=True,
            bf16=False,
        )
        trainer: Any = SimpleNamespace(
            _tokenizer=tokenizer, chat_template=get_training_chat_template(tokenizer), completion_only_loss=False
        )
        whole = Clock()
        rows = datasets.load_dataset("json", data_files=file, split="train", cache_dir=folder)
        tokenising = Clock()
        prepare = SFTTrainer._prepare_dataset
        made: Any = prepare(trainer, rows, tokenizer, arguments, False, None, "train")
        seconds = {"whole": whole.read(), "tokenising": tokenising.read()}
        made = made.with_format("numpy")
        tokens = sum(len(row["input_ids"]) for row in made)
        supervised = sum(int((row["labels"] != -100).sum()) for row in made)
        return {"rows": len(made), "tokens": tokens, "supervised": supervised, **seconds}


def distinct_chats(source: Path, target: Path) -> None:
    seen: dict[str, str] = {}
    with source.open(encoding="utf-8") as file:
        for line in file:
            seen.setdefault(" ".join(line.casefold().split()), line)
    target.write_text("".join(list(seen.values())[:NUM_CHATS]), encoding="utf-8")


def run(python: str, *arguments: str) -> dict[str, Any]:
    command = [python, "-m", "bench.data_speed", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    return json.loads(done.stdout)


def median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of several runs as their medians, seconds to two places."""
    counts = {key: runs[0][key] for key in ("rows", "tokens", "supervised")}
    for part in ("whole", "tokenising"):
        for key in ("seconds", "cpu_seconds"):
            counts[f"{part}_{key}"] = round(statistics.median(one[part][key] for one in runs), 2)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trl", default=sys.executable, help="a Python that has trl")
    args = parser.parse_args()
    from bench.machine import machine, table, write_result

    where = "from importlib.util import find_spec; print(find_spec('trl').submodule_search_locations[0])"
    found_at = subprocess.run([args.trl, "-c", where], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    templates = Path(found_at) / "chat_templates"
    result: dict[str, Any] = {"machine": machine("solotune", "tokenizers", "transformers", "datasets"), "runs": {}}
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "chats.jsonl"
        distinct_chats(args.folder / "chats.jsonl", file)
        for name, template in TEMPLATES.items():
            inputs = str(args.folder / "tokenizers" / name), str(templates / f"{template}.jinja"), str(file)
            found: dict[str, list[dict[str, Any]]] = {}
            for _ in range(NUM_RUNS):
                found.setdefault("solotune", []).append(run(sys.executable, "--ours", *inputs))
                for num_proc in (1, 2):
                    one = run(args.trl, "--theirs", *inputs, str(num_proc))
                    found.setdefault(f"TRL, num_proc {num_proc}", []).append(one)
                print(json.dumps({who: runs[-1] for who, runs in found.items()}), file=sys.stderr)
            result["runs"][name] = {who: median(runs) for who, runs in found.items()}
    write_result("data_speed", result)
    rows = [[model, name, *one.values()] for model, found in result["runs"].items() for name, one in found.items()]
    head = [
        "tokenizer",
        "who",
        "rows",
        "tokens",
        "supervised",
        "all, s",
        "all, CPU s",
        "tokenising, s",
        "tokenising, CPU s",
    ]
    print(table(head, rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ours"]:
        print(json.dumps(ours(*sys.argv[2:])))
    elif sys.argv[1:2] == ["--theirs"]:
        print(json.dumps(theirs(*sys.argv[2:5], int(sys.argv[5]))))
    else:
        main()
