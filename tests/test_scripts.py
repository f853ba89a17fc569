"""The set-up: scripts that run as they are, and one exact version for everything they install."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [
    "scripts/demo",
    "scripts/test",
    "scripts/test_export",
    "scripts/test_browser",
    "scripts/test_slow",
    "scripts/test_ranks",
    "scripts/test_trackers",
    "scripts/test_lm_eval",
    "scripts/check",
    "scripts/check_sdist",
    "scripts/docs",
    ".ci/run",
]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["dependencies"] + [name for extra in project["optional-dependencies"].values() for name in extra]


def constraints() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_can_be_run(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    assert (ROOT / script).read_text(encoding="utf-8").startswith("#!/bin/sh\n")


@pytest.mark.parametrize("script", [*SCRIPTS, "scripts/env.sh", "scripts/own_env.sh"])
def test_script_is_valid_sh(script: str) -> None:
    result = subprocess.run(["sh", "-n", ROOT / script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_demo_trains_with_the_callers_path(tmp_path: Path) -> None:
    """With .venv on PATH, it would print commands that do not work in the shell that called it."""
    for name in ("scripts/env.sh", "scripts/demo", "constraints.txt", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name, does in (("python", "exit 0"), ("solotune", 'echo "$PATH|$*"')):
        (tmp_path / ".venv" / "bin" / name).write_text(f"#!/bin/sh\n{does}\n", encoding="utf-8")
        (tmp_path / ".venv" / "bin" / name).chmod(0o755)
    stamp = 'printf "%s\\n" "$(pwd -P) $(cat constraints.txt pyproject.toml | cksum)" >.venv/stamp'
    subprocess.run(["sh", "-c", stamp], cwd=tmp_path, check=True)
    found = subprocess.run(
        ["sh", "scripts/demo", "max_steps=1"], cwd=tmp_path, env={"PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout == "/usr/bin:/bin|train examples/demo.yaml max_steps=1\n"


def test_constraints_are_exact_and_single() -> None:
    lines = constraints()
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []  # no ranges, no +cpu
    names = [canonical(line.split("==")[0]) for line in lines]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("requirement", requirements())
def test_every_requirement_is_pinned(requirement: str) -> None:
    name = re.match(r"[\w.-]+", requirement)
    assert name
    assert canonical(name[0]) in {canonical(line.split("==")[0]) for line in constraints()}


def test_what_is_wrong_with_a_wheel_is_named(tmp_path: Path) -> None:
    problems = runpy.run_path(str(ROOT / "scripts" / "check_wheel.py"))["problems"]
    path, info = tmp_path / "solotune-0.1.0-py3-none-any.whl", "solotune-0.1.0.dist-info"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [f"Provides-Extra: {extra}" for extra in project["optional-dependencies"]]
    pythons = [f"Classifier: Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)]
    fields = [f"Summary: {project['description']}", f"License-Expression: {project['license']}", *extras, *pythons]
    head = "\n".join([*fields, "Description-Content-Type: text/markdown"])
    readme = f"{head}\n\n# solotune\nsee docs/config.md, [a page](https://example.org), solotune[sentencepiece], solotune[serve]\n"
    readme += "".join(f"solotune[{name}]\n" for name in ("tensorboard", "wandb", "mlflow", "trackio", "lm-eval"))
    command = "[console_scripts]\nsolotune = solotune.cli:main\n"

    def found(metadata: str, *left_out: str, **more: str) -> list[str]:
        with zipfile.ZipFile(path, "w") as wheel:
            for file in (ROOT / "src").rglob("*"):
                if file.is_file() and "__pycache__" not in file.parts and file.name not in left_out:
                    wheel.write(file, file.relative_to(ROOT / "src"))
            files = {f"{info}/METADATA": metadata, f"{info}/entry_points.txt": command, f"{info}/licenses/LICENSE": ""}
            for name, text in {**files, **more}.items():
                if Path(name).name not in left_out:
                    wheel.writestr(name, text)
        return list(problems(path))

    assert found(readme) == []
    assert found(readme, "errors.py") == ["not in the wheel: solotune/errors.py"]
    assert found(readme, **{"tests/tiny.py": ""}) == ["in the wheel, but not in the package: tests/tiny.py"]
    assert found(readme, "LICENSE") == ["no LICENSE"]
    assert found(readme, "py.typed") == ["not in the wheel: solotune/py.typed"]
    assert found(readme, "entry_points.txt") == ["no command solotune"]
    assert found(readme.replace("# solotune", "# other")) == ["the long description is not README.md"]
    assert found(readme.replace(extras[0], "X: y"))[0].startswith("the extras are not those of pyproject.toml")
    assert found(readme.replace(pythons[2], "X: y")) == ["the classifiers are not of the Pythons >=3.11,<3.14"]
    assert found(readme.replace("[sentencepiece]", "")) == ["the README does not name the extra [sentencepiece]"]
    assert found(readme + "[keys](docs/config.md)\n") == ["link to a local file: docs/config.md"]
