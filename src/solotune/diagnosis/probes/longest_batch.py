"""P11: run forward, backward and step on the longest known batch; measure peak memory and seconds.

On CUDA only: on a CPU, torch does not count memory. Costs one step.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.probes.adapter_gradients import learning_rate_of
from solotune.diagnosis.probes.probed_model import (
    device_of,
    on_device,
    optimizer_of,
    restore_model_state,
    trainable_of,
    training_loss,
)
from solotune.diagnosis.probes.skipped import Skipped
from solotune.diagnosis.run_facts import LiveModel, RunFacts
from solotune.units import gib


def longest_first(live: LiveModel, run_facts: RunFacts, budget: float) -> tuple[list[Signal], dict[str, Any]]:
    """P11."""
    device = device_of(live.model)
    if device.type != "cuda":
        raise Skipped("torch counts memory only on CUDA; solotune plan estimates it")
    if not live.batches:
        raise Skipped("no batch is known")
    batch = max(live.batches, key=lambda b: b["input_ids"].numel())
    found: dict[str, Any] = {"places": batch["input_ids"].numel(), "phase": "forward"}
    total = torch.cuda.get_device_properties(device).total_memory
    with restore_model_state(live) as model:
        model.train()
        parameters = trainable_of(model)
        optimizer = optimizer_of(live, parameters, learning_rate_of(run_facts))
        torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        try:
            loss = training_loss(live, on_device(live, batch))
            found["forward_bytes"], found["phase"] = torch.cuda.max_memory_allocated(device), "backward"
            if loss.requires_grad:
                loss.backward()
            found["backward_bytes"], found["phase"] = torch.cuda.max_memory_allocated(device), "step"
            optimizer.step()
            found["step_bytes"], found["phase"] = torch.cuda.max_memory_allocated(device), "done"
        except torch.OutOfMemoryError:
            return _full(found, total), found
        torch.cuda.synchronize(device)
        found |= {"seconds": time.perf_counter() - started, "card_bytes": total}
    return [], found


_BY_PHASE = {"forward": "F72", "backward": "F71", "step": "F70"}


def _full(found: dict[str, Any], total: int) -> list[Signal]:
    says = f"the longest batch ({found['places']:,} tokens with padding) "
    says += f"does not fit into {gib(total, 0)} GiB in its {found['phase']}"
    return [Signal(_BY_PHASE[found["phase"]], "measured", says, 0.6, found)]
