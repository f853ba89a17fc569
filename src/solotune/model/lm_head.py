"""A model's output head as a function of hidden states, for any architecture."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solotune.errors import InputError
from solotune.model import loss
from solotune.units import first_line


class _Hidden(tuple):
    """A decoder's output with the last hidden state; every other attribute is None."""

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


class _HiddenAsGiven(nn.Module):
    """Replaces a decoder: returns its input embeddings as the final hidden states."""

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> _Hidden:
        return _Hidden((inputs_embeds,))

    @property
    def decoder(self) -> nn.Module:
        """OPT takes its decoder from the inner model."""
        return self


def head_of(module: PreTrainedModel) -> loss.Head:
    """Map hidden states to logits exactly as the architecture does: its own forward, without the decoder.

    Architectures scale, cap or shift their logits in their forward (Gemma's tanh cap, Cohere's and Granite's scale);
    this includes all of it without special cases. The copy shares every tensor with `module`.
    """
    outer = copy.copy(module)
    outer._modules = dict(module._modules)
    outer._modules[module.base_model_prefix] = _HiddenAsGiven()

    def head(h_ND: torch.Tensor) -> torch.Tensor:
        return outer(inputs_embeds=h_ND[None], use_cache=False).logits[0]

    return head


@torch.no_grad()
def check_head(module: PreTrainedModel, head: loss.Head, device: torch.device) -> None:
    """Check that `head` gives the model's own logits; otherwise the loss would belong to another model.

    Raises:
        InputError: they differ, or the model cannot run on token ids alone with frozen linears.
    """
    vocab = module.config.get_text_config().vocab_size
    ids = torch.arange(1, 6, device=device)[None] % vocab
    module.eval()
    try:
        expected = module(input_ids=ids, use_cache=False).logits[0]
        logits = head(module.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])
    except torch.OutOfMemoryError:
        raise
    # code of any architecture: it may need other inputs, or read the weight of a linear instead of calling it
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{module.config.model_type}: this architecture cannot be trained here",
            seen=f"its forward pass fails: {first_line(error)}"[:200],
            allowed="a decoder that takes token ids, and calls its linear layers",
            change="use a model of another architecture",
        ) from error
    if not torch.allclose(expected, logits, rtol=1e-3, atol=1e-3):
        raise InputError(
            f"{module.config.model_type}: its logits depend on more than the last hidden state",
            seen=f"logits differ by up to {(expected - logits).abs().max().item():.3g}",
            allowed="a decoder followed by an output head",
        )
