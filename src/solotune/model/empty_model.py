"""Build a model from config.json without memory for its weights, and check a model folder against it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from solotune.config.run_config import RunConfig
from solotune.config.settings import BatchSettings
from solotune.errors import InputError
from solotune.hub.hf_config import architecture_of
from solotune.hub.model_files import ModelFiles
from solotune.model.weight_files import weight_files
from solotune.model.weights import match_names
from solotune.units import first_line


def _check_positions(architecture: PreTrainedConfig, batches: BatchSettings) -> None:
    """Longer rows than the model's context fail inside it (absolute positions) or give noise (RoPE)."""
    positions = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    if positions and 0 < positions < batches.max_length:
        raise InputError(
            f"{batches.source_of('max_length')}, max_length: larger than this model's context length",
            seen=f"max_length: {batches.max_length}",
            allowed=f"at most {positions} (max_position_embeddings in config.json)",
            change=f"max_length: {positions}",
        )


def empty_model(
    model_files: ModelFiles, attn_implementation: str, batches: BatchSettings, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, str]:
    """Build a model without weights; returns it and its attention implementation: the one asked for, or eager.

    Raises:
        InputError: transformers has no such architecture, or rows would be longer than its positions.
    """
    folder = model_files.folder
    architecture = architecture_of(folder, model_files.config)
    _check_positions(architecture, batches)
    try:
        return _built_empty(architecture, folder, attn_implementation, dtype, device), attn_implementation
    except _NoSuchAttention:
        return _built_empty(architecture, folder, "eager", dtype, device), "eager"


def check_model(config: RunConfig, model_files: ModelFiles) -> None:
    """Check a local model folder before any work is done; weights of a hub id are not downloaded for this.

    Raises:
        InputError: as `load_model`, except for numbers that are not finite.
    """
    if model_files.is_local:
        module, _ = empty_model(
            model_files, config.attn_implementation, config.batches, torch.float32, torch.device("cpu")
        )
        match_names(module, weight_files(model_files.folder))


class _NoSuchAttention(Exception):
    """The architecture does not have the requested attention implementation."""


def _built_empty(
    architecture: PreTrainedConfig, folder: Path, attention: str, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Build the architecture with parameters on the meta device and computed buffers (rotary tables) in memory."""
    try:
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(
                architecture, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
    except (ValueError, ImportError) as error:
        reason = first_line(error)
        if "does not support an attention implementation" in reason:
            raise _NoSuchAttention from None
        raise InputError(
            f"{folder}: transformers has no causal language model for this architecture",
            seen=f"model_type {architecture.model_type}: {reason}",
        ) from None
    with torch.no_grad():
        _compute_buffers(module, module, device)
    return module


def _compute_buffers(part: nn.Module, owner: PreTrainedModel, device: torch.device) -> None:
    """Fill the tables that are computed, not stored; `owner` is the innermost model of transformers around `part`."""
    owner = part if isinstance(part, PreTrainedModel) else owner
    for child in part.children():
        _compute_buffers(child, owner, device)
    computed = part._non_persistent_buffers_set & part._buffers.keys()
    for name in computed:
        if (buffer := part._buffers[name]) is not None and buffer.is_meta:
            part._buffers[name] = torch.empty_like(buffer, device=device)
    if computed:
        owner._init_weights(part)  # fills the tables; parameters are on meta and stay unchanged
