"""P14: only labels that explain both the log and what the model learned are named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from solotune.dataset.example import Example
from solotune.diagnosis.probes import logged_loss
from solotune.diagnosis.probes.logged_loss import GROUPS, Losses, labels_by_the_log
from solotune.diagnosis.probes.skipped import Skipped
from solotune.diagnosis.run_facts import RunFacts, Saved, Settings, Trace
from tests.diagnosis.probed_models import Ward, padded

BATCHES, STEPS = 8, 24
LIVE_STEPS = 100
TOKENS = dict(zip(GROUPS, (90.0, 10.0, 60.0, 40.0, 90.0, 90.0), strict=True))


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Ward:
    return Ward(tmp_path_factory.getbasetemp() / "ward")


def losses(**of_group: float) -> Losses:
    """Losses of groups with the scatter of real batches."""
    by = np.random.default_rng(0).normal(1, 0.02, (BATCHES, 1))
    counts = np.tile([TOKENS[group] for group in GROUPS], (BATCHES, 1))
    return Losses(by * counts * [of_group[group] for group in GROUPS], counts)


def trace_of(first: float, last: float, evaluated: float | None = None) -> Trace:
    steps = np.arange(2, 2 * STEPS + 1, 2)
    logged = np.r_[first, np.full(STEPS - 1, last)]
    held = np.array([] if evaluated is None else [evaluated])
    return Trace(steps, logged, steps * np.nan, steps * np.nan, steps * np.nan, steps[-1:][: len(held)], held, 48, True)


def facts_of(**values: Any) -> RunFacts:
    row = Example(np.arange(5, dtype=np.int32), np.ones(5, bool), "row 1", [{"role": "user", "content": "a"}])
    return RunFacts("a run", Settings(values), train=[row])


BASE = {"answers": 3.0, "ends": 8.0, "prompts": 7.0, "padding": 10.0, "after": 9.0, "before": 9.5}
CLEAN = {"answers": 0.5, "ends": 0.1, "prompts": 7.2, "padding": 10.5, "after": 9.9, "before": 10.0}
WORSE = {**CLEAN, "answers": 8.0, "ends": 9.0}


@pytest.mark.parametrize(
    ("after", "first", "last", "code"),
    [
        (CLEAN, 3.0, 0.46, None),
        (CLEAN | {"prompts": 0.8}, 4.6, 0.6, "F20"),
        (CLEAN | {"prompts": 0.8}, 3.0, 0.46, None),  # prompts are learned beside the answers, and the log is theirs
        (WORSE | {"prompts": 0.4}, 6.6, 0.4, "F23"),
        (WORSE | {"after": 0.6}, 8.2, 0.6, "F22"),
        (WORSE | {"before": 0.1}, 8.2, 0.1, "F22"),
        (WORSE | {"after": 0.6}, 2.8, 0.6, None),  # the log did not begin there
        (CLEAN | {"padding": 5.0}, 5.0, 1.9, "F29"),
        (CLEAN, 5.0, 1.9, None),  # a loss that was too high, and no padding was learned
        (CLEAN | {"ends": 9.0}, 2.8, 0.5, "F19"),
        (CLEAN | {"ends": 9.0}, 3.3, 1.35, None),
    ],
)
def test_labels_that_explain_the_log(after: dict[str, float], first: float, last: float, code: str | None) -> None:
    trace, run_facts = trace_of(first, last), facts_of(assistant_only_loss=True)
    signal = logged_loss._signal(run_facts, trace, losses(**BASE), losses(**after))
    assert (signal and signal.code) == code, signal
    assert signal is None or signal.kind == ("counterfactual" if code in ("F22", "F23") else "measured")


def test_prompts_are_no_fault_unless_answers_were_asked_for() -> None:
    trace, base, end = trace_of(4.6, 0.6), losses(**BASE), losses(**CLEAN | {"prompts": 0.8})
    signal = logged_loss._signal(facts_of(), trace, base, end)
    assert signal is not None and signal.kind == "remark"
    assert logged_loss._signal(facts_of(assistant_only_loss=False), trace, base, end) is None


@pytest.mark.parametrize(("logged", "last", "is_found"), [(2.98, 0.46, True), (0.47, 0.46, False), (1.2, 0.46, False),
                                                          (2.98, 2.9, False)])  # fmt: skip
def test_f47_by_the_loss_of_the_last_evaluation(logged: float, last: float, is_found: bool) -> None:
    signal = logged_loss._evaluated(trace_of(3.0, last, logged), losses(**CLEAN), losses(**CLEAN))
    assert (signal is not None) == is_found


def run_of(ward: Ward, shift: int) -> tuple[Any, RunFacts]:
    """A run whose collator shifted its labels, as its folder shows it: no batches."""
    rows, model = ward.new_rows(24), ward.model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    logged = []
    for step in range(LIVE_STEPS):
        optimizer.param_groups[0]["lr"] = 2e-2 * (1 - step / LIVE_STEPS)
        chosen = [(ids, [*labels[shift:], *[-100] * shift]) for ids, labels in rows[step % 6 :: 6]]
        loss = model(**padded(chosen, pad=0)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        logged.append(float(loss.detach()))
    steps = np.arange(1, LIVE_STEPS + 1)
    none = steps * np.nan
    trace = Trace(steps, np.array(logged), none, none, none, steps[:0], none[:0], LIVE_STEPS, True)
    train = [Example(np.array(ids, np.int32), np.array(labels) >= 0, f"row {n}", [])
             for n, (ids, labels) in enumerate(rows)]  # fmt: skip
    saved = Saved({name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}, {})
    live = ward.live(model, [], is_rebuilt=True)
    return live, ward.run_facts(train=train, trace=trace, saved=saved, settings={"per_device_train_batch_size": 4})


@pytest.mark.parametrize(("shift", "codes"), [(0, []), (1, ["F22"])])
def test_labels_of_a_trained_model(ward: Ward, shift: int, codes: list[str]) -> None:
    live, run_facts = run_of(ward, shift)
    signals, found = labels_by_the_log(live, run_facts, 20.0)
    assert [signal.code for signal in signals] == codes, found
    assert found["batches"] == 6


def test_nothing_is_asked_of_a_run_whose_batches_are_known(ward: Ward) -> None:
    with pytest.raises(Skipped, match="batches of the training are known"):
        labels_by_the_log(ward.live(), ward.run_facts(), 1.0)
