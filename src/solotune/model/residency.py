"""Whether 4-bit weights are also kept unpacked."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from solotune.config.run_config import Choice
from solotune.hardware.ram import ram
from solotune.model.frozen_linear import NF4Weight
from solotune.units import gib, mib


def settle_residency(
    module: PreTrainedModel, base_residency: str, dtype: torch.dtype, device: torch.device
) -> list[Choice]:
    """Keep an unpacked copy of the 4-bit weights: if the config says so, or (auto) in a quarter of the free memory."""
    storages = [part for part in module.modules() if isinstance(part, NF4Weight)]
    copy_bytes = sum(part.shape[0] * part.shape[1] for part in storages) * dtype.itemsize
    residency, choices = base_residency, []
    if residency == "auto":
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else ram().free
        residency = "dequantized" if copy_bytes < free / 4 else "quantized"
        reason = f"unpacked weights take {mib(copy_bytes, 0)} MiB of {gib(free, 0)} GiB free"
        reason += ", and save unpacking in every pass" if residency == "dequantized" else ", more than a quarter"
        choices = [Choice("base_residency", residency, reason)]
    if residency == "dequantized":
        for part in storages:
            part.keep_dequantized_copy(dtype)
    return choices
