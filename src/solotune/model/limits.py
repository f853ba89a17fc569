"""Limits of the model's passes that the planner also needs; no torch import."""

MLP_CHUNK_TOKENS = 16_384
"""Longer rows go through a checkpointed MLP in parts (`layers.py`): its inner width takes by far the most memory."""
