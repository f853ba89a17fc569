"""`solotune evaluate`: compare the tuned model with its base on the held-out rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from solotune.display.notebook import showing
from solotune.display.progress import Display
from solotune.errors import InputError
from solotune.runtime.library_noise import quiet_libraries

if TYPE_CHECKING:
    from solotune.dataset import Prepared
    from solotune.evaluation.compare import Evaluation
    from solotune.evaluation.scores import Score
    from solotune.model.loading import TrainableModel


@quiet_libraries()
def evaluate(run: str | Path, display: Display | None = None) -> Evaluation:
    """Compare the tuned model of a run with its base on the held-out rows; replaces evaluation.json.

        print(solotune.evaluate("runs/demo").to_json()["difference"])

    Raises:
        InputError: there is no run, or it held out no rows.
        IntegrityError: the held-out rows or the base model have changed since the run.
        DeviceError: the GPU failed, or its memory is full.
    """
    with showing(display) as chosen:
        return _evaluate(run, chosen)


def _evaluate(run: str | Path, display: Display) -> Evaluation:
    from solotune.hardware.gpu_errors import device_errors
    from solotune.training.trained_run import TunedRun

    found = TunedRun.open(run)
    path = found.directory.path
    display.choices(found.choices)
    display.phase("reading data")
    prepared = found.prepare()
    if not prepared.validation:
        raise InputError(f"{path}: the run held out no rows", change="train with validation_size above 0")
    display.phase("loading model")
    with device_errors(found.config.memory):
        result = compare(
            found.load(display.progress),
            found.tokenizer,
            prepared,
            None,
            display,
            batch_size=found.config.per_device_eval_batch_size,
            num_samples=found.config.num_samples,
            max_new_tokens=found.config.max_new_tokens,
        )
    found.directory.write_json("evaluation.json", result.to_json())
    found.directory.update_manifest("evaluation.json")
    return result


def compare(
    model: TrainableModel,
    tokenizer: Any,
    prepared: Prepared,
    tuned: Score | None,
    display: Display,
    *,
    batch_size: int,
    num_samples: int,
    max_new_tokens: int,
) -> Evaluation:
    """Compare base and tuned on the held-out rows; `tuned`: the score at the end of training, if known."""
    from solotune.evaluation.compare import compare as compare_scores

    return compare_scores(
        model,
        tokenizer,
        prepared.validation,
        rendered_on=prepared.report.day,
        batch_size=batch_size,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        tuned=tuned,
        progress=display.progress,
    )
