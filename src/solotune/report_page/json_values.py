"""Take values out of JSON that another version wrote, or an editor damaged: a value of another type counts as missing.

    mapping(evaluation, "scores")["exact_match"]    text(diagnosis, "verdict")    items(data, "findings")

Numbers are taken by `run.record.number_in`.
"""

from __future__ import annotations

from typing import Any

from solotune.units import escape_terminal


def mapping(content: Any, *keys: str) -> dict[str, Any]:
    """The object below nested keys; empty if there is none."""
    found = _below(content, keys)
    return found if isinstance(found, dict) else {}


def items(content: Any, *keys: str) -> list[Any]:
    """The list below nested keys; empty if there is none."""
    found = _below(content, keys)
    return found if isinstance(found, list) else []


def text(content: Any, *keys: str) -> str:
    """The text below nested keys; empty if there is none."""
    found = _below(content, keys)
    return found if isinstance(found, str) else ""


def texts(content: Any, *keys: str) -> tuple[str, ...]:
    """The texts in the list below nested keys."""
    return tuple(one for one in items(content, *keys) if isinstance(one, str))


def in_words(value: Any) -> str:
    """A value of a config or a JSON file as a short text."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return escape_terminal(str(value))


def _below(content: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content
