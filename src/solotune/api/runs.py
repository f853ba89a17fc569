"""`solotune runs`: the runs with their figures."""

from __future__ import annotations

from pathlib import Path

from solotune.run.run_dir import RunSummary, list_runs, summarize_run


def runs(root: str | Path = "runs") -> list[RunSummary]:
    """The runs below `root`, oldest first."""
    return [summarize_run(run) for run in list_runs(root)]
