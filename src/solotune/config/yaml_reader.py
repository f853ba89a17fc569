"""Read a config's YAML: version 1.2 (`2e-4` is a number, `on` is a string), no duplicate keys, plain values only.

People copy configs from web pages. YAML can create Python objects, grow without limit through aliases, nest a thousand
levels deep and change its own rules. A config needs none of this, so each is refused with its line.
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

MAX_CONFIG_BYTES = 1 << 20  # a config is a page of text; a larger file is the wrong one
MAX_CONFIG_DEPTH = 4


def parse(text: str, where: str, max_depth: int = MAX_CONFIG_DEPTH) -> Any:
    """Parse a text; a mapping keeps ruamel's `.lc`, which knows the line of each key.

    Raises:
        InputError: not valid YAML, or YAML that a config may not use.
    """
    try:
        _refuse_yaml_tricks(text, where, max_depth)
        return YAML(typ="rt").load(io.StringIO(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" line {mark.line + 1}" if mark is not None and "\n" in text else ""
        raise InputError(f"{where}{line}: not valid YAML", seen=error.problem, change="fix the YAML syntax") from None
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: not valid YAML", seen=first_line(error)) from None


def _refuse_yaml_tricks(text: str, where: str, max_depth: int) -> None:
    """Refuse tags, anchors, aliases, directives, deep nesting and a second document.

    Raises:
        InputError: the text uses one of them.
    """
    depth = documents = 0
    for event in YAML(typ="rt", pure=True).parse(io.StringIO(text)):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        documents += isinstance(event, DocumentStartEvent)
        tag = getattr(event, "tag", None)
        trick, change = None, "write the plain value instead"
        if isinstance(event, AliasEvent) or getattr(event, "anchor", None):
            trick = "a config cannot use anchors and aliases"
        elif tag is not None:
            trick = f"a config cannot use tags such as {tag}"
        elif depth > max_depth:
            trick = f"nested more than {max_depth} levels deep"
        elif documents > 1:
            trick, change = "a config cannot have a second document", "remove the --- and what follows it"
        elif isinstance(event, DocumentStartEvent) and (event.version or event.tags):
            trick, change = "a config cannot use directives (%YAML, %TAG)", "remove the line"
        if trick is not None:
            line = f" line {event.start_mark.line + 1}" if "\n" in text else ""
            raise InputError(f"{where}{line}: {trick}", change=change)


def plain(node: Any) -> Any:
    """Convert ruamel's annotated containers and scalars to plain Python values."""
    if isinstance(node, Mapping):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [plain(item) for item in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def on_one_line(name: str) -> str:
    """A file name that is safe in a YAML comment: a line break in it would start a new key."""
    return name if name.isprintable() else ascii(name)


def read_mapping(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a config file: its values by key, and the file and line of each key.

    Raises:
        InputError: no such file, not UTF-8, too large, or not a mapping.
    """
    example = "create one with: solotune init MODEL DATA"
    if not os.path.isfile(path):  # Path.is_file raises on a name that is too long
        what = "is a folder, not a config file" if os.path.isdir(path) else "no such config file"
        raise InputError(f"{path}: {what}", seen=f"looked in {Path.cwd()}", change=example)
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise InputError(
            f"{path}: too large for a config", seen=f"{path.stat().st_size:,} bytes", allowed="at most 1 MiB"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read", seen=error.strerror) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text", seen=f"byte {error.start}: {error.reason}") from None
    loaded = parse(text, str(path))
    if not isinstance(loaded, Mapping):
        raise InputError(
            f"{path}: a config must be lines of `key: value`",
            seen="a list" if isinstance(loaded, list) else loaded if loaded else "empty",
            change=example,
        )
    values, sources, line_of = {}, {}, loaded.lc.key  # type: ignore[attr-defined]
    for key, value in loaded.items():
        values[str(key)] = plain(value)
        sources[str(key)] = f"{on_one_line(path.name)} line {line_of(key)[0] + 1}"
    return values, sources
