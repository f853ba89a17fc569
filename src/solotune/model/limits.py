"""Limits of the model's passes that a plan has to know too; without torch."""

MLP_CHUNK_TOKENS = 16_384
"""Longer rows go through a checkpointed MLP in parts (`layers.py`): its inner width takes the most memory by far."""
