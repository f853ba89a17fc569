"""Generation in batches: what one prompt alone would give, in smaller batches where memory is short."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from solotune.evaluation import generation
from solotune.evaluation.generation import Generated, generate, generate_all
from solotune.model.loading import load_model

PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9], [11, 12]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_batch_gives_what_each_prompt_gives_alone(tiny_config, family: str) -> None:
    model = load_model(tiny_config(family), torch.device("cpu"), torch.float32)
    alone = [generate(model, prompt, 8, []) for prompt in PROMPTS]
    assert [one.ids for one in generate_all(model, PROMPTS, 8, [], 3)] == alone
    stop = alone[0][3]
    stopped = generate_all(model, PROMPTS, 8, [stop], 4)
    assert stopped[0] == Generated(alone[0][: alone[0].index(stop)], True)
    for one, ids in zip(stopped, alone, strict=True):
        assert one.is_stopped == (stop in ids)
        assert one.ids == (ids[: ids.index(stop)] if stop in ids else ids)


def test_out_of_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def continued(model: Any, prompts: Any, *rest: Any) -> list[Generated]:
        sizes.append(len(prompts))
        if len(prompts) > 1:
            raise torch.cuda.OutOfMemoryError
        return [Generated([prompts[0][0]], True)]

    monkeypatch.setattr(generation, "_continue", continued)
    model: Any = None
    assert [one.ids for one in generate_all(model, PROMPTS, 8, [], 4)] == [[5], [9], [3], [11]]
    assert sizes == [4, 2, 1, 1, 1, 1]
