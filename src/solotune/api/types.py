"""What several verbs take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from solotune.config.run_config import RunConfig

ConfigSource = str | Path | Mapping[str, Any] | RunConfig
"""A config: the path of a YAML file, its keys and values, or one that is checked already."""
