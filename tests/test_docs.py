"""What the README and the docs say is so."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from solotune.cli import commands
from solotune.config.load import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]


def tree():
    """The README's tree as paths."""
    block = README.split("## What is where")[1].split("```")[1]
    folders: list[str] = []
    for line in block.strip().splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [name.rstrip("/")]
        yield "/".join(folders)


def test_every_file_of_the_package_is_in_the_readmes_tree_and_the_other_way_round():
    named = {path for path in tree() if path.endswith(".py")}
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "src").rglob("*.py") if not path.name.startswith("__")}
    assert named == there
    assert all((ROOT / path).exists() for path in tree())


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("solotune ")])
def test_every_solotune_command_of_the_readme_is_one(command):
    """Each is parsed by the real command line; those that need a GPU or a model stop at its help."""
    verb, *arguments = shlex.split(command)[1:]
    assert verb in commands.solotune.commands
    params = commands.solotune.commands[verb].make_context(verb, arguments).params
    for override in params.get("overrides", ()):
        load_config({"model_name_or_path": "m", "dataset": "d"}, [override])


def test_every_script_of_the_readme_is_there():
    scripts = [word for command in COMMANDS for word in command.split() if word.startswith("scripts/")]
    assert {"scripts/demo", "scripts/test", "scripts/check"} <= set(scripts)
    assert all((ROOT / script).is_file() for script in scripts)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load(path):
    load_config(path)


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)


def test_generated_pages_are_up_to_date():
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]
    for name, make in pages.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == make(), "run: python docs/generate.py"


def test_verbs_of_the_readme_are_the_command_lines():
    table = README.split("## The verbs")[1].split("Every verb")[0]
    assert set(re.findall(r"\| `solotune (\w+)", table)) == set(commands.solotune.commands)


def test_python_api_of_the_readme():
    import solotune

    for name in re.findall(r"solotune\.(\w+)\(", README):
        assert callable(getattr(solotune, name))
