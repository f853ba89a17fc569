"""`solotune runs`: list runs with their results."""

from __future__ import annotations

from pathlib import Path

from solotune.result_repr import Table, as_html
from solotune.run.run_dir import RunSummary, list_runs, summarize_run


class Runs(list[RunSummary]):
    """Result of `runs`: the runs, oldest first. A notebook shows them as a table."""

    def _repr_html_(self) -> str:
        if not self:
            return "No runs yet."
        figures = [run.figures() for run in self]
        header = [name.replace("_", " ") for name in figures[0]]
        return as_html([Table("", header, [list(one.values()) for one in figures])])


def runs(root: str | Path = "runs") -> Runs:
    """List the runs in the folder `root`, oldest first.

        for run in solotune.runs():
            print(run.name, run.status, run.tuned_loss)
        print(solotune.runs()[-1].history[["step", "loss"]])

    A folder that is not there has no runs; a damaged run has fewer figures. Nothing is raised.
    """
    return Runs(summarize_run(run) for run in list_runs(root))
