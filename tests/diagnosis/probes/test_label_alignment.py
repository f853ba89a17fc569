"""Which token a loss expects as a label, measured on the loss itself."""

from __future__ import annotations

import pytest
import torch

from solotune.diagnosis.probes.initial_loss import first_loss
from tests.diagnosis.probed_models import Ward, padded

END = 2


@pytest.fixture(scope="module")
def ward(tmp_path_factory):
    return Ward(tmp_path_factory.getbasetemp() / "ward")


def found_by_p1(ward, live):
    signals, found = first_loss(live, ward.run_facts(live.batches), 5.0)
    return {(s.kind, s.against) for s in signals if s.code == "F22"}, found


@pytest.mark.parametrize("own", [0, 2])
def test_a_loss_of_ones_own_that_does_not_shift_once(ward, own):
    """Labels are their tokens, and the loss compares them with the logits of another position: no curve shows it."""

    def loss_of(model, batch):
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
        logits, labels = logits[:, : logits.shape[1] - own], batch["labels"][:, own:]
        return 4 * torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)

    live = ward.live(loss_of=loss_of)
    seen, found = found_by_p1(ward, live)
    assert ("invariant", False) in seen and found["expected_shift"] == 1 - own, found


def test_labels_moved_the_other_way(ward):
    """On a task that is new to the base, correct labels are hardly better: the loss itself shows what it expects."""
    rows = [(ids, [-100, *labels[:-1]]) for ids, labels in ward.new_rows()]
    live = ward.live(batches=[padded(rows[i : i + 4], pad=END) for i in range(0, len(rows), 4)])
    seen, found = found_by_p1(ward, live)
    assert ("invariant", False) in seen and not any(against for _, against in seen), found
