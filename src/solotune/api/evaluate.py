"""`solotune evaluate`: compare the tuned model with its base on the held-out rows."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solotune.api.types import Overrides
from solotune.config.load import load_config, override_values
from solotune.config.write import yaml_value
from solotune.display.notebook import showing
from solotune.display.observer import RunObserver
from solotune.display.progress import Display
from solotune.errors import InputError, program
from solotune.runtime.library_noise import quiet_libraries

if TYPE_CHECKING:
    from solotune.config.run_config import RunConfig
    from solotune.config.settings import EvaluationSettings
    from solotune.dataset import Prepared
    from solotune.evaluation.compare import Evaluation
    from solotune.evaluation.scores import Score
    from solotune.model.loading import TrainableModel


EVALUATION_KEYS = ("metrics", "metrics_rows", "num_samples", "max_new_tokens", "per_device_eval_batch_size")
"""Keys of a run's config that an evaluation may change."""


@quiet_libraries()
def evaluate(run: str | Path, display: Display | None = None, overrides: Overrides = (), **keys: Any) -> Evaluation:
    """Compare the tuned model of a run with its base on the held-out rows; replaces evaluation.json.

        result = solotune.evaluate("runs/demo", metrics=["json"])
        print(result.to_json()["difference"], result.metrics["json_fields"].p_value)

    Args:
        run: a run directory.
        overrides: `key=value` strings, or a mapping of keys: metrics, metrics_rows, num_samples, max_new_tokens and
            per_device_eval_batch_size replace those of the run.
        keys: the same as keywords; they win.

    Raises:
        InputError: there is no run, it held out no rows, or a metric cannot be used.
        IntegrityError: the held-out rows or the base model have changed since the run.
        DeviceError: the GPU failed, or its memory is full.
    """
    with showing(display) as chosen:
        return _evaluate(run, chosen, overrides, keys)


def _evaluate(run: str | Path, display: Display, overrides: Overrides, keys: dict[str, Any]) -> Evaluation:
    from solotune.hardware.gpu_errors import device_errors
    from solotune.training.trained_run import TunedRun

    found = TunedRun.open(run)
    path = found.directory.path
    config = _with_changes(found.config, overrides, keys, display, path)
    display.choices(found.choices)
    display.phase("reading data")
    prepared = found.prepare()
    if not prepared.validation:
        raise InputError(f"{path}: the run held out no rows", change="train with validation_size above 0")
    display.phase("loading model")
    with device_errors(config.memory):
        model = found.load(display.progress)
        result = compare(model, found.tokenizer, prepared, config.evaluation, None, display)
    found.directory.write_json("evaluation.json", result.to_json())
    found.directory.update_manifest("evaluation.json")
    return result


def _with_changes(
    config: RunConfig, overrides: Overrides, keys: dict[str, Any], display: Display, path: Path
) -> RunConfig:
    """The run's config with the user's changes. A Python file that only the run names is not run.

    Raises:
        InputError: a key that is not one of `EVALUATION_KEYS`, or a wrong value.
    """
    named = override_values(overrides) if not isinstance(overrides, Mapping) else dict(overrides)
    changed = {**named, **keys}
    if others := sorted(changed.keys() - set(EVALUATION_KEYS)):
        raise InputError(
            f"evaluate: {others[0]} cannot be changed after the run",
            seen=str(changed[others[0]])[:100],
            allowed=", ".join(EVALUATION_KEYS),
        )
    if changed:
        return load_config(config, (), changed)
    is_code = [isinstance(entry, dict) and "python" in entry for entry in config.metrics]
    if not any(is_code):
        return config
    kept = [entry for entry, is_python in zip(config.metrics, is_code, strict=True) if not is_python]
    all_of_them = yaml_value(config.metrics)
    display.note(
        "metrics: python functions are left out, since a run may come from elsewhere and its file is run; "
        f"to run it: {program()} evaluate {path} {shlex.quote(f'metrics={all_of_them}')}"
    )
    return config.replaced("evaluate", metrics=kept)


def compare(
    model: TrainableModel,
    tokenizer: Any,
    prepared: Prepared,
    settings: EvaluationSettings,
    tuned: Score | None,
    display: RunObserver,
) -> Evaluation:
    """Compare base and tuned on the held-out rows; `tuned`: the score at the end of training, if known."""
    from solotune.evaluation.compare import compare as compare_scores

    return compare_scores(
        model,
        tokenizer,
        prepared.validation,
        settings,
        training_rows=prepared.train,
        rendered_on=prepared.report.day,
        tuned=tuned,
        progress=display.progress,
    )
