"""`solotune init`: a commented config for a model and a data file."""

from __future__ import annotations

from pathlib import Path

from solotune.config.describe import allowed_values, field_help, section_of
from solotune.config.load import load_config
from solotune.config.run_config import SECTIONS, RunConfig
from solotune.config.write import yaml_value
from solotune.config.yaml_reader import on_one_line
from solotune.errors import InputError
from solotune.run.atomic_io import make_folder, write_whole


def init(model: str, dataset: str, path: str | Path = "solotune.yaml", force: bool = False) -> Path:
    """Write a commented config: every key with its default and help.

        solotune.init("HuggingFaceTB/SmolLM2-135M-Instruct", "chats.jsonl", "run.yaml")

    Args:
        model: folder or hub id.
        dataset: file or hub id.
        force: replace an existing file.

    Raises:
        InputError: the file exists and `force` is not set, or model or dataset is not a valid value.
    """
    path = Path(path)
    if path.exists() and not force:
        raise InputError(
            f"{path}: the file exists", change="choose another name with --output, or replace the file with --force"
        )
    config = load_config({"model_name_or_path": model, "dataset": dataset})
    make_folder(path.parent)
    write_whole(path, _commented(config, path))
    return path


def _commented(config: RunConfig, path: Path) -> str:
    """Config text: the given keys, and all others commented out, each with its help above it."""
    name = on_one_line(str(path))
    lines = [
        f"# solotune train {name}",
        "# Keys behind a # have their defaults. To change one, remove the #.",
        "",
    ]
    for section in SECTIONS:
        lines.append(f"# --- {section}")
        for key in (key for key in RunConfig.model_fields if section_of(key) == section):
            value = getattr(config, key)
            text = f"{key}: {'' if value is None else yaml_value(value)}".rstrip()
            is_given = config.source_of(key) != "default"
            lines += [f"# {field_help(key)} [{allowed_values(key)}]", text if is_given else f"# {text}", ""]
    return "\n".join(lines)
