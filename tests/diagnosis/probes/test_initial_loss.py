"""P1 on rows without messages and without a begin-of-text: it accuses beyond its control only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from solotune.dataset.example import Example
from solotune.diagnosis.probes import initial_loss
from solotune.diagnosis.probes.initial_loss import first_loss
from solotune.diagnosis.run_facts import LiveModel
from tests.diagnosis.probed_models import Ward, chats, padded

END = 2


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Ward:
    return Ward(tmp_path_factory.getbasetemp() / "ward")


def heard(ward: Ward, texts: Sequence[str], masked: bool = False, **settings: Any) -> tuple[list[Any], dict[str, Any]]:
    """Signals of P1 on plain texts, none of which has messages."""
    rows = []
    for text in texts:
        ids = [*ward.tokenizer.encode(text, add_special_tokens=False), END]
        first = len(ids) // 2 if masked else 0
        rows.append((ids, [-100] * first + ids[first:]))
    batches = [padded(rows[i : i + 4], pad=0) for i in range(0, len(rows), 4)]
    live = LiveModel(ward.model(), batches)
    train = [
        Example(np.array(ids, np.int32), np.array(labels) >= 0, f"row {n}", []) for n, (ids, labels) in enumerate(rows)
    ]
    one = ward.run_facts(batches, conversations=[], train=train, settings=settings)
    return first_loss(live, one, 20.0)


def codes(signals: Sequence[Any]) -> set[str]:
    return {s.code for s in signals if not s.against and s.kind != "remark"}


def test_f12_by_the_labels_in_the_text(ward: Ward) -> None:
    texts = [f"Human: {chat[0]['content']}\nAssistant: {chat[1]['content']}" for chat in chats(16, 100)]
    signals, found = heard(ward, texts)
    assert "F12" in codes(signals), found
    assert found["rows_without_own_markers"] == 1.0


def test_f12_not_of_documents_nor_of_our_own_pairs(ward: Ward) -> None:
    """Control: a text that goes on as it began is no better as an answer to its first line."""
    texts = [" ".join(m["content"] for m in chat) for chat in chats(32, 100)]
    documents = [f"{one}\n{other}" for one, other in zip(texts[::2], texts[1::2], strict=True)]
    signals, found = heard(ward, documents)
    assert "F12" not in codes(signals), found
    signals, found = heard(ward, texts, masked=True, tool="solotune")
    assert "F12" not in codes(signals), found
    assert "answers_own_format" not in found


def test_f12_not_of_a_model_that_was_not_taught(ward: Ward) -> None:
    texts = [f"Human: {chat[0]['content']}\nAssistant: {chat[1]['content']}" for chat in chats(16, 100)]
    ward.tokenizer.eos_token, before = "<|endoftext|>", ward.tokenizer.eos_token
    try:
        signals, found = heard(ward, texts)
    finally:
        ward.tokenizer.eos_token = before
    assert "F12" not in codes(signals), found


@pytest.mark.parametrize(("losses", "is_found"), [((3.0, 2.5, 2.95), True), ((3.0, 2.5, 2.6), False),
                                                  ((3.0, 2.99, 3.0), False)])  # fmt: skip
def test_f09_only_if_no_other_token_helps_as_much(losses: tuple[float, float, float], is_found: bool) -> None:
    """As they are, after a begin-of-text, after the best other token."""
    numbers = dict(zip(("as_trained", "after_bos", "after_another"), losses, strict=True))
    one = nothing_known()
    signal = initial_loss._begin(one, {"beginnings": {"rows": 4, "first_worse": 4, **numbers}})
    assert (signal is not None) == is_found
    assert initial_loss._begin(one, {"beginnings": {"rows": 4, "first_worse": 3, **numbers}}) is None


def nothing_known() -> Any:
    from solotune.diagnosis.run_facts import RunFacts, Settings

    return RunFacts("a run", Settings({}))


def test_f09_is_measured_on_rows_without_one(ward: Ward) -> None:
    texts = [" ".join(m["content"] for m in chat) for chat in chats(16, 100)]
    bos = ward.tokenizer.bos_token
    assert bos and ward.tokenizer.bos_token_id != ward.tokenizer.eos_token_id
    assert heard(ward, texts)[1]["beginnings"]["rows"] == initial_loss.NUM_ROWS
    assert "beginnings" not in heard(ward, [bos + text for text in texts])[1]
    assert torch.is_grad_enabled()
