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
    """Writes a commented config for a model and a data file: every key, its default, its help.

    Raises:
        InputError: the file exists and `force` is not set, or no config can hold this model or data file.
    """
    path = Path(path)
    if path.exists() and not force:
        raise InputError(f"{path}: exists already", change="another name with --output, or --force to replace it")
    config = load_config({"model_name_or_path": model, "dataset": dataset})
    make_folder(path.parent)
    write_whole(path, _commented(config, path))
    return path


def _commented(config: RunConfig, path: Path) -> str:
    """The keys that were given, and all others behind a #, each below its help."""
    name = on_one_line(str(path))
    lines = [f"# solotune train {name}", "# Lines behind a # hold the defaults: remove the # to change one.", ""]
    for section in SECTIONS:
        lines.append(f"# --- {section}")
        for key in (key for key in RunConfig.model_fields if section_of(key) == section):
            value = getattr(config, key)
            text = f"{key}: {'' if value is None else yaml_value(value)}".rstrip()
            is_given = config.source_of(key) != "default"
            lines += [f"# {field_help(key)} [{allowed_values(key)}]", text if is_given else f"# {text}", ""]
    return "\n".join(lines)
