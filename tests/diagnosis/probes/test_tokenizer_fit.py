"""P1 on the ids: another tokenizer, and text that is only new to the model, are distinguished."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from solotune.diagnosis.probes.initial_loss import first_loss
from solotune.diagnosis.probes.tokenizer_fit import REWRITTEN, _tokenizer, tokenizer_signals
from solotune.diagnosis.run_facts import LiveModel, RunFacts, Settings
from tests.diagnosis.probed_models import Ward, chats, moved, padded, render, without_markers

NOISE = {"plain_text": 9.0, "ids_swapped": 9.5, "log_v": 6.0, "everyday_text": 9.0, "everyday_swapped": 9.4}


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Ward:
    return Ward(tmp_path_factory.getbasetemp() / "ward")


def heard(ward: Ward, tokenizer: Any, **parts: Any) -> tuple[list[Any], dict[str, Any]]:
    rows = [render(tokenizer, chat) for chat in chats(8, 100)]
    live = LiveModel(ward.model(), [padded(rows[i : i + 4], pad=2) for i in range(0, len(rows), 4)])
    return first_loss(live, ward.run_facts(live.batches, tokenizer=tokenizer, **parts), 20.0)


def test_f04_of_ids_that_are_moved(ward: Ward) -> None:
    """A tokenizer with four pieces more in front; its markers are where they were."""
    signals, found = heard(ward, moved(ward.tokenizer, 4))
    (f04,) = [signal for signal in signals if signal.code == "F04"]
    assert not f04.against and "moved by -4" in f04.says, found
    assert [s.against for s in signals if s.code == "F07"] == [True]  # its markers are no fault of their own
    signals, _ = heard(ward, ward.tokenizer)
    assert [s.against for s in signals if s.code == "F04"] == [True]


def test_f04_is_open_where_every_text_survives_the_tokenizer() -> None:
    """Text of another language: the model knows everyday English, or nothing can tell."""
    accused = _tokenizer({**NOISE, "own_text_kept": 0.7, "any_text_kept": 0.6})
    assert accused is not None and (accused.against, accused.weight) == (False, 0.9)
    unsure = _tokenizer({**NOISE, "own_text_kept": 1.0, "any_text_kept": 1.0})
    assert unsure is not None and (unsure.against, unsure.weight) == (False, 0.4)
    for control in ({"everyday_text": 3.0, "any_text_kept": 1.0}, {"own_text_kept": 1.0, "any_text_kept": 0.6}):
        cleared = _tokenizer({**NOISE, **control})
        assert cleared is not None and cleared.against


def test_f04_where_rows_english_and_headers_are_all_noise() -> None:
    """Though not as bad as swapped ids; control: a model knows one of the three by its own tokenizer."""
    noise = {**NOISE, "plain_text": 8.0, "ids_swapped": 10.0, "own_markers": 8.0, "own_text_kept": 1.0}
    accused = _tokenizer(noise)
    assert accused is not None and (accused.against, accused.weight) == (False, 0.75)
    for control in ({"own_markers": 3.0}, {"everyday_text": 7.5}, {"plain_text": 6.1}):
        cleared = _tokenizer({**noise, **control})
        assert cleared is None or cleared.against


def test_f04_moved_ids_must_fit_clearly_better() -> None:
    kept = {"own_text_kept": 1.0, "any_text_kept": 0.6, "ids_fit": -6.0, "moved_by": 3}
    for moved_fit, expected in ((-5.0, (False, 0.9)), (-5.6, (False, 0.4)), (-5.9, (True, 0.8))):
        signal = _tokenizer({**NOISE, **kept, "moved_ids_fit": moved_fit})
        assert signal is not None and (signal.against, signal.weight) == expected


def test_f04_where_what_the_base_writes_is_split_otherwise() -> None:
    """Control: text that the model knows, the markers of its template, and what survives the tokenizer."""
    other = {"plain_text": 6.0, "ids_swapped": 10.0, "log_v": 6.1, "own_text_kept": 0.7, "any_text_kept": 0.6}
    accused = _tokenizer(other)
    assert accused is not None and (accused.against, accused.weight) == (False, 0.75)
    for control in ({"plain_text": 3.0}, {"own_markers": 0.1}, {"own_text_kept": 0.99}):
        cleared = _tokenizer({**other, **control})
        assert cleared is None or cleared.against


def test_what_the_base_writes_survives_its_own_tokenizer(ward: Ward) -> None:
    _, found = heard(ward, ward.tokenizer)
    assert found["own_text_kept"] > REWRITTEN


def test_nothing_clears_f04_where_the_base_says_otherwise(ward: Ward) -> None:
    fits = {"plain_text": 3.0, "ids_swapped": 9.0, "log_v": 6.0}
    one = RunFacts("a run", Settings({}), tokenizer=ward.tokenizer)
    assert [signal.against for signal in tokenizer_signals(one, fits)] == [True]
    assert tokenizer_signals(replace(one, base_tokenizer=moved(ward.tokenizer, 2)), fits) == []


def test_f07_markers_that_are_split_and_not_expected(ward: Ward) -> None:
    """Their ids tell nothing about how text is split (F04). Control: a base that has no template of its own."""
    lost = without_markers(ward.tokenizer, "<|im_start|>")
    rows = [render(lost, one) for one in chats(8, 100)]
    batches = [padded(rows[i : i + 4], pad=2) for i in (0, 4)]

    def spoken(base: Any) -> list[tuple[str, str]]:
        run_facts = ward.run_facts(batches, tokenizer=lost, base_tokenizer=base)
        signals, _ = first_loss(ward.live(batches=batches), run_facts, 30.0)
        return [(s.code, s.kind) for s in signals if not s.against]

    assert ("F07", "measured") in spoken(ward.tokenizer)
    assert not {"F07", "F04"} & {code for code, _ in spoken(None)}
