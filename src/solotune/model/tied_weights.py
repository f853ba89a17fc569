"""Tied tensors: one parameter under two names, usually the output head and the embedding.

config.json says which tensors are tied (`tie_word_embeddings`), but files may hold both, and different ones: a
fine-tune that trained the head, a merge, a wrong config. transformers 5 ties only what is equal, and so does this
module; a base that is tied anyway would be another one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from solotune.hub.safetensors_header import read_header
from solotune.model.weights import TensorMatch

ROWS = 4096  # compared at a time


def different_ties(
    module: PreTrainedModel, files: list[Path], match: TensorMatch, dtype: torch.dtype
) -> dict[str, str]:
    """Pairs {name: name it is tied to} that config.json ties and of which the files hold two different tensors.

    Args:
        dtype: in which they are compared: the one that the model is loaded in.
    """
    where = {match.names[key]: (path, key) for path in files for key in read_header(path) if key in match.names}
    tied = module.all_tied_weights_keys
    both = {target: source for target, source in tied.items() if target in where and source in where}
    return {target: source for target, source in both.items() if not _equal(where[target], where[source], dtype)}


def untie(module: PreTrainedModel, pairs: dict[str, str]) -> None:
    """Give each name of `pairs` a parameter of its own, whatever config.json says; it may be on the meta device."""
    for name in pairs:
        module.all_tied_weights_keys.pop(name, None)
        owner, _, leaf = name.rpartition(".")
        own = torch.empty_like(module.get_parameter(name))
        module.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(own, requires_grad=False)
    if pairs:
        for config in (module.config, module.config.get_text_config()):
            config.tie_word_embeddings = False


def tie(module: PreTrainedModel, given: set[str]) -> None:
    """Share the parameters that are tied, in the direction of the tensors that the files gave."""
    missing = module.state_dict().keys() - given
    module.tie_weights(missing_keys=set(missing), recompute_mapping=False)


def _equal(one: tuple[Path, str], other: tuple[Path, str], dtype: torch.dtype) -> bool:
    with safe_open(one[0], framework="pt") as first, safe_open(other[0], framework="pt") as second:
        a, b = first.get_slice(one[1]), second.get_slice(other[1])
        if a.get_shape() != b.get_shape():
            return False
        return all(
            torch.equal(a[at : at + ROWS].to(dtype), b[at : at + ROWS].to(dtype))
            for at in range(0, a.get_shape()[0], ROWS)
        )
