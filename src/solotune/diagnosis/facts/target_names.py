"""Names in `lora_target_modules`, and the modules that they match as PEFT matches them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embedding")
"""Last names of input embeddings."""


def is_embedding(name: str) -> bool:
    """Whether a target names the input embedding."""
    return name.rpartition(".")[2] in EMBEDDINGS


def count_named(modules: Iterable[str], name: str) -> int:
    """Modules with this name, whole or after a dot."""
    return sum(module == name or module.endswith(f".{name}") for module in modules)


def matched_alternatives(pattern: str, modules: Collection[str]) -> tuple[list[str], list[str]]:
    """(alternatives of a regular expression, those that match no module as a whole), without embeddings.

    The alternatives are those of its first group, or the whole. What is no expression misses nothing.
    """
    group = re.search(r"\((?:\?:)?([\w.]+(?:\|[\w.]+)+)\)", pattern)
    parts = group[1].split("|") if group else [pattern]
    each = [f"{pattern[: group.start()]}{part}{pattern[group.end() :]}" if group else part for part in parts]
    try:
        missed = [part for part, one in zip(parts, each, strict=True)
                  if not any(re.fullmatch(one, name) for name in modules)]  # fmt: skip
    except re.error:
        return parts, []
    return parts, [part for part in missed if not is_embedding(part)]
