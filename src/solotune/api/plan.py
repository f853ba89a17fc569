"""`solotune plan`: predict memory and time of a run before it starts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from solotune.api.python_config import config_of
from solotune.api.types import ConfigSource, Overrides
from solotune.display.progress import Display, SilentDisplay
from solotune.errors import SolotuneError

if TYPE_CHECKING:
    from solotune.planning.planner import Plan


def plan(
    config: ConfigSource, overrides: Overrides = (), gpu: str | None = None, display: Display | None = None, **keys: Any
) -> Plan:
    """Predict memory and time of a run, and choose settings that fit. Needs no GPU and no weights.

        plan = solotune.plan("run.yaml", gpu="4090")
        print(plan.fits, plan.to_json()["peak_bytes"])

    Args:
        gpu: name of a GPU to plan for (h100, 4090, ...); default: the one in this machine.
        keys: keys of the config, as in `solotune.train`.

    Raises:
        InputError: unknown GPU, or a memory_budget larger than its memory.
    """
    checked = config_of(config, overrides, keys)
    from solotune import dataset
    from solotune.hardware import machine as environment
    from solotune.hub.model_files import resolve_model
    from solotune.planning.plan_inputs import for_card, plan_for

    display = display or SilentDisplay()
    machine = environment.probe()
    checked, choices = environment.resolve_for_machine(checked, machine if gpu is None else for_card(gpu, machine))
    model_files = resolve_model(checked)
    prepared, notes = None, []
    try:
        display.phase("reading data")
        tokenizer = dataset.load_tokenizer(checked, model_files)
        prepared = dataset.prepare(checked, tokenizer, progress=display.progress)
    except SolotuneError as error:
        notes = [f"the data cannot be read: {error.problem}"]
    display.phase("planning")
    found = plan_for(checked, machine, prepared, gpu, model_files)
    return replace(found, choices=[*choices, *found.choices], notes=[*notes, *found.notes])
