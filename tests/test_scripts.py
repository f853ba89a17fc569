"""The set-up: scripts that run as they are, and one exact version for everything they install."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ["scripts/demo", "scripts/test", "scripts/check", ".ci/run"]


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


@pytest.mark.parametrize("script", [*SCRIPTS, "scripts/env.sh"])
def test_script_is_valid_sh(script: str) -> None:
    result = subprocess.run(["sh", "-n", ROOT / script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


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
