"""Profile a pass without gradients: held-out losses, and the prompts of generated answers.

Such a pass runs the architecture's own code, uncompiled (`layers._only_with_gradients`): nothing is kept for backward,
so its peak is inside one layer, at the last norm or in the head. The layer runs on fake tensors, and after each
operation the bytes that are alive are noted. The sequence of operations is the same at every length, so each moment is
a polynomial of its own, and the peak at any size is the largest of them. A peak alone would not do: which moment is the
largest changes with the size of the batch, and a product with a 4-bit weight needs that weight unpacked beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solotune.model import loss
from solotune.model.lm_head import head_of
from solotune.planning.curve_fit import LENGTHS, ROWS, IsFrozen, growth_through
from solotune.planning.idle_layers import idle_layers, returns_tuple
from solotune.planning.layer_profile import EvaluationMoment, EvaluationPass, Polynomial
from solotune.planning.profile_eager import Trace, metered

LABELS = 64
"""Labels of the profiled head: their logits are far more than their hidden states."""


def layer_moments(
    layer: nn.Module, calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]], is_frozen: IsFrozen
) -> tuple[EvaluationMoment, ...]:
    """The moments of a layer that may be its peak. Call it within the fake mode of its tensors.

    Args:
        calls: tokens -> the arguments of the layer, for `ROWS` rows.
    """
    traces = []
    with _evaluating(layer):
        for tokens in LENGTHS:
            args, kwargs = calls[tokens]
            with metered(is_frozen) as meter:
                layer(*args, **kwargs)
            traces.append(meter.moments)
    return moments_of(traces)


def evaluation_pass(module: PreTrainedModel, layers: nn.ModuleList, has_causal_mask: bool) -> EvaluationPass:
    """What a pass without gradients needs beside its layers. Call it within the fake mode of the model's tensors.

    Args:
        has_causal_mask: whether real tensors get a mask too; fake ones always do (`model_shape._absent`).
    """
    text = module.config.get_text_config()
    width = text.hidden_size * module.dtype.itemsize
    given, norm = Polynomial(0, 3 * width), (EvaluationMoment(Polynomial(0, 10 * width)),)
    with _evaluating(module):
        with suppress(Exception):  # an architecture that reads its data, as in `model_shape`
            given, norm = _around(module, layers, has_causal_mask)
        per_logit = 8.0
        with suppress(Exception):
            per_logit = _bytes_per_logit(module, text)
    cached, repeated = _cache(text, module.dtype.itemsize)
    return EvaluationPass(given, norm, per_logit, cached * len(layers), cached, repeated)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)


def _around(
    module: PreTrainedModel, layers: nn.ModuleList, has_causal_mask: bool
) -> tuple[Polynomial, tuple[EvaluationMoment, ...]]:
    """What is alive when a layer starts, its input included; and the moments after the last layer."""
    given: list[float] = []
    traces: list[list[Trace]] = []
    gives_tuple = returns_tuple(module, layers)
    for tokens in LENGTHS:
        ids = torch.zeros(ROWS, tokens, dtype=torch.int64)
        starts: list[tuple[float, int]] = []  # of each layer: bytes, and operations before it
        with metered() as meter:

            def starting(*_: Any, meter: Any = meter, starts: Any = starts) -> None:
                starts.append((meter.now, len(meter.moments)))

            with idle_layers(layers, gives_tuple, starting, returns_copies=True):
                module.base_model(input_ids=ids, use_cache=False)
        size, operations = starts[-1]
        given.append(size)
        traces.append(meter.moments[operations:])
    around, norm = _through(given), moments_of(traces)
    if not has_causal_mask:
        around = around._replace(per_token_squared=0.0)
        norm = tuple(one._replace(allocated=one.allocated._replace(per_token_squared=0.0)) for one in norm)
    return around, norm


def _bytes_per_logit(module: PreTrainedModel, text: Any) -> float:
    """The most bytes that the head, the loss and the argmax allocate, for each logit."""
    hidden = torch.empty(LABELS, text.hidden_size, dtype=module.dtype)
    labels = torch.zeros(LABELS, dtype=torch.int64)
    head: Callable[[torch.Tensor], torch.Tensor] = head_of(module)
    with metered() as meter:
        loss.token_losses(hidden, labels, head, text.vocab_size)
    return meter.most / (LABELS * text.vocab_size)


def _cache(text: Any, itemsize: int) -> tuple[int, int]:
    """Bytes of a token's keys and values in one layer: as they are kept, and repeated for all query heads."""
    heads = getattr(text, "num_attention_heads", None) or 1
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    sizes = [getattr(text, name, None) or size for name in ("qk_head_dim", "v_head_dim")]
    kept = getattr(text, "num_key_value_heads", None) or heads
    return kept * sum(sizes) * itemsize, heads * sum(sizes) * itemsize if kept < heads else 0


def moments_of(traces: Sequence[Sequence[Trace]]) -> tuple[EvaluationMoment, ...]:
    """Fit each moment of passes at `LENGTHS`; those that another one exceeds at every size are left out."""
    if len({len(trace) for trace in traces}) > 1:  # other operations at other lengths: the largest of each are left
        traces = [[Trace(max(one.size for one in trace), max(one.weights for one in trace), False)] for trace in traces]
    found = [
        EvaluationMoment(_through([one.size for one in same]), same[0].weights, same[0].is_attention)
        for same in zip(*traces, strict=True)
    ]
    found.sort(key=lambda one: (one.allocated.at(ROWS, LENGTHS[-1]), one.weights, one.is_attention), reverse=True)
    kept: list[EvaluationMoment] = []
    for one in found:
        if not any(_is_more(other, one) for other in kept):
            kept.append(one)
    return tuple(kept)


def _is_more(one: EvaluationMoment, than: EvaluationMoment) -> bool:
    is_larger = all(a >= b for a, b in zip(one.allocated, than.allocated, strict=True))
    return is_larger and one.weights >= than.weights and one.is_attention >= than.is_attention


def _through(values: Sequence[float]) -> Polynomial:
    constant, per_token, squared = growth_through(LENGTHS, values)
    return Polynomial(constant, per_token / ROWS, squared / ROWS)
