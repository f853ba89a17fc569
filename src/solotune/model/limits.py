"""Limits of the model's passes that the planner also needs; no torch import."""

from __future__ import annotations

from typing import Literal

MLP_CHUNK_TOKENS = 16_384
"""Longer rows go through a checkpointed MLP in parts (`layers.py`): its inner width takes by far the most memory."""

RING_SLOTS = 2
"""Streamed layers that are on the card at a time (`layer_ring`): one computes while the next one arrives."""


def offloaded_layers(base_offload: bool | int | Literal["auto"], depth: int) -> list[int]:
    """Numbers of the layers whose frozen weights are in host memory, spread evenly; none for `auto`."""
    wanted = 0 if base_offload == "auto" else depth * base_offload if isinstance(base_offload, bool) else base_offload
    count = min(wanted, depth)
    return [number * depth // count for number in range(count)]
