"""README and docs are true: links work, lists of files are complete. `tests/docs` runs what they say."""

from __future__ import annotations

import ast
import re
import runpy
import tomllib
from pathlib import Path

import pytest

from solotune.config.load import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEVELOPMENT = (ROOT / "docs" / "development.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PACKAGES = {path.name for path in (ROOT / "src" / "solotune").iterdir() if path.is_dir()}


def tree(page, heading):
    """The paths of the tree below a heading, in its order, with the words beside them."""
    block = page.split(f"## {heading}\n")[1].split("```")[1]
    folders: list[str] = []
    for line in block.strip().splitlines():
        depth, (name, *words) = (len(line) - len(line.lstrip())) // 2, line.split()
        folders[depth:] = [name.rstrip("/")]
        yield "/".join(folders), " ".join(words)


def files_below(folder):
    """Python files that are not empty as a tree shows them: those of a folder, then its folders, each in order."""
    found = sorted(path for path in folder.glob("*.py") if path.stat().st_size)
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__")
    return found + [path for one in inner for path in files_below(one)]


def test_architecture_lists_every_file_once_in_the_order_of_the_tree():
    named = list(tree(ARCHITECTURE, "All files"))
    assert [path for path, _ in named if path.endswith(".py")] == [
        str(path.relative_to(ROOT)) for path in files_below(ROOT / "src" / "solotune")
    ]
    assert [path for path, words in named if path.endswith(".py") and not words] == []


def test_every_folder_of_the_package_is_listed_once():
    named = [path for path, _ in tree(DEVELOPMENT, "What is where")]
    packages = {str(path.parent.relative_to(ROOT)) for path in files_below(ROOT / "src" / "solotune")}
    assert sorted(path for path in named if path.startswith("src/") and not path.endswith(".py")) == sorted(packages)
    assert len(set(named)) == len(named)
    assert all((ROOT / path).exists() for path in named)


def test_layers_of_the_architecture_page_are_the_checked_ones():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = ARCHITECTURE.split("## From config to adapter")[0].split("```")[1].split("\n")[1:-1]
    assert layers == contracts["contracts"][0]["layers"]


def has_name(dotted):
    """Whether `run.record.RunRecord` is a name at the top of `src/solotune/run/record.py`, or of a package."""
    module, _, name = dotted.rpartition(".")
    path = ROOT / "src" / "solotune" / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    source = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    assigned = [target for node in source.body if isinstance(node, ast.Assign) for target in node.targets]
    assigned += [node.target for node in source.body if isinstance(node, ast.AnnAssign)]
    defined = {node.name for node in source.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return name in defined | {target.id for target in assigned if isinstance(target, ast.Name)}


def test_names_on_the_architecture_page_exist():
    page = ARCHITECTURE.split("## All files")[0]
    dotted = set(re.findall(r"`((?:\w+\.)+\w+)`", page)) - {"solotune.data", "solotune.train", "solotune.__all__"}
    names = {name for name in dotted if name.split(".")[0] in PACKAGES}
    assert len(names) > 15
    assert {name for name in names if not has_name(name)} == set()
    files = {name for name in re.findall(r"`(\w[\w/]*\.py|\w+/[\w/]*)`", page) if name.split("/")[0] in PACKAGES}
    assert {name for name in files if not (ROOT / "src" / "solotune" / name).exists()} == set()


def test_modules_on_the_architecture_page_that_have_new_names_exist():
    rows = ARCHITECTURE.split("## Old names")[1].split("Functions, classes")[0].splitlines()
    new = [name for row in rows for name in re.findall(r"`([^`]+)`", "|".join(row.split("|")[2::2]))]
    assert len(new) > 80
    src = ROOT / "src" / "solotune"
    folders = {name for name in new if name.endswith(("/", "*"))}
    assert all((src / name.rstrip("*")).is_dir() for name in folders)
    assert {name for name in new if name not in folders and not (src / f"{name}.py").is_file()} == set()


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load(path):
    load_config(path)


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        if page.parent.name == "migrate":  # a part of coming_from.md
            continue
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)


def test_generated_pages_are_up_to_date():
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]
    for name, make in pages.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == make(), "run: python docs/generate.py"


def bench_commands():
    """(module, words) of each `python -m bench.MODULE ...` in the docs."""
    pages = [
        README,
        *(
            path.read_text(encoding="utf-8")
            for folder in ("docs", "bench/results")
            for path in sorted((ROOT / folder).rglob("*.md"))
        ),
    ]
    for page in pages:
        for command in re.findall(r"python -m (bench\.\w+[^`#|\n]*)", page):
            yield command.split()[0], re.findall(r"(?<!\S)\[?(--[\w-]+)", command)


@pytest.mark.parametrize(("module", "options"), sorted({(name, tuple(options)) for name, options in bench_commands()}))
def test_every_bench_command_of_the_docs_has_a_module_that_takes_its_options(module, options):
    path = ROOT / module.replace(".", "/")
    sources = [*path.glob("*.py")] if path.is_dir() else [path.with_suffix(".py")]
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    assert "__main__" in text or (path / "__main__.py").is_file()
    assert [option for option in options if f'"{option}"' not in text] == []


def test_files_that_the_docs_name_exist():
    """In README, docs and results: `run/events.py` below the package, or a path of the repository."""
    for page in (
        ROOT / "README.md",
        ROOT / "SECURITY.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "bench" / "results").glob("*.md"),
    ):
        text = page.read_text(encoding="utf-8").split("## Old names")[0]
        for name in set(re.findall(r"`([\w/]+/\w+\.(?:py|md|yaml))`", text)) - {"solotune/train.py"}:
            assert any((folder / name).is_file() for folder in (ROOT, ROOT / "src", ROOT / "src" / "solotune")), (
                page.name,
                name,
            )


def test_the_picture_of_the_demo_shows_the_figures_of_the_tutorial():
    """Drawn by docs/picture.py from a run of the demo."""
    svg = (ROOT / "docs" / "demo.svg").read_text(encoding="utf-8").replace("&#160;", " ")
    table = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8").split("```text\n")[1].split("```")[0]
    figures = re.findall(r"[-+]?\d+\.\d+%?", table)
    assert len(figures) == 10
    assert [figure for figure in figures if figure not in svg] == []
    assert "http" not in re.sub(
        r'xmlns="[^"]*"|<!--.*?-->', "", svg, flags=re.DOTALL
    )  # nothing is loaded from elsewhere
