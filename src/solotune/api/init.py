"""`solotune init`: a config for a model and a data file, fitted to both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from solotune.api.propose import Proposal, proposed
from solotune.config.describe import allowed_values, field_help, section_of
from solotune.config.load import override_values
from solotune.config.run_config import SECTIONS, RunConfig
from solotune.config.translate import translated
from solotune.config.write import yaml_value
from solotune.config.yaml_reader import on_one_line
from solotune.display.notebook import showing
from solotune.display.progress import Display
from solotune.errors import InputError
from solotune.run.atomic_io import make_folder, write_whole
from solotune.runtime.library_noise import quiet_libraries

SHOWN = (
    "model_name_or_path", "base_precision", "lora_r", "lora_alpha", "lora_target_modules", "dataset", "max_length",
    "validation_size", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "logging_steps",
)  # fmt: skip
"""Keys that are written even if they have their defaults: those that people change first."""
WHY = {
    "base_precision": "the frozen weights in 4 bits (QLoRA); bf16 is LoRA",
    "lora_r": "rank of the update",
    "lora_alpha": "the update is multiplied by alpha / r",
    "lora_target_modules": "layers with an adapter; all-linear learns more, and needs more memory",
    "num_train_epochs": "passes over the rows",
    "learning_rate": "the usual one for LoRA; try 1e-4 and 4e-4 too",
    "validation_size": "held out, to compare base and tuned",
}
"""Why a key has its value, where nothing about model or data says more."""


@quiet_libraries()
def init(
    model: str | None = None,
    dataset: str | None = None,
    path: str | Path = "solotune.yaml",
    force: bool = False,
    every_key: bool = False,
    source: str | Path | None = None,
    display: Display | None = None,
    overrides: Iterable[str] = (),
) -> Path:
    """Write a config for a model and its data: settings fitted to the rows and this machine, each with the reason.

        solotune.init("HuggingFaceTB/SmolLM2-135M-Instruct", "chats.jsonl", "run.yaml")
        solotune.init(source="axolotl.yaml", path="translated.yaml")

    Args:
        model: folder or hub id.
        dataset: file or hub id.
        force: replace an existing file.
        every_key: list all other keys too, with their defaults and help.
        source: a config of Axolotl, LLaMA-Factory, TRL or Unsloth to translate; `model` and `dataset` win over it.
        overrides: `key=value` strings: settings that stay as they are, such as a column_mapping.

    Raises:
        InputError: the file exists and `force` is not set; model or data is missing, or cannot be used.
        StorageError: the file cannot be written.
    """
    path = Path(path)
    if path.exists() and not force:
        raise InputError(
            f"{path}: the file exists", change="choose another name with --output, or replace the file with --force"
        )
    given, left_out = _given(model, dataset, source)
    with showing(display) as chosen:
        found = proposed(given | override_values(overrides), left_out, chosen)
    make_folder(path.parent)
    write_whole(path, text_of(found, path, every_key))
    return path


def _given(model: str | None, dataset: str | None, source: str | Path | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The keys that are given, and what a translated config has that has no counterpart."""
    given, left_out = ({}, {}) if source is None else translated(Path(source))
    named = {"model_name_or_path": model, "dataset": dataset}
    given |= {key: value for key, value in named.items() if value is not None}
    for key, what in (("model_name_or_path", "the model"), ("dataset", "the data")):
        if key not in given:
            raise InputError(
                f"{what} is missing" + (f" in {source}" if source is not None else ""),
                allowed="solotune init MODEL DATA",
                seen=left_out.get(key),
            )
    return given, left_out


def text_of(found: Proposal, path: Path, every_key: bool) -> str:
    """The config as text: settings with their reasons, and with `every_key` all others behind a #."""
    lines = [f"# solotune train {on_one_line(str(path))}", *(f"# {on_one_line(note)}" for note in found.notes)]
    if every_key:
        lines.append("# Keys behind a # have their defaults. To change one, remove the #.")
    else:
        lines.append("# All other keys have their defaults: solotune init --all, docs/config.md")
    for section in SECTIONS:
        keys = [key for key in RunConfig.model_fields if section_of(key) == section]
        written = _lines(found, [key for key in keys if _is_shown(found.config, key)])
        others = [key for key in keys if not _is_shown(found.config, key)] if every_key else []
        if written or others:
            lines += ["", f"# --- {section}", *written]
        for key in others:
            value = getattr(found.config, key)
            text = f"# {key}: {'' if value is None else yaml_value(value)}".rstrip()
            lines += [f"# {field_help(key)} [{allowed_values(key)}]", text, ""]
    return "\n".join(lines).rstrip() + "\n"


def _is_shown(config: RunConfig, key: str) -> bool:
    is_default = config.source_of(key) == "default"
    return not is_default or (key in SHOWN and not (key == "validation_size" and config.eval_dataset is not None))


def _lines(found: Proposal, keys: list[str]) -> list[str]:
    texts = [f"{key}: {yaml_value(getattr(found.config, key))}" for key in keys]
    reasons = [_reason(found.because, key) for key in keys]
    width = min(44, max((len(text) for text, reason in zip(texts, reasons, strict=True) if reason), default=0))
    return [
        f"{text:{width}}  # {on_one_line(reason)}" if reason else text
        for text, reason in zip(texts, reasons, strict=True)
    ]


def _reason(because: Mapping[str, str], key: str) -> str:
    return because.get(key) or WHY.get(key, "")
