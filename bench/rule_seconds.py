"""Seconds of the rules that look at a config and its rows before training, and which of them take longest.

    python -m bench.rule_seconds MODEL FILE [--rows 5000] [--set max_length=2048 ...]

Reading, rendering and tokenising the rows is timed apart: `train` does it anyhow. FILE is a chat file; of a longer one
the first rows are taken (ShareGPT's `chats.jsonl` of `bench.real_data` is what bench/results/rule_seconds.json is of).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.machine import machine, write_result
from solotune.config.load import load_config
from solotune.dataset import load_tokenizer, prepare
from solotune.diagnosis import rules
from solotune.diagnosis.facts.row_facts import RowFacts
from solotune.diagnosis.rules import Rule
from solotune.diagnosis.sources.solotune_run import from_prepared
from solotune.hub.model_files import resolve_model

BAR = 10.0
"""Seconds for 5,000 rows."""
NUM_SHOWN = 10


def measured(model: str, file: Path, overrides: list[str]) -> dict[str, Any]:
    """Seconds of each stage and of the slowest rules, on the rows of a file."""
    config = load_config({"model_name_or_path": model, "dataset": str(file)}, overrides)
    model_files = resolve_model(config)
    tokenizer = load_tokenizer(config, model_files)
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started, used = time.perf_counter(), time.process_time()
        answer = work()
        seconds[name] = round(time.perf_counter() - started, 2)
        seconds[f"{name}, of a core"] = round(time.process_time() - used, 2)
        return answer

    prepared = timed("prepare", lambda: prepare(config, tokenizer))
    facts = RowFacts.of_config(config, tokenizer, prepared.train, prepared.validation, prepared.report, model_files)
    spent: dict[str, float] = {}
    with _timing(spent):
        findings = timed("rules on rows", lambda: rules.judge(facts))
        run_facts = from_prepared(config, tokenizer, prepared, findings, model_files)
        timed("other rules", lambda: rules.ask_all(run_facts))
    slowest = sorted(spent.items(), key=lambda entry: -entry[1])[:NUM_SHOWN]
    return {
        "rows": len(prepared.train) + len(prepared.validation),
        "tokens": sum(len(row.input_ids) for row in prepared.train),
        "seconds": seconds,
        "rules": round(seconds["rules on rows"] + seconds["other rules"], 2),
        "rules, of a core": round(seconds["rules on rows, of a core"] + seconds["other rules, of a core"], 2),
        "slowest": {name: round(used, 2) for name, used in slowest},
        "faults": sorted({finding.code for finding in findings if finding.severity == "error"}),
    }


class _timing:
    """Adds the seconds of a core of each rule to a dict; what rules share counts for the first that asks."""

    def __init__(self, spent: dict[str, float]) -> None:
        self.spent = spent
        self.known = rules.rules

    def __enter__(self) -> None:
        wrapped = {code: tuple(map(self._wrapped, group)) for code, group in self.known().items()}
        rules.rules = lambda: wrapped  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        rules.rules = self.known

    def _wrapped(self, one: Rule) -> Rule:
        def ask(facts: Any) -> Any:
            used = time.process_time()
            try:
                return one.ask(facts)
            finally:
                name = f"{one.code} {one.ask.__name__}"
                self.spent[name] = self.spent.get(name, 0.0) + time.process_time() - used

        return replace(one, ask=ask)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rule_seconds", description="Seconds of the static rules.")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="overrides")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, asked.file.open(encoding="utf-8") as lines:
        file = Path(scratch) / asked.file.name
        file.write_text("".join(line for line, _ in zip(lines, range(asked.rows), strict=False)), encoding="utf-8")
        found = measured(asked.model, file, asked.overrides)
    found = {"machine": machine("solotune", "tokenizers", "transformers"), "bar": BAR, **found}
    write_result("rule_seconds", found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
