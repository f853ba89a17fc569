"""A model's output head as a function of hidden states, whatever its architecture does there."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solotune.errors import InputError
from solotune.model import loss


class _Hidden(tuple):
    """A decoder's output that holds the last hidden state and answers None for whatever else a model may ask of it."""

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


class _HiddenAsGiven(nn.Module):
    """In the place of a decoder: hands its input embeddings through as the final hidden states."""

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> _Hidden:
        return _Hidden((inputs_embeds,))

    @property
    def decoder(self) -> nn.Module:
        """OPT reaches through its inner model for the decoder."""
        return self


def head_of(module: PreTrainedModel) -> loss.Head:
    """Hidden states to logits exactly as the architecture does it: its own forward, with the decoder taken out.

    Architectures scale, cap or shift their logits in their forward (Gemma's tanh cap, Cohere's and Granite's scale);
    this takes all of it along without knowing any of it. The copy shares every tensor with `module`.
    """
    outer = copy.copy(module)
    outer._modules = dict(module._modules)
    outer._modules[module.base_model_prefix] = _HiddenAsGiven()

    def head(h_ND: torch.Tensor) -> torch.Tensor:
        return outer(inputs_embeds=h_ND[None], use_cache=False).logits[0]

    return head


@torch.no_grad()
def check_head(module: PreTrainedModel, head: loss.Head, device: torch.device) -> None:
    """Logits through `head` must be the model's own, or the loss would be that of another model."""
    vocab = module.config.get_text_config().vocab_size
    ids = torch.arange(1, 6, device=device)[None] % vocab
    module.eval()
    own = module(input_ids=ids, use_cache=False).logits[0]
    ours = head(module.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])
    if not torch.allclose(own, ours, rtol=1e-3, atol=1e-3):
        raise InputError(
            f"{module.config.model_type}: its logits are not a function of the last hidden state alone",
            seen=f"largest difference {(own - ours).abs().max().item():.3g}",
            allowed="a decoder followed by a head",
        )
