"""Write a config as YAML, so that it loads again as the same config."""

from __future__ import annotations

import io
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from solotune.config.describe import section_of
from solotune.config.run_config import SECTIONS, RunConfig


class _Representer(SafeRepresenter):
    """ruamel's representer, with double quotes where ruamel's choice would load as something else: U+0085 in single
    quotes loads as a blank, `?a` in a list and `: a` as a key."""

    def represent_text(self, text: str) -> ScalarNode:
        quoted = not text.isprintable() or text.startswith(("?", ":"))
        return self.represent_scalar("tag:yaml.org,2002:str", text, '"' if quoted else None)


_Representer.add_representer(str, _Representer.represent_text)


def yaml_value(value: Any) -> str:
    """A value in YAML's flow style; `yaml_reader.parse` reads it back as the same value."""
    yaml, buffer = YAML(typ="safe", pure=True), io.StringIO()
    yaml.Representer = _Representer
    yaml.default_flow_style = True
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore  (columns stay in the user's order)
    yaml.width = 10_000
    yaml.dump({"key": value}, buffer)
    return buffer.getvalue().strip().removeprefix("{key: ").removesuffix("}")


def to_yaml(config: RunConfig) -> str:
    """The whole config as YAML, with the source of each value as a comment; it loads again as the same config."""
    lines: list[str] = []
    for section in SECTIONS:
        lines.append(f"{'' if not lines else chr(10)}# {section}")
        for key in RunConfig.model_fields:
            if section_of(key) != section:
                continue
            lines.append(f"{key}: {yaml_value(getattr(config, key))}  # {config.source_of(key)}")
    return "\n".join(lines) + "\n"
