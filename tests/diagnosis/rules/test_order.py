"""S8: rows in an order, repeated by workers, or far longer than the others; and what only looks so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from solotune.dataset import Example
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.row_order import order_of
from solotune.diagnosis.rules import rules
from solotune.diagnosis.run_facts import RunFacts, Settings, Trace


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


def test_a_long_row_of_our_own_run_and_of_a_pack() -> None:
    """A pack has one length, however long its longest row is."""
    ours = {"tool": "solotune"}
    assert [s.kind for s in signals("F42", ours, train=rows([40, 50, 60] * 30 + [900]))] == ["measured"]
    assert [s.kind for s in signals("F42", ours, train=rows([40, 50, 60] * 30 + [450]))] == ["remark"]
    assert not signals("F42", {"packing": True}, train=rows([40, 50, 60] * 30 + [900]))


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


def of_words(topic: int, seed: int) -> Example:
    """A row of 30 tokens, of which a third are those of its topic."""
    random = np.random.default_rng(seed)
    ids = np.r_[random.integers(3, 60, 20), random.integers(100 + 40 * topic, 140 + 40 * topic, 10)].astype(np.int32)
    return Example(ids, np.arange(30) >= 15, f"row {seed}", [])


def test_f40_one_source_after_another() -> None:
    """Rows of equal length: what they are about shows the order; in random order nothing does."""
    joined = [of_words(number // 40, number) for number in range(120)]
    what, found = order_of(RunFacts("test", Settings({}), train=joined))
    assert (what, found) == ("what they are about", 1.0)
    for seed in range(10):
        mixed = [joined[i] for i in np.random.default_rng(seed).permutation(120)]
        assert order_of(RunFacts("test", Settings({}), train=mixed))[1] < 0.4


def test_f40_the_order_is_seen_in_the_batches() -> None:
    own = [of_words(number // 40, number) for number in range(120)]

    def found(order: list[int], **settings: Any) -> list[Signal]:
        ids = torch.tensor(np.array([own[i].input_ids for i in order], np.int64))
        taken = [{"input_ids": part, "labels": part} for part in ids.split(8)]
        return signals("F40", settings, train=own, batches=taken)

    (signal,) = found(list(range(96)))
    assert signal.kind == "measured" and "in the order of the file" in signal.says
    assert not found(np.random.default_rng(0).permutation(120)[:96].tolist())
    assert not found(list(range(96)), curriculum_sampling=True)


def test_f40_the_order_is_seen_in_the_log() -> None:
    """Every epoch has the same ups and downs; with shuffling none has those of another."""
    own, random = [of_words(number // 40, number) for number in range(120)], np.random.default_rng(0)
    step = np.arange(1, 61)
    falling, same = 2 * np.exp(-step / 40), np.tile(random.normal(0, 0.1, 15), 4)
    for change, is_seen in ((same, True), (random.normal(0, 0.1, 60), False)):
        nothing = np.full(60, np.nan)
        trace = Trace(step, falling * np.exp(change), nothing, nothing, step / 15, step[:0], nothing[:0], 60, True)
        assert bool(signals("F40", train=own, trace=trace)) is is_seen


def test_a_curriculum_of_one_epoch_is_a_remark() -> None:
    own = rows(list(range(10, 50)))
    width = max(len(row.input_ids) for row in own)
    taken = []
    for row in own:
        ids, mask = np.zeros(width, np.int64), np.zeros(width, np.int64)
        ids[: len(row.input_ids)], mask[: len(row.input_ids)] = row.input_ids, 1
        taken.append({"input_ids": torch.tensor(ids[None]), "attention_mask": torch.tensor(mask[None])})
    once = {"max_steps": 10, "per_device_train_batch_size": 4}
    assert [s.kind for s in signals("F40", once, train=own, batches=taken)] == ["remark"]
    assert [s.kind for s in signals("F40", {**once, "max_steps": 40}, train=own, batches=taken)] == ["measured"]


def batches(order: list[int]) -> list[dict[str, torch.Tensor]]:
    ids = torch.tensor([[3 + number, 5, 7, 2] for number in order])
    return [{"input_ids": part, "labels": part} for part in ids.split(4)]


def test_f41_repeated_by_workers_and_several_epochs() -> None:
    workers, own = {"dataloader_num_workers": 2}, rows([4] * 40)
    doubled = batches([number // 2 for number in range(32)])
    assert [s.kind for s in signals("F41", workers, train=own, batches=doubled)] == ["invariant"]
    epochs = batches([number % 8 for number in range(32)])
    assert not signals("F41", workers, train=rows([4] * 8), batches=epochs)


def test_f41_some_rows_again_before_all_came() -> None:
    """A shuffled stream in which each row is there four times repeats few of its first rows; the data repeats none."""
    own = [Example(np.array([3 + number, 5, 7, 2], np.int32), np.ones(4, bool), "", []) for number in range(120)]
    order = np.random.default_rng(0).permutation(480)[:72] % 120
    found = signals("F41", {"dataloader_num_workers": 4}, train=own, batches=batches(order.tolist()))
    assert [s.kind for s in found] == ["measured"]
    assert not signals("F41", {"dataloader_num_workers": 4}, train=own, batches=batches(list(range(72))))
    asked = {"dataloader_num_workers": 4, "weighted_sampler": True}
    assert not signals("F41", asked, train=own, batches=batches(order.tolist()))


@pytest.mark.parametrize(("length", "is_found"), [(96, True), (24, False)])
def test_f41_an_epoch_of_the_log_is_longer_than_its_rows(length: int, is_found: bool) -> None:
    """Of an iterable data set: a share of all steps, and one more at its end."""
    step = np.arange(2, 81, 2)
    passed, nothing = (step - 1) // length, np.full(40, np.nan)
    trace = Trace(
        step, nothing, nothing, nothing, passed + (step - passed * length) / 80, step[:0], nothing[:0], 80, True
    )
    settings = {"dataloader_num_workers": 4, "per_device_train_batch_size": 8, "max_steps": 80}
    assert bool(signals("F41", settings, train=rows([9] * 192), trace=trace)) is is_found
