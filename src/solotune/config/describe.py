"""Describe a config key in words: its help, the values it accepts, its section."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from solotune.config.metric_specs import FORMS
from solotune.config.run_config import COLUMNS, RunConfig


def field_help(key: str) -> str:
    """One line of help for a key."""
    return RunConfig.model_fields[key].description or ""


def allowed_values(key: str) -> str:
    """Values that a key accepts, in words: `a whole number, at least 1`."""
    special = {
        "validation_size": "a fraction, at least 0 and below 1 (0.05), or a whole number of rows (200)",
        "memory_budget": "auto, a fraction of the GPU's memory between 0 and 1 (0.9), or a size (24GiB, 9.5 GiB, 24GB)",
        "max_steps": "-1 (use num_train_epochs) or a whole number, at least 1",
        "allow_faults": "codes or names of faults: F67, rate-too-high (docs/faults.md lists them)",
        "metrics": f"a list of {FORMS}",
        "column_mapping": "`your column: name`, each name at most once (`ignore`: any number of times); names: "
        + ", ".join(COLUMNS),
    }
    if key in special:
        return special[key]
    return _in_words(_schemas()[key])


@cache
def _schemas() -> dict[str, Any]:
    """JSON schema of each key, cached: pydantic needs milliseconds for it and `init` asks for every key."""
    return RunConfig.model_json_schema()["properties"]


def _in_words(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return ", or ".join(_in_words(branch) for branch in schema["anyOf"])
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if schema["type"] == "array":
        return "a list of names"
    words = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "string": "text",
        "null": "empty",
    }
    limits = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    return ", ".join([words[schema["type"]]] + [f"{text} {schema[k]:,}" for k, text in limits.items() if k in schema])


def section_of(key: str) -> str:
    """Heading of a key in `solotune init` and in the docs."""
    extra = RunConfig.model_fields[key].json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["section"])
