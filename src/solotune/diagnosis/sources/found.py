"""What was found of a trainer's run, and what to give: the `found` block of a diagnosis.

found = Found(around)
found.steps(log); found.rows(choice)
found.parts         {"steps": "120 logged steps from trainer_log.jsonl", "base": "not opened: ...; give --base"}
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from solotune.diagnosis.run_facts import RunFacts
from solotune.diagnosis.sources.found_config import ConfigChoice
from solotune.diagnosis.sources.found_rows import Choice
from solotune.diagnosis.sources.step_log import StepLog
from solotune.diagnosis.sources.surroundings import Surroundings

ORDER = ("settings", "config", "steps", "rows", "evaluation rows", "base", "adapter")
NO_LOG = "no logged steps: no trainer_state.json, *.jsonl log, TensorBoard, W&B, MLflow or console log in the folder"
_LONGEST = 200


class Found:
    """Collects part -> what it was read from, or what to give."""

    def __init__(self, around: Surroundings) -> None:
        self.around = around
        self.parts: dict[str, str] = {}
        self._rows = Choice()
        self._lacks_rows = self._lacks_base = False

    def steps(self, log: StepLog | None) -> None:
        """The logged steps."""
        if log is None or not log.num_steps:
            self.parts["steps"] = NO_LOG
            return
        steps = f"{log.num_steps:,} logged step{'s' * (log.num_steps != 1)} from {self.around.shown(log.file)}"
        steps += f", the last of {log.num_runs} runs in it" if log.num_runs > 1 else ""
        steps += f", the newest of {log.num_others + 1} such logs" if log.num_others else ""
        self.parts["steps"] = steps

    def config(self, choice: ConfigChoice) -> None:
        """The config that lies in the folder or beside it."""
        if choice.path is not None:
            self.parts["config"] = f"{self.around.shown(choice.path)} ({choice.why})"
        elif choice.offered:
            self.parts["config"] = f"perhaps {self.listed(choice.offered)}; if it is the run's: --config FILE"

    def rows(self, choice: Choice) -> None:
        """The training data."""
        if choice.paths:
            self.parts["rows"] = f"{self.listed(choice.paths)} ({choice.why})"
        self._rows = choice

    def rest(self, run_facts: RunFacts, given: str | None, names: Mapping[str, Any]) -> None:
        """Adapter and base, and what is still to be given."""
        if run_facts.saved is not None:
            self.parts["adapter"] = f"{len(run_facts.saved.adapter):,} tensors of adapter_model.safetensors"
            before = self.parts.get("settings")
            self.parts["settings"] = f"{before}, adapter_config.json" if before else "adapter_config.json"
        offered = self._rows.offered
        if self._rows.paths and not self._rows.is_named and run_facts.tokenizer and not len(run_facts.train):
            self.parts.pop("rows")  # it has the right number of rows, but they are no rows of a training
            offered = self._rows.paths
        self._lacks_rows = "rows" not in self.parts
        if self._lacks_rows:
            named = _written(names, "dataset")
            why = f"not here: the run names {named}; give --dataset DATA" if named else "not known: give --dataset DATA"
            beside = f"; {self.listed(offered)} may be the run's: --dataset {typed(offered[0])}" if offered else ""
            self.parts["rows"] = why + beside
        named = _written(names, "model_name_or_path")
        self._lacks_base = given is None and not run_facts.model_config
        if given is not None:
            self.parts["base"] = f"{given} (given)"
        elif run_facts.model_config:
            self.parts["base"] = "a model folder in or beside the folder, with the name that the run gives"
        else:
            why = f"not opened: the run names {named}" if named else "not known"
            self.parts["base"] = f"{why}; give --base MODEL"
        self.parts.setdefault("settings", "not known: no training_args.bin, config or adapter_config.json")
        self.parts = {part: self.parts[part] for part in ORDER if part in self.parts}

    def not_given(self, run_facts: RunFacts) -> dict[str, str]:
        """Parts that are missing since nobody gave them, and not since they are damaged; with what to give."""
        if self._lacks_rows:
            return {"train": "give the training data with --dataset"}
        if run_facts.tokenizer is None and self._lacks_base:
            return {"train": "give the base with --base"}
        return {}

    def listed(self, paths: Iterable[Path]) -> str:
        """Paths as seen from the run's folder."""
        return ", ".join(self.around.shown(path) for path in paths)


def typed(path: Path) -> str:
    """A path as the user can type it here."""
    here = os.path.relpath(path)
    return here if not here.startswith(os.path.join("..", "..")) else str(path)


def _written(names: Mapping[str, Any], key: str) -> str:
    value, _ = names.get(key) or (None, "")
    return _short(value)


def _short(value: Any) -> str:
    return "" if value is None else str(value)[:_LONGEST]
