"""P13: what the answers of a deployment say, and what they cannot."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from solotune.diagnosis.facts.labels import LabelFacts
from solotune.diagnosis.probes.generation import _are_stops, _first_turn, _judge, _question
from solotune.diagnosis.probes.prompt_use import _pair
from solotune.diagnosis.run_facts import RunFacts, Settings
from tests.diagnosis.probed_models import Ward, chats, padded, render

ALIKE: dict[str, Any] = {
    "training_rendering": {"without_end": 0.0, "rep_4": 0.0},
    "deployment_rendering": {"without_end": 0.0, "rep_4": 0.0},
    "goes_on_after_end": 0.0,
    "data_goes_on_after_end": 0.0,
    "right": {"training_rendering": 0.0, "deployment_rendering": 0.0},
    "question_is_whole": True,
    "same_again": True,
    "end_expected": 0.9,
    "equal": 1.0,
    "deployed_costs_more": 0.0,
    "stops_at_end": 1.0,
    "as_without_header": 0.0,
}


@pytest.mark.parametrize(("ends_are_stops", "cleared"), [(True, ["F11", "F14"]), (False, ["F11"])])
def test_f14_is_cleared_only_if_the_files_stop_there(ends_are_stops: bool, cleared: list[str]) -> None:
    """solotune stops at the template's end, whatever generation_config.json says."""
    signals = _judge(RunFacts("a run", Settings({})), {**ALIKE, "ends_are_stops": ends_are_stops})
    assert [signal.code for signal in signals if signal.against] == cleared


@pytest.mark.parametrize(("stops", "expected"), [(7, True), ([2, 7], True), (2, False), (None, True)])
def test_stop_ids(stops: Any, expected: bool) -> None:
    assert _are_stops(RunFacts("a run", Settings({}), generation_config={"eos_token_id": stops}), [7, 7]) is expected


def test_f11_needs_a_deployment() -> None:
    """Of a folder whose batches were not saved, solotune renders both the rows and the prompts."""
    other = {**ALIKE, "equal": 0.0, "deployed_costs_more": 2.0, "ends_are_stops": True}
    assert [signal.code for signal in _judge(RunFacts("a run", Settings({})), other)] == ["F11"]
    assert _judge(RunFacts("a run", Settings({}), missing={"batches": "not saved"}), other) == []


@pytest.mark.parametrize(("costs", "codes"), [(0.5, []), (2.0, ["F11"])])
def test_f11_of_answers_that_all_end_though_the_datas_own_may_go_on(costs: float, codes: list[str]) -> None:
    other = {**ALIKE, "equal": 0.0, "end_expected": 0.04, "deployed_costs_more": costs, "ends_are_stops": True}
    assert [signal.code for signal in _judge(RunFacts("a run", Settings({})), other)] == codes


def test_a_chat_of_several_turns_is_asked_its_first_question(tmp_path_factory: pytest.TempPathFactory) -> None:
    ward = Ward(tmp_path_factory.getbasetemp() / "ward")
    turns = [[*one, *other] for one, other in itertools.pairwise(chats(6, 100))]
    rows = [render(ward.tokenizer, chat) for chat in turns]
    facts = LabelFacts.of(ward.run_facts([padded(rows, pad=2)], conversations=turns))
    first = _first_turn(facts, facts.documents[0])
    assert _question(facts, facts.documents[0]) == turns[0][0]["content"]
    pair = _pair(first, facts.roles)
    assert pair is not None and facts.roles.decode(np.array(pair[1])).strip() == turns[0][1]["content"]
    assert _pair(facts.documents[0], facts.roles) is None
