"""A model whose layers do nothing."""

from __future__ import annotations

import pytest
import torch

from solotune.model.loading import load_model
from solotune.planning.idle_layers import idle_layers, returns_tuple

IDS = torch.ones(2, 8, dtype=torch.int64)


@pytest.mark.parametrize("copies", [False, True])
def test_layers_pass_their_input_on_and_run_again_afterwards(copies, tiny_config):
    model = load_model(tiny_config(), torch.device("cpu"), torch.float32)
    inner, seen = model.module.base_model, []
    model.module.eval()
    with torch.no_grad():
        before = inner(input_ids=IDS, use_cache=False).last_hidden_state
        gives_tuple = returns_tuple(model.module, model.layers)
        with idle_layers(model.layers, gives_tuple, lambda args, _: seen.append(args[0]), returns_copies=copies):
            idle = inner(input_ids=IDS, use_cache=False).last_hidden_state
    assert torch.equal(idle, inner.norm(inner.embed_tokens(IDS)))
    assert len(seen) == len(model.layers)
    assert (seen[0].data_ptr() != seen[1].data_ptr()) == copies
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(idle, before)
