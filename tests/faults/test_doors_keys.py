"""No idle key: whatever the config accepts is read by somebody, and by whom is not written down here but found."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from solotune.config.load import load_config
from solotune.config.run_config import RunConfig
from solotune.config.write import to_yaml
from solotune.errors import InputError
from tests.faults.test_doors_config import MINIMAL, branches

ROOT = Path(__file__).parents[2] / "src" / "solotune"


@cache
def read_attributes() -> set[str]:
    """Names that are read as attributes anywhere in the package but in the config's own file."""
    found: set[str] = set()
    for path in ROOT.rglob("*.py"):
        if path != ROOT / "config/run_config.py":
            found |= {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    return found


def values_of(key: str) -> set[Any]:
    """All values of a key that has only finitely many: a choice of words."""
    found: set[Any] = set()
    for branch in branches(key):
        if not branch.keys() & {"enum", "const"}:
            return {"many"} | {key, "more"}
        found |= set(branch.get("enum", [branch.get("const")]))
    return found


@cache
def methods() -> dict[str, str]:
    """The source of each method and property of RunConfig."""
    tree = ast.parse((ROOT / "config/run_config.py").read_text())
    (body,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "RunConfig")
    return {
        method.name: ast.unparse(method)
        for method in body.body
        if isinstance(method, ast.FunctionDef)
        and (not method.decorator_list or any(getattr(d, "id", "") == "property" for d in method.decorator_list))
    }


def through_the_config(key: str) -> set[str]:
    """Methods and properties of RunConfig that read a key, also by a name such as `f"{what}_steps"`."""
    return {
        name
        for name, text in methods().items()
        if f"self.{key}" in text or ("{what}_" in text and key.endswith(("_steps", "_strategy")))
    }


@pytest.mark.parametrize("key", RunConfig.model_fields)
def test_every_key_has_a_reader(key: str) -> None:
    """Outside the config's file, or by a method of it that is called outside; a key with one value needs none."""
    read = read_attributes()
    assert key in read or through_the_config(key) & read or len(values_of(key)) == 1, f"nobody reads {key}"


@pytest.mark.parametrize("key", RunConfig.model_fields)
def test_every_key_changes_the_saved_config_and_says_where_it_came_from(key: str) -> None:
    other = {"str": "zz", "int": 3, "float": 0.25}
    usual = load_config(MINIMAL)
    for value in (True, False, *(v for b in branches(key) for v in b.get("enum", [])), *other.values(), 33, ["zz"], ["json"],
                  {"a": "prompt"}, -1, 1, 9, "24GiB"):  # fmt: skip
        if value == getattr(usual, key) and type(value) is type(getattr(usual, key)):
            continue
        extra = {"eval_strategy": {"eval_steps": 5}, "save_strategy": {"save_steps": 5}}.get(key, {})
        try:
            changed = load_config({**MINIMAL, **extra, key: value})
        except InputError:
            continue
        assert getattr(changed, key) == value
        assert changed.source_of(key) == "python"
        line = next(line for line in to_yaml(changed).splitlines() if line.startswith(f"{key}:"))
        assert line not in to_yaml(usual).splitlines() and line.endswith("# python")
        return
    assert len(values_of(key)) == 1, f"{key} accepts nothing but its default"
