"""YAML as a config may be written: version 1.2 (`2e-4` is a number, `on` is a word), no key twice, none of its tricks.

A config is copied from web pages. YAML can name Python objects, grow without bound through aliases, nest a thousand
deep and change its own rules; a config needs none of it, and each is refused with its line.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, DocumentStartEvent

from solotune.errors import InputError
from solotune.units import first_line

MAX_CONFIG_BYTES = 1 << 20  # a config is a page of text; anything larger is the wrong file
MAX_CONFIG_DEPTH = 4


def parse(text: str, where: str, max_depth: int = MAX_CONFIG_DEPTH) -> Any:
    """The parsed text; a mapping keeps ruamel's `.lc`, which knows each key's line."""
    try:
        _refuse_yaml_tricks(text, where, max_depth)
        return YAML(typ="rt").load(io.StringIO(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" line {mark.line + 1}" if mark is not None and "\n" in text else ""
        raise InputError(f"{where}{line}: not valid YAML", seen=error.problem, change="mend the syntax") from None
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: not valid YAML", seen=first_line(error)) from None


def _refuse_yaml_tricks(text: str, where: str, max_depth: int) -> None:
    """YAML can name Python objects, grow without bound through aliases, nest deeply, change its own rules.

    Raises:
        InputError: the text does any of it; a config needs none.
    """
    depth = documents = 0
    for event in YAML(typ="rt", pure=True).parse(io.StringIO(text)):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        documents += isinstance(event, DocumentStartEvent)
        tag = getattr(event, "tag", None)
        trick = None
        if isinstance(event, AliasEvent) or getattr(event, "anchor", None):
            trick = "anchors and aliases are not used in a config"
        elif tag is not None:
            trick = f"tags such as {tag} are not used in a config"
        elif depth > max_depth:
            trick = f"nested more than {max_depth} deep"
        elif documents > 1:
            trick = "a second document begins"
        elif isinstance(event, DocumentStartEvent) and (event.version or event.tags):
            trick = "a directive (%YAML, %TAG) changes how it is read"
        if trick is not None:
            line = f" line {event.start_mark.line + 1}" if "\n" in text else ""
            raise InputError(f"{where}{line}: {trick}", change="write the value out")


def plain(node: Any) -> Any:
    """ruamel's annotated containers and scalars as plain Python values."""
    if isinstance(node, Mapping):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [plain(item) for item in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def on_one_line(name: str) -> str:
    """A file's name as it may stand in a comment of the saved config: a line break in it would begin a key there."""
    return name if name.isprintable() else ascii(name)


def read_mapping(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A config's keys with their values, and with the file and line where each stands.

    Raises:
        InputError: no such file, not UTF-8, too large, or no mapping.
    """
    example = "solotune init MODEL DATA writes one to start from"
    if not os.path.isfile(path):  # Path.is_file raises on a name that is too long
        what = "is a folder, not a config file" if os.path.isdir(path) else "no such config file"
        raise InputError(f"{path}: {what}", seen=f"looked in {Path.cwd()}", change=example)
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise InputError(f"{path}: too large for a config", seen=f"{path.stat().st_size:,} bytes", allowed="1 MiB")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read", seen=error.strerror) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text", seen=f"byte {error.start}: {error.reason}") from None
    loaded = parse(text, str(path))
    if not isinstance(loaded, Mapping):
        raise InputError(
            f"{path}: a config is lines of `key: value`",
            seen="a list" if isinstance(loaded, list) else loaded if loaded else "empty",
            change=example,
        )
    values, sources, line_of = {}, {}, loaded.lc.key  # type: ignore[attr-defined]
    for key, value in loaded.items():
        values[str(key)] = plain(value)
        sources[str(key)] = f"{on_one_line(path.name)} line {line_of(key)[0] + 1}"
    return values, sources
