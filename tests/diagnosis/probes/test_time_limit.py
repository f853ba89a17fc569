"""The probes end within their budget, however slow the model is. Time is counted by the passes of the model."""

from __future__ import annotations

import time

import pytest
import torch

from solotune.diagnosis import probes
from solotune.diagnosis.probes.time_limit import OutOfTime, TimeLimit
from tests.diagnosis.probed_models import Ward

BUDGET = 20.0


@pytest.fixture(scope="module")
def ward(tmp_path_factory):
    return Ward(tmp_path_factory.getbasetemp() / "ward")


class Clock:
    """A clock on which only the decoder layers take time: forward, and twice as much in backward."""

    def __init__(self, seconds: float, each_token: float = 0.0) -> None:
        self.now, self.seconds, self.each_token = 0.0, seconds, each_token

    def __call__(self) -> float:
        return self.now

    def slow_down(self, model: torch.nn.Module) -> None:
        layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
        for layer in layers:
            layer.register_forward_hook(self._forward)

    def _forward(self, _layer, inputs, output):
        hidden = inputs[0]
        cost = self.seconds + self.each_token * hidden.shape[0] * hidden.shape[1]
        self.now += cost
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _gradient: self._backward(cost))

    def _backward(self, cost: float) -> None:
        self.now += 2 * cost


@pytest.mark.parametrize(("seconds", "each_token"), [(0.001, 0.0), (0.05, 0.0), (0.4, 0.0), (2.0, 0.0), (0.0, 0.01)])
def test_the_budget_is_kept_by_a_model_of_any_speed(ward, monkeypatch, seconds, each_token):
    model, clock = ward.model(), Clock(seconds, each_token)
    clock.slow_down(model)

    def evaluate(module):
        with torch.no_grad():
            return float(module.eval()(**live.batches[0]).loss)

    live = ward.live(model, backward=lambda m, batches: [m(**b).loss.backward() for b in batches], evaluate=evaluate)
    monkeypatch.setattr(time, "perf_counter", clock)
    seen: list[tuple[int, int, str]] = []
    found = probes.run_all(live, ward.run_facts(), BUDGET, progress=lambda *told: seen.append(told))
    assert clock.now <= 1.1 * BUDGET, found.cost
    count = sum(not probe.of_ranks for probe in probes.PROBES)
    assert seen == [(number, count, "probes") for number in range(count)]
    assert "P4" in found.cost and "P4" not in found.skipped
    for_time = {probe for probe, why in found.skipped.items() if "left" in why or "s is used up" in why}
    if seconds == 0.001:
        assert not for_time, found.skipped
    if seconds == 2.0:  # the whole range test would take minutes: it does not begin
        assert "P7" in for_time and found.cost.get("P7") is None
    if seconds == 0.05:
        assert "P7" in found.measurements, found.skipped


def test_a_pass_that_would_end_too_late_does_not_begin(ward):
    model = ward.model()
    batch = ward.live(model).batches[0]
    with TimeLimit.on(model, 1.0) as limit, torch.no_grad():
        assert limit.seconds_of(1, 0) is None  # nothing was timed
        model(**batch)
        limit.close()
        forward, step = limit.seconds_of(1, 0), limit.seconds_of(0, 1)
        assert forward and step and step > 2 * forward
        limit.passes[False] = dict.fromkeys(limit.passes[False], 100.0)
        with pytest.raises(OutOfTime, match=r"100\.0 s"):
            model(**batch)
    model(**batch)  # outside, nothing is limited


def test_the_first_pass_is_not_begun_if_it_takes_longer_than_the_budget(ward, monkeypatch):
    """Its backward pass could not be stopped; two passes over a few tokens show what it would take."""
    model, clock = ward.model(), Clock(0.0, 0.01)
    clock.slow_down(model)
    long = ward.live(model).batches[0]
    long = {name: tensor.repeat(1, 40) for name, tensor in long.items()}
    monkeypatch.setattr(time, "perf_counter", clock)
    found = probes.run_all(ward.live(model, [long]), ward.run_facts(), BUDGET)
    assert clock.now <= 1.1 * BUDGET, found.cost
    assert found.cost["P4"] < 1.0 and "a pass takes about" in found.skipped["P4"]
