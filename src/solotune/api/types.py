"""Types of arguments that several verbs share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from solotune.config.run_config import RunConfig

ConfigSource = str | Path | Mapping[str, Any] | RunConfig
"""A config: the path of a YAML file, a mapping of keys, or a checked `RunConfig`."""
Overrides = Iterable[str] | Mapping[str, Any]
"""Values that replace those of the config: `key=value` strings, or a mapping of keys."""
