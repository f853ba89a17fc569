"""Settings and steps in README.md, the model card that trainers write beside an adapter.

card = read(text)
card.settings       of "### Training hyperparameters" (transformers), or of axolotl's config in the card
card.entries        of the table "### Training results"
card.versions       {"trl": "1.16.0", "pytorch": "2.12.0"}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from solotune.config.yaml_reader import parse
from solotune.diagnosis.sources import hf_settings
from solotune.errors import InputError

_NAMES = {
    "learning_rate": "learning_rate",
    "train_batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "seed": "seed",
    "lr_scheduler_type": "lr_scheduler_type",
    "lr_scheduler_warmup_steps": "warmup_steps",
    "lr_scheduler_warmup_ratio": "warmup_ratio",
    "num_epochs": "num_train_epochs",
    "training_steps": "max_steps",
}
"""Names in transformers' model card (`TrainingSummary`) -> names of its arguments."""
_VERSIONS = "TRL|Transformers|Pytorch|Datasets|Tokenizers|PEFT|Unsloth|Axolotl"
_NUM_ROWS = 10_000


@dataclass(frozen=True)
class Card:
    """What a model card says of the training."""

    settings: Mapping[str, Any]
    entries: list[dict[str, Any]]
    versions: Mapping[str, str]


def read(text: str) -> Card:
    """The card; its parts are empty where it does not have them."""
    versions = re.findall(rf"^\s*-\s*({_VERSIONS})\s*:?\s*v?(\d[\w.+]*)", text, re.MULTILINE | re.IGNORECASE)
    settings = _hyperparameters(text) or _of_axolotl(text)
    return Card(settings, _results(text), {name.lower(): version for name, version in versions})


def _hyperparameters(text: str) -> dict[str, Any]:
    _, _, part = text.partition("### Training hyperparameters")
    part = part.partition("\n###")[0]
    lines = re.findall(r"^- (\w+): ([^\n]{1,200})$", part, re.MULTILINE)
    found: dict[str, Any] = {_NAMES[name]: value.strip() for name, value in lines if name in _NAMES}
    optimizer = dict(lines).get("optimizer", "")
    if used := re.search(r"[Uu]se (?:OptimizerNames\.)?(\w+)", optimizer):
        found["optim"] = used[1].lower()
    return found


def _of_axolotl(text: str) -> dict[str, Any]:
    """The YAML block of axolotl's card."""
    block = re.search(r"See axolotl config.*?```yaml\n(.*?)```", text, re.DOTALL)
    if block is None:
        return {}
    try:
        found = parse(block[1], "README.md", hf_settings.MAX_DEPTH)
    except InputError:
        return {}
    return hf_settings.flat(found)[0] if isinstance(found, Mapping) else {}


def _results(text: str) -> list[dict[str, Any]]:
    """The rows of the table of training results."""
    _, _, part = text.partition("### Training results")
    lines = [line for line in part.partition("\n###")[0].splitlines() if line.strip().startswith("|")]
    if len(lines) < 3:
        return []
    names = {"Training Loss": "loss", "Validation Loss": "eval_loss", "Epoch": "epoch", "Step": "step"}
    header = [names.get(cell.strip(), "") for cell in lines[0].strip().strip("|").split("|")]
    entries = []
    for line in lines[2 : 2 + _NUM_ROWS]:
        cells = (cell.strip() for cell in line.strip().strip("|").split("|"))
        entry = {name: cell for name, cell in zip(header, cells, strict=False) if name and re.match(r"^[\d.]", cell)}
        entries.append(entry)
    return entries
