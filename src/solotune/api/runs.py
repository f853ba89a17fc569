"""`solotune runs`: list runs with their results."""

from __future__ import annotations

from pathlib import Path

from solotune.run.run_dir import RunSummary, list_runs, summarize_run


def runs(root: str | Path = "runs") -> list[RunSummary]:
    """List the runs in the folder `root`, oldest first.

    for run in solotune.runs():
        print(run.name, run.status, run.tuned_loss)
    """
    return [summarize_run(run) for run in list_runs(root)]
