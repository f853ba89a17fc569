"""`solotune diagnose`: find out what is wrong with a run, if anything."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from solotune.api.report import keep_result
from solotune.api.types import ConfigSource
from solotune.display.notebook import showing
from solotune.display.progress import Display
from solotune.runtime.library_noise import quiet_libraries

if TYPE_CHECKING:
    from solotune.diagnosis.evidence import Diagnosis


@quiet_libraries()
def diagnose(
    target: ConfigSource,
    deep: bool = False,
    budget: float | None = None,
    dataset: str | None = None,
    config: str | Path | None = None,
    overrides: Iterable[str] = (),
    display: Display | None = None,
    base: str | None = None,
) -> Diagnosis:
    """Find the cause of a bad run. For a solotune run, the result is saved in its diagnosis.json too, and
    shown in its report.html.

        diagnosis = solotune.diagnose("runs/demo")
        print(diagnosis.verdict)  # fault, healthy or undecided
        for culprit in diagnosis.culprits:
            print(culprit.fault, culprit.slug, culprit.fix)
        for remark in diagnosis.remarks:  # true of the run, no harm measured
            print(remark.fault, remark.says)

    Args:
        target: a config, a run directory, or the output folder or a log of another trainer. Data, config and base that
            lie in such a folder or beside it are found; `diagnosis.found` says what was.
        deep: experiment longer, on more batches.
        budget: time limit in seconds for the experiments on the model (probes); 0 skips them.
        dataset: the training data (only for folders of other trainers).
        config: the config used for training (only for folders of other trainers).
        base: the base model (only for folders of other trainers): models, data and files outside that such a folder
            names are not opened and not looked up.

    Raises:
        InputError: the target is not a config, a run, or a trainer's output folder or log.
        StorageError: the disk is full. In a folder that may only be read nothing is saved, and a note says so.
    """
    from solotune.diagnosis import run_diagnosis
    from solotune.diagnosis.sources.detect import open_run, run_facts_of

    with showing(display) as chosen:
        chosen.phase("reading config, run and files")
        facts = run_facts_of(target, overrides, config, dataset, base)
        found = run_diagnosis.examine(facts, deep, budget, chosen.phase, chosen.progress)
        if run := open_run(target):
            keep_result(run, "diagnosis.json", found.to_json(), chosen)
    return found
