"""What a plan looks at for seconds, looked at once in a process and not in each of its runs."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from solotune.config.run_config import RunConfig
    from solotune.hub.model_files import ModelFiles
    from solotune.planning.layer_profile import ModelShape

READ_BY_SHAPES = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora"),
    *("attn_implementation", "max_length", "multiplies_in_fp8", "bf16", "torch_compile"),
)


def look_once(patch: pytest.MonkeyPatch) -> None:
    """Keep the shape of each model and the speed of this machine: both are four fifths of the time of a tiny run.

    A shape follows from config.json and the config alone; tests of either call `model_shape` and `cpu_gflops` where
    they are defined, and get no shape that is kept.
    """
    from solotune.hub.model_files import resolve_model
    from solotune.planning import plan_inputs

    kept: dict[object, ModelShape] = {}
    look = plan_inputs.model_shape

    def model_shape(config: RunConfig, model_files: ModelFiles | None = None) -> ModelShape:
        files = model_files or resolve_model(config)
        read = [getattr(config, name) for name in READ_BY_SHAPES]
        key = repr([sorted(files.config.items()), *read])
        if key not in kept:
            kept[key] = look(config, files)
        return kept[key]

    patch.setattr(plan_inputs, "model_shape", model_shape)
    patch.setattr(plan_inputs, "cpu_gflops", cache(plan_inputs.cpu_gflops))
