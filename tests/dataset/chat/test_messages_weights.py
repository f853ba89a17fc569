"""A weight in the data is the weight of just those tokens in training, through cuts, splits and both mask modes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solotune.dataset import Example, Prepared, prepare
from solotune.errors import InputError
from tests.dataset.conftest import Writer, chat, config_of, tiny_tokenizer

CHATML = tiny_tokenizer("chatml")
TURNS = chat("a", "first", "b", "second")


def prepared(path: Path, **keys: Any) -> Prepared:
    return prepare(config_of(path, **keys), CHATML)


def message_of(path: Path, **keys: Any) -> str:
    with pytest.raises(InputError) as caught:
        prepared(path, **keys)
    return str(caught.value)


def learned(example: Example) -> str:
    return CHATML.decode(example.input_ids[example.loss_mask])


def by_text(example: Example) -> list[tuple[str, float]]:
    """The learned stretches and their weights; the arrays must agree with each other."""
    if example.weights is not None:
        assert example.weights.dtype == np.float32
        assert example.weights.shape == example.input_ids.shape
        assert ((example.weights > 0) == example.loss_mask).all()
    return [(p["text"], p.get("weight", 1.0)) for p in example.pieces(CHATML) if p["supervised"]]


def dropped(result: Prepared) -> dict[str, int]:
    return result.report.to_json()["rows"]["dropped"]


# --- which tokens have which weight


@pytest.mark.parametrize("key", ["weight", "loss_weight"])
def test_messages_and_rows_multiply(write: Writer, key: str) -> None:
    turns = [TURNS[0], {**TURNS[1], key: 0.5}, TURNS[2], {**TURNS[3], key: 3}]
    path = write("a.jsonl", {"messages": turns}, {"messages": chat("c", "d"), key: 2}, {"messages": chat("e", "f")})
    rows = prepared(path).train
    assert by_text(rows[0]) == [("first<|im_end|>", 0.5), ("second<|im_end|>", 3.0)]
    assert by_text(rows[1]) == [("d<|im_end|>", 2.0)]
    assert rows[2].weights is None
    both = prepared(write("b.jsonl", {"messages": turns, key: 0.5})).train[0]
    assert by_text(both) == [("first<|im_end|>", 0.25), ("second<|im_end|>", 1.5)]
    last = prepared(path, train_on_last_turn=True).train[0]
    assert by_text(last) == [("second<|im_end|>", 3.0)]


def test_every_format_has_weights(write: Writer) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0.5}]
    path = write("a.jsonl", {"system": "s", "conversations": [*turns, turns[0], {"from": "gpt", "value": "c"}]})
    assert by_text(prepared(path).train[0]) == [("b<|im_end|>", 0.5), ("c<|im_end|>", 1.0)]
    path = write("b.jsonl", {"prompt": TURNS[:3], "completion": [{**TURNS[3], "weight": 0.5}], "weight": 3})
    assert by_text(prepared(path).train[0]) == [("second<|im_end|>", 1.5)]
    path = write("c.csv", "prompt,completion,weight\na,b,0.5\nc,d,1\ne,f,0\n")
    result = prepared(path)
    assert [by_text(row) for row in result.train] == [[("b<|im_end|>", 0.5)], [("d<|im_end|>", 1.0)]]
    assert dropped(result) == {"weight 0": 1}
    path = write("d.jsonl", {"instruction": "a", "output": "b", "loss_weight": 4})
    assert by_text(prepared(path).train[0]) == [("b<|im_end|>", 4.0)]


def test_weights_that_come_to_1_are_none(write: Writer) -> None:
    turns = [TURNS[0], {**TURNS[1], "weight": 0}, TURNS[2], {**TURNS[3], "weight": 0.5}]
    (row,) = prepared(write("a.jsonl", {"messages": turns, "weight": 2})).train
    assert row.weights is None
    assert by_text(row) == [("second<|im_end|>", 1.0)]


def test_with_every_token_learned_the_rest_has_the_rows_weight(write: Writer) -> None:
    turns = [TURNS[0], {**TURNS[1], "weight": 0.5}, TURNS[2], {**TURNS[3], "weight": 0}]
    (row,) = prepared(write("a.jsonl", {"messages": turns, "weight": 3}), assistant_only_loss=False).train
    assert row.weights is not None
    pieces = by_text(row)
    assert ("first<|im_end|>", 1.5) in pieces
    assert not any("second" in text for text, _ in pieces)
    assert {weight for text, weight in pieces if "first" not in text} == {3.0}


def test_a_cut_row_keeps_the_weights_of_what_is_left(write: Writer) -> None:
    turns = [TURNS[0], TURNS[1], TURNS[2], {**TURNS[3], "weight": 0.5}]
    path = write("a.jsonl", {"messages": turns})
    (whole,) = prepared(path).train
    assert whole.weights is not None
    first_end = int(np.flatnonzero(whole.weights == 1)[-1]) + 1
    (row,) = prepared(path, max_length=first_end).train
    assert row.weights is None  # what counts by another weight was cut
    (row,) = prepared(path, max_length=len(whole.input_ids) - 3).train
    assert row.weights is not None
    assert row.weights.tolist() == whole.weights[:-3].tolist()


def test_parts_of_a_row_have_its_weights(write: Writer) -> None:
    turns = [TURNS[0], {**TURNS[1], "weight": 0.5}, TURNS[2], TURNS[3]]
    path = write("a.jsonl", {"messages": turns})
    (whole,) = prepared(path).train
    result = prepared(path, max_length=9, overflow="split")
    together = [(p.weights if p.weights is not None else p.loss_mask * 1.0)[p.loss_mask] for p in result.train]
    assert whole.weights is not None
    assert np.concatenate(together).tolist() == whole.weights[whole.loss_mask].tolist()
    assert result.report.total_weight == whole.total_weight < result.report.num_supervised


# --- the account


def test_the_report_counts_rows_and_answers_and_sums_the_weights(write: Writer) -> None:
    turns = [TURNS[0], {**TURNS[1], "weight": 0.25}, TURNS[2], {**TURNS[3], "weight": 2}]
    path = write(
        "a.jsonl", {"messages": turns}, {"messages": chat("c", "d")}, {"messages": chat("e", "f"), "weight": 3}
    )
    result = prepared(path)
    per_row = [sum(w * len(CHATML.encode(t)) for t, w in by_text(row)) for row in result.train]
    assert result.report.to_json()["weights"] == {"rows": 2, "answers": 3, "sum": sum(per_row)}
    plain = prepared(write("b.jsonl", {"messages": TURNS})).report.to_json()
    assert plain["weights"] == {"rows": 0, "answers": 0, "sum": plain["tokens"]["supervised"]}


def test_other_weights_are_other_data(write: Writer) -> None:
    """What a resumed run compares; rows without weights have the digest they always had."""
    digests = [
        prepared(write("a.jsonl", {"messages": TURNS, **weight})).report.train_sha256
        for weight in ({}, {"weight": 1}, {"weight": 2}, {"weight": 3})
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


# --- weight 0, and what is no weight


@pytest.mark.parametrize("key", ["weight", "loss_weight"])
@pytest.mark.parametrize("zero", [0, 0.0, -0.0, "0"])
def test_weight_0_is_read_and_not_learned(write: Writer, key: str, zero: Any) -> None:
    turns = [TURNS[0], {**TURNS[1], key: zero}, {**TURNS[2], key: 0}, {**TURNS[3], key: 1}]
    path = write("a.jsonl", {"messages": turns})
    result = prepared(path)
    assert learned(result.train[0]) == "second<|im_end|>"
    plain = prepared(write("b.jsonl", {"messages": TURNS})).train[0]
    assert result.train[0].input_ids.tolist() == plain.input_ids.tolist()
    everything = prepared(path, assistant_only_loss=False).train[0]
    assert "first" not in learned(everything)
    assert "second" in learned(everything)


def test_rows_and_whole_conversations_of_weight_0(write: Writer) -> None:
    none = [{**message, "weight": 0} for message in TURNS]
    path = write("a.jsonl", {"messages": TURNS}, {"messages": none}, {"messages": chat("x", "y"), "weight": 0})
    assert dropped(prepared(path)) == {"weight 0": 2}


NO_WEIGHTS = [-1, -0.5, 1e-10, 2e9, 10**400, "yes", "", "nan", "-inf", "1e999", True, False, [1], {"a": 1}]


@pytest.mark.parametrize("value", [*NO_WEIGHTS, float("nan"), float("inf")], ids=lambda value: str(value)[:9])
def test_what_is_no_weight_is_refused(write: Writer, value: Any) -> None:
    for where, row, change in (
        ("a.jsonl:1", {"messages": TURNS, "loss_weight": value}, "column_mapping: {loss_weight: ignore}"),
        (
            "a.jsonl:1: message 2",
            {"messages": [TURNS[0], {**TURNS[1], "loss_weight": value}]},
            "remove loss_weight from the messages",
        ),
    ):
        path = write("a.jsonl", row)
        if isinstance(value, float) and not np.isfinite(value):  # the reader of files knows no such number
            assert message_of(path).startswith("a.jsonl:1: not valid JSON")
            continue
        seen = json.dumps(value)
        assert message_of(path) == (
            f"{where}: loss_weight is not a weight\n"
            f"  seen:    {seen if len(seen) <= 60 else seen[:57] + '...'}\n"
            "  allowed: 0 (not trained on), or a number from 1e-09 to 1e+09; the default is 1\n"
            f"  change:  if it is not a loss weight: {change}"
        )


def test_nan_in_a_table_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "weight": [1.0, float("nan")]}), path)
    assert message_of(path).startswith("a.parquet[1]: weight is not a weight\n  seen:    NaN\n")


@pytest.mark.parametrize("value", [1, 0.5])
def test_only_answers_can_have_a_weight(write: Writer, value: float) -> None:
    path = write("a.jsonl", {"messages": [{**TURNS[0], "weight": value}, TURNS[1]]})
    assert message_of(path) == (
        f"a.jsonl:1: message 1: weight: {value}, but only assistant messages can have a weight\n"
        "  change:  remove weight from this message; to train on all tokens, set assistant_only_loss: false"
    )


# --- switches of other trainers

OFF: list[dict[str, Any]] = [
    {"train": False}, {"training": False}, {"trainable": False}, {"loss": False}, {"loss": 0}, {"train": "false"},
    {"train": "False"}, {"training": "no"}, {"loss_mask": 0}, {"trainable": 0.0}, {"masked": True}, {"masked": "1"},
    {"is_masked": 1}, {"weight": 0}, {"loss_scale": 0}, {"train": False, "weight": 0}, {"Train": False},
]  # fmt: skip
ON: list[dict[str, Any]] = [
    {"train": True}, {"training": 1}, {"loss": "true"}, {"loss_mask": 1.0}, {"masked": False}, {"train": None},
    {"train": ""}, {"train": True, "weight": 1},
]  # fmt: skip


@pytest.mark.parametrize("switch", OFF, ids=str)
def test_a_message_that_is_switched_off_is_context(write: Writer, switch: dict[str, Any]) -> None:
    turns = [{**TURNS[0], **switch}, {**TURNS[1], **switch}, TURNS[2], TURNS[3]]
    result = prepared(write("a.jsonl", {"messages": turns}))
    assert learned(result.train[0]) == "second<|im_end|>"
    assert result.report.unused == []
    sharegpt = [{"from": m.pop("role"), "value": m.pop("content"), **m} for m in map(dict, turns)]
    assert learned(prepared(write("b.jsonl", {"conversations": sharegpt})).train[0]) == "second<|im_end|>"


@pytest.mark.parametrize("switch", ON, ids=str)
def test_a_message_that_is_switched_on_is_learned(write: Writer, switch: dict[str, Any]) -> None:
    turns = [TURNS[0], {**TURNS[1], **switch}, TURNS[2], TURNS[3]]
    (row,) = prepared(write("a.jsonl", {"messages": turns})).train
    assert (learned(row), row.weights) == ("first<|im_end|>second<|im_end|>", None)


@pytest.mark.parametrize("key", ["train", "training", "trainable"])
def test_a_row_that_is_switched_off_is_dropped(write: Writer, key: str) -> None:
    path = write("a.jsonl", {"messages": TURNS, key: False}, {"messages": chat("c", "d"), key: True})
    assert dropped(prepared(path)) == {"weight 0": 1}
    path = write("b.jsonl", {"text": "a", "loss": 2.3, key: "the 9:15"})
    assert prepared(path).report.unused_in_words() == f"loss in 1 of 1 rows, {key} in 1 of 1 rows"
    assert message_of(write("c.jsonl", {"text": "a", "ok": "so"}), column_mapping={"ok": "train"}).startswith(
        "c.jsonl:1: ok is neither true nor false\n"
    )


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"train": "perhaps"}, "train is neither true nor false"),
        ({"loss": 0.5}, "loss is neither true nor false"),
        ({"train": 2}, "train is neither true nor false"),
        ({"train": [True]}, "train is neither true nor false"),
        ({"mask": True}, "mask is not read"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 2, "train": False}]}, "train_detail is not read"),
        ({"train": True, "weight": 0}, "weight, train contradict each other"),
        ({"train": False, "weight": 0.5}, "weight, train contradict each other"),
        ({"train": True, "masked": True}, "train, masked contradict each other"),
        ({"weight": 1, "loss_weight": 2}, "weight, loss_weight contradict each other"),
    ],
    ids=str,
)
def test_switches_that_cannot_be_read(write: Writer, keys: dict[str, Any], problem: str) -> None:
    path = write("a.jsonl", {"messages": [TURNS[0], {**TURNS[1], **keys}]})
    assert message_of(path).startswith(f"a.jsonl:1: message 2: {problem}\n")


def test_only_answers_can_be_switched_on(write: Writer) -> None:
    path = write("a.jsonl", {"messages": [{**TURNS[0], "train": True}, TURNS[1]]})
    assert message_of(path).startswith(
        "a.jsonl:1: message 1: train: true, but only assistant messages can have a weight\n"
    )
