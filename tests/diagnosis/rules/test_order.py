"""S8: rows in an order, repeated by workers, or far longer than the others; and what only looks so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from solotune.dataset import Example
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.rules import rules
from solotune.diagnosis.run_facts import RunFacts, Settings


def rows(lengths: list[int]) -> list[Example]:
    made = []
    for number, length in enumerate(lengths):
        ids = (3 + (np.arange(length) * 7 + 617 * number) % 1009).astype(np.int32)
        made.append(Example(ids, np.arange(length) >= length // 2, f"row {number}", []))
    return made


def signals(code: str, settings: dict[str, Any] | None = None, **parts: Any) -> list[Signal]:
    known = RunFacts("test", Settings(settings or {}), **parts)
    return [signal for rule in rules()[code] for signal in rule.signals(known)]


MODEL = {"model_type": "llama", "max_position_embeddings": 512}


@pytest.mark.parametrize("config", [MODEL, {"n_positions": 512}, {"text_config": MODEL}])
def test_f42_rows_beyond_the_positions(config: dict[str, Any]) -> None:
    (found,) = signals("F42", train=rows([40] * 38 + [600, 700]), model_config=config)
    assert (found.kind, found.affected, found.fix) == ("invariant", 0.05, "max_length: 512")
    assert not signals("F42", {"max_length": 512}, train=rows([300] * 38 + [600, 700]), model_config=config)


@pytest.mark.parametrize(
    "scaling", [{"factor": 4.0}, {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}]
)
def test_scaled_positions_reach_further(scaling: dict[str, Any]) -> None:
    config = {**MODEL, "rope_scaling": scaling}
    assert not signals("F42", train=rows([300] * 38 + [600, 700]), model_config=config)
    assert signals("F42", train=rows([300] * 39 + [2100]), model_config=config)


def test_f42_one_row_far_longer_than_all_others() -> None:
    (alone,) = signals("F42", train=rows([40, 50, 60] * 30 + [900]))
    assert (alone.kind, alone.affected) == ("measured", pytest.approx(1 / 91))
    assert alone.fix == "max_length: 128"
    assert not signals("F42", {"max_length": 128}, train=rows([40, 50, 60] * 30 + [900]))


def test_a_long_tail_that_goes_on_is_a_remark() -> None:
    tail = [40, 50, 60] * 40 + [300, 420, 500, 640, 900]
    (found,) = signals("F42", train=rows(tail))
    assert found.kind == "remark"
    assert not signals("F42", train=rows([20, 40, 80, 160] * 20))


@pytest.mark.parametrize("count", [20, 40])
def test_f40_order_beyond_chance(count: int) -> None:
    lengths = list(range(10, 10 + count))
    assert signals("F40", {"shuffle": False}, train=rows(lengths))
    for seed in range(20):
        mixed = np.random.default_rng(seed).permutation(lengths).tolist()
        assert not signals("F40", {"shuffle": False}, train=rows(mixed))


def batches(order: list[int]) -> list[dict[str, torch.Tensor]]:
    ids = torch.tensor([[3 + number, 5, 7, 2] for number in order])
    return [{"input_ids": part, "labels": part} for part in ids.split(4)]


def test_f41_repeated_by_workers_and_several_epochs() -> None:
    workers, own = {"dataloader_num_workers": 2}, rows([4] * 40)
    doubled = batches([number // 2 for number in range(32)])
    assert [s.kind for s in signals("F41", workers, train=own, batches=doubled)] == ["invariant"]
    epochs = batches([number % 8 for number in range(32)])
    assert not signals("F41", workers, train=rows([4] * 8), batches=epochs)
