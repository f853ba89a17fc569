"""Greedy generation, one prompt or a batch, and the tokens that end an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from solotune.model.loading import TrainableModel
from solotune.runtime import signals


class Generated(NamedTuple):
    """A generated answer."""

    ids: list[int]  # without the token that ended it
    is_stopped: bool  # ended by a stop token, not by `max_new_tokens`


def stop_ids(model: TrainableModel, tokenizer: Any, answer_ends: Iterable[int | None]) -> list[int]:
    """Tokens that end an answer: the tokenizer's, the model's, and special tokens among those that end the rows."""
    return stop_ids_of(model.module.generation_config.eos_token_id, tokenizer, answer_ends)


def stop_ids_of(configured: int | list[int] | None, tokenizer: Any, answer_ends: Iterable[int | None]) -> list[int]:
    """The same for a model that is not loaded, from `eos_token_id` of its generation config."""
    ids = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    special = set(tokenizer.all_special_ids)
    ids |= special.intersection(answer_ends)
    return sorted(int(i) for i in ids if i is not None)


def generate(
    model: TrainableModel, prompt_ids: Sequence[int], max_new_tokens: int, stops: list[int], streamer: Any = None
) -> list[int]:
    """Greedy continuation of a prompt, without its end-of-turn token; the model's mode is restored."""
    return _continue(model, [prompt_ids], max_new_tokens, stops, streamer)[0].ids


def generate_all(
    model: TrainableModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stops: list[int],
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Generated]:
    """Greedy continuations of prompts, in batches of similar length; smaller batches where memory is short.

    Args:
        progress: called with the number of prompts that are done.
    """
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable").tolist()
    answers: dict[int, Generated] = {}
    while len(answers) < len(order):
        signals.check_stop()
        chosen = order[len(answers) : len(answers) + batch_size]
        try:
            found = _continue(model, [prompts[i] for i in chosen], max_new_tokens, stops)
        except torch.cuda.OutOfMemoryError:
            if len(chosen) == 1:
                raise
            torch.cuda.empty_cache()
            batch_size = len(chosen) // 2
            continue
        answers |= dict(zip(chosen, found, strict=True))
        progress(len(answers))
    return [answers[i] for i in range(len(order))]


@torch.no_grad()
def _continue(
    model: TrainableModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stops: list[int],
    streamer: Any = None,
) -> list[Generated]:
    """Continue prompts of any lengths, padded on the left."""
    was_training = model.module.training
    model.module.eval()
    longest = max(map(len, prompts))
    pad = stops[0] if stops else 0
    ids_BT = torch.tensor([[pad] * (longest - len(one)) + list(one) for one in prompts], device=model.device)
    mask_BT = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts], device=model.device)
    continued: Any = model.module.generate  # a mixin's method, which type checkers do not find
    try:
        out = continued(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=stops or None,
            pad_token_id=pad,
            streamer=streamer,
        )
    finally:  # Ctrl-C in a chat stops the answer
        model.module.train(was_training)
    return [_until_stop(row, stops) for row in out[:, longest:].tolist()]


def _until_stop(ids: list[int], stops: list[int]) -> Generated:
    """The ids before the first stop token."""
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    return Generated(ids[:end], end is not None)
