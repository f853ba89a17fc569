"""Cross-entropy of the loss tokens, without logits for other tokens and without all logits at once.

    loss_n = logsumexp(z_n) - z_n[label_n]       z_n = head(h_n)      for loss tokens n only

Why in chunks
-------------
An 8B model's logits for 4 x 2,048 tokens are 2 GiB in bfloat16 and twice that again in float32; a chat row needs the
loss for perhaps a third of them. So prompt positions never reach the head, and the rest goes through it in chunks. The
forward pass of a chunk also computes dloss_n/dh_n: all that backward needs (the head is frozen), and as small as h.
There is one loss for each token, so the caller can weight them, sum them over rows, or find a bad row.

`token_losses_reference` is the definition: full logits and PyTorch's own cross-entropy.

Shape legend: B rows, T tokens, N loss tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Head = Callable[[torch.Tensor], torch.Tensor]  # h_ND -> logits_NV

MAX_CHUNK_LOGITS = 1 << 27  # 0.5 GiB in float32, 1,046 tokens for a vocabulary of 128,256; larger chunks are not faster


def supervised_hidden(hidden_BTD: torch.Tensor, input_ids_BT: torch.Tensor, label_mask_BT: torch.Tensor):
    """Hidden states that predict a loss token, and those tokens: (h_ND, labels_N).

    The state at t-1 predicts the token at t.
    """
    predicts = label_mask_BT[:, 1:]
    return hidden_BTD[:, :-1][predicts], input_ids_BT[:, 1:][predicts]


def _losses_and_correct(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses, and whether the label is the most likely token."""
    logits_NV = logits_NV.float()
    return F.cross_entropy(logits_NV, labels_N, reduction="none"), logits_NV.argmax(-1) == labels_N


def _with_gradient(logits_NV: torch.Tensor, labels_N: torch.Tensor):
    """The same, and dloss_n/dlogits_n = softmax(z_n) - onehot(label_n), in the dtype of the logits."""
    log_p_NV = F.log_softmax(logits_NV.float(), dim=-1)
    is_label_NV = torch.arange(log_p_NV.shape[1], device=log_p_NV.device) == labels_N[:, None]
    losses_N = -log_p_NV.gather(1, labels_N[:, None])[:, 0]
    grad_NV = (torch.exp(log_p_NV) - is_label_NV.float()).to(logits_NV.dtype)
    return losses_N, log_p_NV.argmax(-1) == labels_N, grad_NV


_with_gradient_compiled = torch.compile(_with_gradient, dynamic=True)  # one pass over the logits instead of nine


class _ChunkedLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: torch.Tensor, labels_N: torch.Tensor, head: Head, chunk: int, is_compiled: bool):
        fused = _with_gradient_compiled if is_compiled else _with_gradient
        losses, correct, grads = [], [], []
        for h_part, labels in zip(h_ND.split(chunk), labels_N.split(chunk), strict=True):
            with torch.enable_grad():
                h = h_part.detach().requires_grad_()
                logits = head(h)
            loss_N, correct_part_N, grad_NV = fused(logits.detach(), labels)
            (dh,) = torch.autograd.grad(logits, h, grad_NV)
            losses.append(loss_N)
            correct.append(correct_part_N)
            grads.append(dh)
        ctx.save_for_backward(torch.cat(grads))
        correct_N = torch.cat(correct)
        ctx.mark_non_differentiable(correct_N)
        return torch.cat(losses), correct_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        dloss_N = grad_outputs[0]
        (dh_ND,) = ctx.saved_tensors
        return (dh_ND * dloss_N[:, None]).to(dh_ND.dtype), None, None, None, None


def token_losses(h_ND: torch.Tensor, labels_N: torch.Tensor, head: Head, vocab_size: int, *, is_compiled: bool = False):
    """Loss of each loss token (float32, differentiable in h), and whether its label is the argmax.

    Args:
        h_ND: hidden states after the final norm, in the model's dtype.
        labels_N: int64 token ids.
        head: hidden states to logits; frozen.
        vocab_size: V, which sets the size of a chunk.
        is_compiled: compile what follows the head into one kernel.

    Returns: (losses_N, correct_N).
    """
    if not len(labels_N):
        return h_ND.sum(-1).float(), labels_N == 0
    chunk = max(1, MAX_CHUNK_LOGITS // vocab_size)
    if torch.is_grad_enabled() and h_ND.requires_grad:
        return _ChunkedLosses.apply(h_ND, labels_N, head, chunk, is_compiled)
    parts = [
        _losses_and_correct(head(h), labels) for h, labels in zip(h_ND.split(chunk), labels_N.split(chunk), strict=True)
    ]
    return torch.cat([losses for losses, _ in parts]), torch.cat([correct for _, correct in parts])


def token_losses_reference(logits_BTV: torch.Tensor, input_ids_BT: torch.Tensor, label_mask_BT: torch.Tensor):
    """The same losses from full logits, losses_N: the plain definition, differentiable by autograd."""
    logits_NV, labels_N = supervised_hidden(logits_BTV, input_ids_BT, label_mask_BT)
    return F.cross_entropy(logits_NV.float(), labels_N, reduction="none")
