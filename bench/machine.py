"""What a result was measured on and with, and where results are written."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine(*packages: str) -> dict[str, Any]:
    """CPU, cores, Python and the versions of packages."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in lines if ":" in line}
    return {
        "cpu": f"{fields['model name']}, family {fields['cpu family']} model {fields['model']}",
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def write_result(name: str, result: dict[str, Any]) -> None:
    """Writes bench/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; numbers to the right."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    marks = ["---:" if all(isinstance(row[i], (int, float)) for row in rows) else "---" for i in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, marks, *cells])
