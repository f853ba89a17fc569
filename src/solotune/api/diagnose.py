"""`solotune diagnose`: what is wrong with a run, or that nothing is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from solotune.api.types import ConfigSource
from solotune.display.progress import Display, SilentDisplay

if TYPE_CHECKING:
    from solotune.diagnosis.evidence import Diagnosis


def diagnose(
    target: ConfigSource,
    deep: bool = False,
    budget: float | None = None,
    dataset: str | None = None,
    config: str | Path | None = None,
    overrides: Iterable[str] = (),
    display: Display | None = None,
) -> Diagnosis:
    """Names the culprit, or says healthy, or says undecided and what would decide; written into a run's diagnosis.json.

    Args:
        target: a config, a run directory, or a folder that another trainer wrote.
        deep: probe longer, on more batches.
        budget: seconds for the probes; 0 asks the rules alone.
        dataset: of a foreign folder: the data that it was trained on.
        config: of a foreign folder: the file that made it.

    Raises:
        InputError: the target is none of these.
    """
    from solotune.diagnosis import run_diagnosis
    from solotune.diagnosis.sources.detect import open_run, run_facts_of

    display = display or SilentDisplay()
    display.phase("reading what is there")
    found = run_diagnosis.examine(run_facts_of(target, overrides, config, dataset), deep, budget, display.phase)
    if run := open_run(target):
        run.write_json("diagnosis.json", found.to_json())
        run.update_manifest("diagnosis.json")
    return found
