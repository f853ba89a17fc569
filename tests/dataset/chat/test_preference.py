"""Preference data is refused, with a mapping that trains on its good answers; grades and classes are not verdicts."""

from __future__ import annotations

from typing import Any

import pytest

from solotune.dataset import prepare
from solotune.dataset.chat.formats import WEIGHT_0, Record
from tests.dataset.chat.advice import after_advice, mappings_in, read, refused
from tests.dataset.chat.test_columns import CHATS, TEXTS
from tests.dataset.chat.test_formats import A, U
from tests.dataset.conftest import Writer, config_of, tiny_tokenizer

B = {"role": "assistant", "content": "bad"}


@pytest.mark.parametrize("chat", [*CHATS, TEXTS[0]], ids=str)
@pytest.mark.parametrize("key", ["label", "kto_tag", "Label", "is_preferred", "thumbs_up"])
def test_a_verdict_is_refused_and_can_be_a_switch(chat: dict[str, Any], key: str) -> None:
    for verdict in (True, False, "True", "false"):
        values = {**chat, key: verdict}
        message = refused(values)
        assert message.startswith(f"f.jsonl:1: preference data: {key} says whether the answer is good")
        learn_good, learn_all = mappings_in(message)
        is_good = str(verdict).lower() == "true"
        record = read(values, learn_good)
        assert isinstance(record, Record) if is_good else record == WEIGHT_0
        assert isinstance(read(values, learn_all), Record)


def test_kto_files_train_on_their_good_answers(write: Writer) -> None:
    rows = [{"prompt": f"q{n}", "completion": f" a{n}", "label": n % 2 == 0} for n in range(6)]
    report = prepare(
        config_of(write("a.jsonl", *rows), column_mapping={"label": "train"}), tiny_tokenizer("chatml")
    ).report
    assert (report.num_train, dict(report.dropped)) == (3, {"weight 0": 3})


@pytest.mark.parametrize(
    "values",
    [
        {"text": "a", "label": 1},
        {"text": "a", "label": True},
        {"text": "a", "label": "positive"},
        {"prompt": "q", "completion": "a", "label": 3},
        {"prompt": "q", "completion": "a", "label": "positive"},
        {"instruction": "q", "output": "a", "label": 1},
        {"messages": [U, A], "score": 4.5, "rating": 1, "reward": -2.0},
        {"messages": [U, A], "label": None, "kto_tag": None, "rejected": None, "chosen": []},
        {"messages": [U, A], "score_chosen": 4.5, "score_rejected": 2},
    ],
    ids=str,
)
def test_classes_and_grades_are_no_verdicts(values: dict[str, Any]) -> None:
    assert isinstance(read(values), Record)


@pytest.mark.parametrize("label", [0, 1, "0", "1", 1.0])
def test_numbers_beside_ktos_own_shape_are_verdicts(label: Any) -> None:
    assert "says whether the answer is good" in refused({"prompt": "q", "completion": "a", "label": label})


@pytest.mark.parametrize(
    "columns",
    [
        {"rejected": "x"}, {"chosen": "x"}, {"chosen": "x", "rejected": "y"}, {"rejected_response": "y"},
        {"chosen_response": "x", "rejected_response": "y"}, {"Rejected": [B]}, {"rejected": False}, {"preference": 1}, {"response_rejected": "y"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("chat", [*CHATS, *TEXTS], ids=str)
def test_pairs_are_never_learned_in_part(chat: dict[str, Any], columns: dict[str, Any]) -> None:
    values = {**chat, **columns}
    if columns == {"preference": 1} and "text" in chat:
        return
    message = refused(values)
    assert message.startswith("f.jsonl:1: preference data")
    assert read(values, mappings_in(message)[-1]) == read(chat) or "chosen" in columns


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "q", "chosen": "a", "rejected": "bad"},
        {"prompt": "q", "chosen": "a", "rejected": "bad", "chosen_score": 3},
        {"question": "q", "chosen": "a", "rejected": "bad"},
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "bad"},
        {"prompt": [U], "chosen": [A], "rejected": [B]},
        {"prompt": "q", "chosen": [U, A], "rejected": [U, B]},
        {"prompt": "q", "messages": [U, A], "chosen": [U, A], "rejected": [U, B]},
        {"chosen": [U, A], "rejected": [U, B]},
        {"messages": [U], "chosen": A, "rejected": B},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
         "rejected": {"from": "gpt", "value": "bad"}},
    ],
    ids=str,
)  # fmt: skip
def test_the_mapping_trains_on_the_chosen_answer(values: dict[str, Any]) -> None:
    assert "preference data" in refused(values)
    record = after_advice(values)
    assert record.text == "qa" if not record.is_chat else record.messages == [U, A]


def test_preference_data_in_openais_form() -> None:
    message = refused({"input": {"messages": [U]}, "preferred_output": [A], "non_preferred_output": [B]})
    assert "this is preference data" in message
    assert "join the input" not in message
