"""`solotune plan`: predict memory and time of a run before it starts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from solotune.api.python_config import config_of
from solotune.api.ranks import local_size, torchrun_line
from solotune.api.types import ConfigSource, Overrides
from solotune.config.run_config import BUDGET_SIZE, RunConfig
from solotune.display.notebook import showing
from solotune.display.progress import Display
from solotune.errors import InputError, SolotuneError
from solotune.runtime.library_noise import quiet_libraries
from solotune.runtime.world import World

if TYPE_CHECKING:
    from solotune.planning.plan import Plan


@quiet_libraries()
def plan(
    config: ConfigSource,
    overrides: Overrides = (),
    gpu: str | None = None,
    display: Display | None = None,
    host_memory: str | None = None,
    **keys: Any,
) -> Plan:
    """Predict memory and time of a run, and choose settings that fit. Needs no GPU and no weights.

        plan = solotune.plan("run.yaml", gpu="4090")
        print(plan.fits, plan.to_json()["peak_bytes"])

    A run that does not fit is a result, not an error: `plan.fits` is False, and `plan.suggestion()` says what to
    change. So is a fault that would stop the run before its first step: it is in `plan.findings`.

    Args:
        gpu: name of a GPU to plan for (h100, 4090, ...), or of several in one machine (h100x2); default: the one in
            this machine, or under torchrun as many as there are ranks.
        host_memory: free memory of the host, such as `64GiB`, for what is streamed; default: this machine's, or not
            compared for a named GPU.
        keys: keys of the config, as in `solotune.train`.

    Raises:
        InputError: config or model cannot be used, unknown GPU or number of them, a memory_budget larger than its
            memory, or a host_memory that is no size.
    """
    if host_memory is not None and not re.fullmatch(BUDGET_SIZE, host_memory):
        raise InputError("--host-memory: not a size", seen=host_memory, allowed="64GiB, 31.5 GiB or 64GB")
    with showing(display) as chosen:

        def line(count: int) -> str:
            return torchrun_line(count, config, overrides)

        return _plan(config_of(config, overrides, keys), gpu, host_memory, chosen, line)


def _plan(
    config: RunConfig, gpu: str | None, host_memory: str | None, display: Display, line: Callable[[int], str]
) -> Plan:
    from solotune import dataset
    from solotune.diagnosis import certain_faults
    from solotune.diagnosis.data_checks import check_rows
    from solotune.diagnosis.run_facts import RunFacts
    from solotune.diagnosis.sources import solotune_run
    from solotune.hardware import machine as environment
    from solotune.hub.model_files import resolve_model
    from solotune.planning.gpus import cards_named
    from solotune.planning.plan_inputs import for_card, plan_for
    from solotune.planning.planner import bytes_of

    allowed = certain_faults.allowed_codes(config)
    world = World.of_environment(os.environ)
    config = config.on_ranks(world.size if gpu is None else cards_named(gpu).count)
    local_ranks = local_size(world, os.environ) if gpu is None else config.ranks
    machine = environment.probe().shared_by(local_ranks)
    config, choices = environment.resolve_for_machine(config, machine if gpu is None else for_card(gpu, machine))
    model_files = resolve_model(config)
    prepared, tokenizer, notes = None, None, []
    try:
        display.phase("reading data")
        tokenizer = dataset.load_tokenizer(config, model_files)
        prepared = dataset.prepare(config, tokenizer, progress=display.progress)
    except SolotuneError as error:
        notes = [f"the data cannot be read: {error.problem}"]
    display.phase("planning")
    host_bytes = bytes_of(host_memory) if host_memory else None
    found = plan_for(config, machine, prepared, gpu, model_files, host_bytes, local_ranks)
    if gpu is None and config.ranks == 1 and machine.num_gpus > 1 and not config.use_cpu:
        count = machine.num_gpus
        several = plan_for(config.on_ranks(count), machine.shared_by(count), prepared, None, model_files, host_bytes)
        notes += several.compared_with(found, line(count))
    run_facts = RunFacts(config.name, solotune_run.settings_of(found.resolved))
    if prepared is not None and tokenizer is not None:
        known = check_rows(config, tokenizer, prepared, model_files)
        run_facts = solotune_run.from_prepared(found.resolved, tokenizer, prepared, known, model_files)
    return replace(
        found,
        choices=[*choices, *found.choices],
        notes=[*notes, *found.notes],
        findings=[finding.to_json() for finding in certain_faults.of_run(run_facts)],
        allowed=allowed,
    )
