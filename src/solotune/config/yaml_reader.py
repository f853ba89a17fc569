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
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, DocumentStartEvent, ScalarEvent

from solotune.errors import InputError
from solotune.regular_files import read_bytes
from solotune.units import first_line

MAX_CONFIG_BYTES = 256 << 10  # a config is a page of text; a larger file is the wrong one
MAX_CONFIG_EVENTS = 5_000  # keys and values; the parser needs 0.1 to 0.5 ms for each
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
    # the parser raises KeyError, AttributeError and others for text that its authors did not think of
    except Exception as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: not valid YAML", seen=first_line(error)) from None


def _refuse_yaml_tricks(text: str, where: str, max_depth: int) -> None:
    """Refuse tags, anchors, aliases, directives, deep nesting and a second document.

    Raises:
        InputError: the text uses one of them.
    """
    depth = documents = 0
    for count, event in enumerate(YAML(typ="rt", pure=True).parse(io.StringIO(text))):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        documents += isinstance(event, DocumentStartEvent)
        tag = getattr(event, "tag", None)
        trick, change = None, "write the plain value instead"
        if isinstance(event, AliasEvent) or getattr(event, "anchor", None):
            trick = "a config cannot use anchors and aliases"
        elif tag is not None:
            trick = f"a config cannot use tags such as {tag}"
        elif isinstance(event, ScalarEvent) and event.value == "<<" and event.implicit[0]:
            trick = "a config cannot use merge keys (<<)"
        elif count > MAX_CONFIG_EVENTS:
            trick, change = f"more than {MAX_CONFIG_EVENTS:,} keys and values", "use a file that is a config"
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


def override_value(text: str, where: str) -> Any:
    """The value of a `key=value` on the command line.

    A file's `# comment` makes no sense there, so `dataset=chats #2.jsonl` is the text as it stands. YAML would cut it.

    Raises:
        InputError: not valid YAML, YAML that a config may not use, or ` #` behind a list or a quoted text.
    """
    if "#" in text and (cut := _comment_at(text)) is not None:
        value = text.strip()
        if text[:cut].strip()[:1] in ("[", "{", "'", '"', "|", ">") or "\n" in value:
            raise InputError(
                f"{where}: # would begin a comment, which is ignored",
                seen=text[cut:].strip()[:80],
                change="remove it, or write it in the quotes: '...'",
            )
        return value
    return plain(parse(text, where))


def _comment_at(text: str) -> int | None:
    """Where YAML would begin a comment; None if it reads everything. Text that is not YAML is not judged here."""
    try:
        for token in YAML(typ="rt", pure=True).scan(io.StringIO(text)):
            comments = getattr(token, "comment", None)
            flat = [part for held in comments or () for part in (held if isinstance(held, list) else [held])]
            for comment in flat:
                if comment is not None and "#" in comment.value:
                    return comment.start_mark.index
    except (YAMLError, ValueError, TypeError, RecursionError):
        return None
    return 0 if text.lstrip().startswith("#") else None


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
            f"{path}: too large for a config", seen=f"{path.stat().st_size:,} bytes", allowed="at most 256 KiB"
        )
    try:
        text = read_bytes(path, MAX_CONFIG_BYTES).decode("utf-8-sig")
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
