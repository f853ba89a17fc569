"""Greedy generation, and the tokens that end an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from solotune.model.loading import TrainableModel


def stop_ids(model: TrainableModel, tokenizer: Any, answer_ends: Iterable[int | None]) -> list[int]:
    """Tokens that end an answer: the tokenizer's, the model's, and special tokens among those that end the rows."""
    return stop_ids_of(model.module.generation_config.eos_token_id, tokenizer, answer_ends)


def stop_ids_of(configured: int | list[int] | None, tokenizer: Any, answer_ends: Iterable[int | None]) -> list[int]:
    """The same for a model that is not loaded, from `eos_token_id` of its generation config."""
    ids = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    special = set(tokenizer.all_special_ids)
    ids |= special.intersection(answer_ends)
    return sorted(int(i) for i in ids if i is not None)


@torch.no_grad()
def generate(
    model: TrainableModel, prompt_ids: Sequence[int], max_new_tokens: int, stops: list[int], streamer: Any = None
) -> list[int]:
    """Greedy continuation of a prompt, without its end-of-turn token; the model's mode is restored."""
    was_training = model.module.training
    model.module.eval()
    ids = torch.tensor([list(prompt_ids)], device=model.device)
    continued: Any = model.module.generate  # a mixin's method, which type checkers do not find
    try:
        out = continued(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=stops or None,
            pad_token_id=stops[0] if stops else 0,
            streamer=streamer,
        )
    finally:  # Ctrl-C in a chat stops the answer
        model.module.train(was_training)
    new = out[0, ids.shape[1] :].tolist()
    return [token for token in new if token not in stops]
