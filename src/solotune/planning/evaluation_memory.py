"""Bytes at the peak of an evaluation and of generated answers: passes without gradients.

    evaluation   given + one layer                    one pass of B rows: `profile_evaluation` has each moment
                 given + last norm
                 hidden states + those of N labels + a chunk of logits
    answers      cache of B prompts + one layer    the prompts' own pass, with a mask if prompts are padded
                 cache of B whole answers + the keys of one layer + logits of B tokens

Nothing is kept for backward, so depth does not count, but for the cache. What counts is a layer's inner width: training
holds it once and in compiled kernels, here PyTorch's own operations hold SwiGLU's three or four times. And the logits:
held-out losses are computed by operations on float32 (8 bytes a logit), training's in one compiled kernel (4 or 6).

    cache = 2 (keys, values) x layers x heads that have keys x head size x (prompt + new tokens) x B

Sources: `evaluation.scores`, `evaluation.generation`, `model.loss.token_losses`; in transformers `DynamicLayer.update`
(joins by `torch.cat`, so the keys of a layer are there twice), `sdpa_attention_forward` (with a mask it repeats keys
and values for all query heads, but for a single token).

What frozen layers need on the card (the base, a ring's slots) is the same as in training, and adapters and gradients
are there too; the optimizer's state is during the run, when losses are measured, and is not when answers are generated.

Shape legend: B rows, T tokens, P tokens of a prompt, N supervised tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from solotune.planning.layer_profile import EvaluationMoment, ModelShape, Workload


class Moment(NamedTuple):
    """Bytes at one moment, beside what is always there."""

    name: str
    activations: float
    logits: float = 0.0
    unpacked: float = 0.0  # a 4-bit weight while it is multiplied

    @property
    def size(self) -> float:
        return self.activations + self.logits + self.unpacked


def evaluation_moment(shape: ModelShape, work: Workload, bytes_per_weight: float) -> Moment:
    """The peak of the largest evaluation pass.

    Args:
        bytes_per_weight: of a base weight that is unpacked for each product; 0: none is.
    """
    rows, tokens = work.eval_batch
    if not rows:
        return Moment("evaluation", 0.0)
    labels = eval_labels(work)
    states = shape.dtype_bytes * shape.hidden_size * (rows * tokens + labels)
    head = Moment("evaluation", states, evaluation_logits(shape, labels))
    return max(head, _body(shape, rows, tokens, bytes_per_weight), key=lambda moment: moment.size)


def evaluation_on_cpu(shape: ModelShape, work: Workload) -> Moment:
    """The same on a CPU, where the resident set is predicted: it keeps what the heap has freed of the layers before."""
    chunk = max(1, shape.max_chunk_logits // shape.vocab_size)
    labels = min(chunk, work.eval_batch[0] * work.eval_batch[1] * work.supervised_share)
    copies = 3 if shape.dtype_bytes == 4 else 2.5  # of float32: the logits as computed, in float32, and their softmax
    one_layer = shape.layers[0].forward_peak.at(*work.eval_batch)
    return Moment("evaluation", 0.0, max(labels * shape.vocab_size * 4 * copies, one_layer))


def eval_labels(work: Workload) -> float:
    """N of the largest evaluation pass, or more: its rows times the most of one row."""
    rows, tokens = work.eval_batch
    return rows * (tokens * min(1.0, work.supervised_share) if work.eval_labels is None else work.eval_labels)


def evaluation_logits(shape: ModelShape, labels: float) -> float:
    """Bytes of a chunk of logits, and of what the loss makes of them without gradients."""
    chunk = max(1, shape.max_chunk_logits // shape.vocab_size)
    return min(labels, chunk) * shape.vocab_size * shape.evaluation.logit_bytes


def answers_moment(shape: ModelShape, work: Workload, bytes_per_weight: float) -> Moment:
    """The peak while answers are generated together: at their prompts, or at their last tokens.

    Args:
        bytes_per_weight: as of `evaluation_moment`.
    """
    rows, prompt, new = work.answers
    if not rows:
        return Moment("answers", 0.0)
    cost = shape.evaluation
    first = _body(shape, rows, prompt, bytes_per_weight, is_padded=rows > 1)
    first = first._replace(activations=first.activations + rows * prompt * cost.cache)
    last = _body(shape, rows, 1, bytes_per_weight)
    cached = rows * (prompt + new) * (cost.cache + cost.layer_cache / 2)
    logits = rows * shape.vocab_size * (shape.dtype_bytes + 4.0)  # as computed, and in float32
    last = last._replace(activations=last.activations + cached, logits=logits)
    return max(first, last, key=lambda moment: moment.size)._replace(name="answers")


def _body(shape: ModelShape, rows: int, tokens: int, bytes_per_weight: float, is_padded: bool = False) -> Moment:
    """The peak between the embedding and the head, both left out.

    Args:
        is_padded: rows have a mask (B, 1, T, T) of bools; attention has it as numbers too, and repeats keys and values.
    """
    cost, square = shape.evaluation, rows * tokens * tokens * is_padded
    given = cost.given.at(rows, tokens) + square
    attending = is_padded * rows * tokens * cost.repeated + square * shape.dtype_bytes
    found = [Moment("evaluation", one.allocated.at(rows, tokens) + square) for one in cost.norm]
    for one in _moments_of_layers(shape):
        unpacked = one.weights * bytes_per_weight
        allocated = given + one.allocated.at(rows, tokens) + one.is_attention * attending
        found.append(Moment("evaluation", allocated, 0.0, unpacked))
    return max(found, key=lambda moment: moment.size)


def _moments_of_layers(shape: ModelShape) -> Iterator[EvaluationMoment]:
    """Of each kind of layer; of one that could not be profiled, its forward with its widest weight unpacked."""
    for layer in {id(layer): layer for layer in shape.layers}.values():
        widest = max((linear.weights for linear in shape.linears), default=0)
        yield from layer.evaluation or [EvaluationMoment(layer.forward_peak, widest)]
