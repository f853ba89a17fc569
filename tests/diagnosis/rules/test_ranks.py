"""Faults of runs on several GPUs: what ranks saved and logged, and an epoch that is counted again after a resume."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import FAMILIES

from solotune.diagnosis.rules import ask_all
from solotune.diagnosis.rules.ranks import recounted
from solotune.diagnosis.run_facts import RankCheckpoint, Ranks, RunFacts, Saved, Settings, Trace

LLAMA = FAMILIES["llama"]().to_dict()
PREFIX = "base_model.model."


def run_facts(ranks: Ranks | None = None, settings=None, **parts) -> RunFacts:
    return RunFacts("test", Settings(settings or {}), ranks=ranks, **parts)


def signals(one: RunFacts) -> dict[str, str]:
    """Code -> kind of what is said for F78 to F81."""
    found, unasked = ask_all(one)
    assert not [why for why in unasked.values() if "failed" in why], "no rule stumbles"
    return {s.code: s.kind for s in found if s.code in ("F78", "F79", "F80", "F81")}


def adapter(seed: int = 0, b: float = 1.0, prefix: str = PREFIX) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in range(2):
        path = f"{prefix}model.layers.{layer}.self_attn.q_proj"
        found[f"{path}.lora_A.weight"] = torch.randn(4, 64, generator=generator)
        found[f"{path}.lora_B.weight"] = b * torch.randn(64, 4, generator=generator)
    return found


def edited(tensors, edit):
    return {name: edit(name, tensor) for name, tensor in tensors.items()}


MINE = adapter()
ROUNDED = edited(MINE, lambda name, t: t * (1 + 1e-6 * torch.randn(t.shape, generator=torch.Generator())))
ONE_TENSOR = edited(MINE, lambda name, t: t + 0.01 * t.norm() if "layers.1" in name and "lora_B" in name else t)
SHARDS = {rank: edited(adapter(rank), lambda name, t: t[: len(t) // 2]) for rank in range(2)}


@pytest.mark.parametrize(
    ("adapters", "kind"),
    [
        ({0: MINE, 1: adapter(1)}, "invariant"),
        ({0: MINE, 1: MINE, 2: MINE, 3: ONE_TENSOR}, "invariant"),
        ({0: MINE, 1: adapter(0, b=0.0)}, "invariant"),
        ({0: MINE, 1: edited(MINE, lambda name, t: t * math.nan)}, "invariant"),
        ({0: MINE, 1: dict(MINE)}, None),
        ({0: MINE, 1: ROUNDED}, None),
        (SHARDS, None),  # parts of one adapter
        ({0: MINE, 1: {name: t for name, t in adapter(1).items() if "layers.0" in name}}, None),  # others than mine
        ({0: adapter(0, b=0.0), 1: adapter(0, b=0.0)}, None),  # before the first step
    ],
)
def test_adapters_of_ranks_are_copies_of_one(adapters, kind):
    assert signals(run_facts(Ranks(adapters))).get("F79") == kind


def test_parts_of_a_tensor_are_told_by_the_saved_adapter_and_by_the_model():
    columns = {rank: edited(adapter(rank), lambda n, t: t[:32] if "lora_B" in n else t) for rank in range(2)}
    assert signals(run_facts(Ranks(columns))) == {"F79": "invariant"}, "nothing says that they are parts"
    assert signals(run_facts(Ranks(columns), saved=Saved(MINE, {}))) == {}
    assert signals(run_facts(Ranks(columns), model_config=LLAMA)) == {}
    whole = Ranks({0: MINE, 1: adapter(1)})
    assert signals(run_facts(whole, saved=Saved(MINE, {}), model_config=LLAMA)) == {"F79": "invariant"}


def test_norms_of_shards_differ():
    settings = {"fsdp": "full_shard"}
    assert signals(run_facts(Ranks(logs=logs("param_norm", lambda step: 1.5)), settings)) == {}
    assert signals(run_facts(Ranks(logs=logs("lr", lambda step: 1.5)), settings)) == {"F79": "measured"}


def test_ranks_without_a_trained_adapter_are_counted():
    adapters = {0: MINE, 1: adapter(0, b=0.0), 2: adapter(0, b=0.0)}
    (signal,) = [s for s in ask_all(run_facts(Ranks(adapters)))[0] if s.code == "F79"]
    assert "exactly zero on 2 of 3 ranks (rank 1), and trained on rank 0" in signal.says


def logs(key: str, other, steps: int = 20):
    """Two ranks that log 1.0 and other(step)."""
    return {
        0: [{"step": step, "loss": 2.0, key: 1.0} for step in range(1, steps)],
        1: [{"step": step, "loss": 2.1, key: other(step)} for step in range(1, steps)],
    }


@pytest.mark.parametrize(
    ("key", "other", "kind"),
    [
        ("adapter_norm", lambda step: 1 + step / 100, "measured"),
        ("param_norm", lambda step: 1.5, "measured"),
        ("learning_rate", lambda step: 1 / step, "measured"),
        ("grad_norm", lambda step: 1.5, "remark"),  # perhaps it is logged before the exchange
        ("adapter_norm", lambda step: 1 + 1e-6 * step, None),
        ("adapter_norm", lambda step: 1.01 if step == 7 else 1.0, None),  # the last digit of one
        ("tokens", lambda step: 1.5, None),
    ],
)
def test_what_every_rank_computes_from_the_same_adapter_is_equal(key, other, kind):
    assert signals(run_facts(Ranks(logs=logs(key, other)))).get("F79") == kind


def test_hashes_of_the_adapter_on_each_rank():
    def of(*words):
        return {rank: [{"step": step, "adapter_hash": word} for step in (5, 10)] for rank, word in enumerate(words)}

    assert signals(run_facts(Ranks(logs=of("11", "11", "12")))) == {"F79": "measured"}
    assert signals(run_facts(Ranks(logs=of("11", "11", "11")))) == {}


# --- F80


def test_a_normaliser_of_each_rank_is_a_remark_where_its_tokens_differ():
    def batch(labels):
        ids = torch.arange(3, 23)[None]
        return {"input_ids": ids, "labels": torch.where(torch.arange(20) < 20 - labels, -100, ids)}

    settings = {"average_tokens_across_devices": False, "world_size": 2}
    unequal, equal = [batch(3), batch(12)] * 2, [batch(8)] * 4
    assert signals(run_facts(settings=settings, batches=unequal)) == {"F80": "remark"}
    assert signals(run_facts(settings=settings, batches=equal)) == {}
    assert signals(run_facts(settings={**settings, "world_size": 1}, batches=unequal)) == {}
    assert signals(run_facts(settings={"world_size": 2}, batches=unequal)) == {}


# --- F81


def log_of(parts, digits=None, every=5) -> Trace:
    """A log whose epoch is the step divided by the number of each part: [(last step, steps per epoch), ...]."""
    step = np.arange(every, parts[-1][0] + 1, every)
    per = np.array([next(number for last, number in parts if s <= last) for s in step], float)
    epoch = step / per if digits is None else np.round(step / per, digits)
    flat = np.full(len(step), 2e-4)
    none = np.zeros(0)
    return Trace(step, flat + 1, flat, flat, epoch, none, none, parts[-1][0], True)


@pytest.mark.parametrize("digits", [None, 2, 4])
@pytest.mark.parametrize(("before", "after"), [(100, 50), (50, 100), (120, 90), (37, 74)])
def test_an_epoch_that_is_counted_again_after_a_resume(before, after, digits):
    trace = log_of([(200, before), (400, after)], digits)
    found = recounted(trace)
    assert found is not None and found[0] == 200
    assert found[1:] == pytest.approx((before, after), rel=0.01)
    assert signals(run_facts(trace=trace)) == {"F81": "invariant"}


def test_epochs_of_healthy_runs_are_not_counted_again():
    whole = log_of([(400, 80)], 2)
    assert recounted(whole) is None
    step = whole.step_S.astype(float)
    iterable = np.where(step < 180, step / 400, 1 + (step - 180) / 400)  # its length was not known: epoch of max_steps
    short_last = np.floor(step / 80) + np.minimum(step % 80, 79) / 79  # accumulation does not divide the epoch
    grows = step / 80 + np.maximum(step - 200, 0) / 80  # the batch grows on purpose; the position goes on
    uneven = np.cumsum(np.random.default_rng(0).uniform(0.5, 1.5, len(step))) * 5 / 80  # as many tokens in each batch
    for epoch in (iterable, iterable[:39], short_last, grows, uneven, np.full(len(step), np.nan)):
        part = {name: getattr(whole, name)[: len(epoch)] for name in ("step_S", "loss_S", "learning_rate_S")}
        assert recounted(replace(whole, epoch_S=epoch, **part)) is None
    every_step = log_of([(182, 400)], every=1)
    just_ended = np.where(every_step.step_S < 180, every_step.step_S / 400, 1 + (every_step.step_S - 180) / 400)
    assert recounted(replace(every_step, epoch_S=just_ended)) is None, "three entries say nothing of its speed"


def checkpoints(*parts) -> Ranks:
    return Ranks(checkpoints=[RankCheckpoint(*part) for part in parts])


@pytest.mark.parametrize(
    ("ranks", "kind"),
    [
        (checkpoints((50, 4, 32), (100, 2, 16)), "invariant"),
        (checkpoints((50, 4, None, 1.0), (100, 2, None, 1.0)), "invariant"),  # as many epochs in twice as many steps
        (checkpoints((50, 4, 32), (100, 2, 32)), "remark"),  # twice the accumulation
        (checkpoints((50, 4, None, 1.0), (100, 8, None, 2.0)), "remark"),
        (checkpoints((50, 4), (100, 2)), "remark"),  # the rows of a step are not known
        (checkpoints((50, 4, 32), (100, 4, 32)), None),
        (checkpoints((50, 4)), None),
        (None, None),
    ],
)
def test_checkpoints_of_another_number_of_ranks(ranks, kind):
    assert signals(run_facts(ranks)).get("F81") == kind


# --- names of wrappers


@pytest.mark.parametrize("model_config", [{}, LLAMA], ids=["base unknown", "base known"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("layers.0", "layers.0._orig_mod"),
        (PREFIX, f"{PREFIX}_orig_mod."),
        (PREFIX, f"_orig_mod.{PREFIX}"),
        (PREFIX, f"module.{PREFIX}"),
        (PREFIX, f"{PREFIX}module."),
        ("layers.1", "layers.1._fsdp_wrapped_module"),
        ("layers.1", "layers.1._checkpoint_wrapped_module"),
    ],
)
def test_a_name_with_a_wrapper_in_it_is_not_loaded(old, new, model_config):
    tensors = {name.replace(old, new, 1): tensor for name, tensor in MINE.items()}
    assert signals(run_facts(saved=Saved(tensors, {}), model_config=model_config)) == {"F78": "invariant"}
    assert signals(run_facts(saved=Saved(MINE, {}), model_config=model_config)) == {}


def test_a_model_may_have_a_module_of_this_name():
    tensors = {f"{PREFIX}model.vision.module.fc.lora_A.weight": torch.ones(4, 8)}
    assert signals(run_facts(saved=Saved(tensors, {}))) == {}
