"""What a config can choose about rows: foreign columns, bad rows, the last turn, rows that are too long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inline_snapshot import snapshot

from solotune.dataset import Example, Prepared, prepare, render
from solotune.errors import InputError
from tests.dataset.conftest import Writer, chat, config_of, tiny_tokenizer
from tests.messages import stable

CHATML = tiny_tokenizer("chatml")
LONG = "word " * 50


def prepared(path: Path, **keys: Any) -> Prepared:
    return prepare(config_of(path, **keys), CHATML)


def message_of(path: Path, **keys: Any) -> str:
    with pytest.raises(InputError) as caught:
        prepared(path, **keys)
    return str(caught.value)


def learned(example: Example) -> str:
    return CHATML.decode(example.input_ids[example.loss_mask])


def rows_of(result: Prepared) -> dict[str, Any]:
    rows = result.report.to_json()["rows"]
    assert rows["read"] == rows["kept"] + sum(rows["dropped"].values())
    assert len(result.train) + len(result.validation) == rows["kept"] + rows["added_by_split"]
    return rows


# --- too long


def test_overflow_drop_and_truncate(write: Writer) -> None:
    path = write("a.jsonl", {"messages": chat("a", "b")}, {"messages": chat("a", LONG)})
    dropped = rows_of(prepared(path, max_length=40, overflow="drop"))
    assert (dropped["kept"], dropped["dropped"]) == (1, {"longer than max_length": 1})
    cut = prepared(path, max_length=40)
    whole = prepared(path)
    assert (rows_of(cut)["truncated"], rows_of(cut)["answers_cut"]) == (1, 1)
    lost = [
        sum(getattr(result.report, what) for result in (whole,)) - getattr(cut.report, what)
        for what in ("num_tokens", "num_supervised")
    ]
    assert [cut.report.labels.num_tokens_cut, cut.report.labels.num_labels_cut] == lost
    assert whole.report.labels.num_tokens_cut == 0


def test_overflow_error_names_the_row(write: Writer) -> None:
    path = write("a.jsonl", {"messages": chat("a", "b")}, {"messages": chat("a", LONG)})
    length = len(prepared(path).train[1].input_ids)
    for on_bad_row in ("error", "drop"):
        assert message_of(path, max_length=40, overflow="error", on_bad_row=on_bad_row) == (
            "a.jsonl:2: longer than max_length, and overflow is error\n"
            f"  seen:    {length} tokens\n"
            "  allowed: 40 tokens\n"
            "  change:  raise max_length, shorten the row, or set overflow to truncate, drop or split"
        )
    assert len(prepared(path, max_length=length, overflow="error").train) == 2


def test_overflow_split(write: Writer) -> None:
    path = write("a.jsonl", {"messages": chat("a", "b")}, {"messages": chat(LONG, "c", LONG, "d " * 30)})
    whole, result = prepared(path).train[1], prepared(path, max_length=40, overflow="split")
    parts, rows = result.train[1:], rows_of(result)
    number = -(-(len(whole.input_ids) - 1) // 39)
    assert all(part.where.endswith(f"/{number}") and part.where.startswith("a.jsonl:2 part ") for part in parts)
    assert rows["split"] == 1
    assert rows["added_by_split"] == len(parts) - 1
    assert rows["parts_without_label"] == number - len(parts) > 0
    assert "".join(map(learned, parts)) == learned(whole)
    assert result.report.labels.num_labels_cut == 0
    assert len({part.group for part in parts}) == 1
    assert [bool(part.messages) for part in parts] == [part.where.endswith(f" part 1/{number}") for part in parts]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4),
    limit=st.integers(8, 60),
)
def test_splitting_loses_no_label_and_makes_none(tmp_path: Path, sizes: list[tuple[int, int]], limit: int) -> None:
    import json

    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": chat(*("x y " * n for pair in sizes for n in pair))}))
    whole = prepared(path, max_length=100_000).train[0]
    parts = prepared(path, max_length=limit, overflow="split").train
    ids = [one for part in parts for one in part.input_ids[part.loss_mask]]
    assert ids == whole.input_ids[whole.loss_mask].tolist()
    for part in parts:
        assert len(part.input_ids) <= limit
        assert part.loss_mask.any() and not part.loss_mask[0]
        # each label follows the token that it follows in the row
        pairs = {(int(a), int(b)) for a, b in zip(whole.input_ids[:-1], whole.input_ids[1:], strict=True)}
        assert {(int(part.input_ids[k - 1]), int(part.input_ids[k])) for k in np.flatnonzero(part.loss_mask)} <= pairs


# --- bad rows


BAD = [
    ({"messages": []}, "messages is empty"),
    ({"messages": "nothing"}, "messages is a text, not a list"),
    ({"messages": [{"role": "user", "content": "q"}]}, "no assistant message"),
    ({"messages": [*chat("a", "b"), {"role": "wizard", "content": "c"}]}, "unknown role"),
    ({"messages": [{"role": "user", "content": 42}]}, "content is not text"),
    ({"messages": [{"role": "user", "content": None}]}, "content is missing or null"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content has a part that is not text"),
    ({"messages": ["hello"]}, "a message is not an object"),
    ({"messages": chat("a", "b"), "tools": "[{"}, "tools is not valid JSON"),
    ({"messages": chat("a", "b"), "weight": -0.5}, "weight is not a weight"),
    ({"text": "t"}, "mixed formats: this row is text"),
    ({"other": "t"}, "messages is missing"),
]


def test_bad_rows_are_dropped_by_reason_when_asked_for(write: Writer) -> None:
    good = [{"messages": chat(f"a{n}", "b")} for n in range(len(BAD) + 1)]
    path = write("a.jsonl", *(row for row, _ in BAD), *good)
    result = prepared(path, on_bad_row="drop")
    assert rows_of(result)["dropped"] == dict(sorted((reason, 1) for _, reason in BAD))
    assert len(result.train) == len(good)
    for row, _ in BAD:
        assert message_of(write("b.jsonl", good[0], row)).startswith("b.jsonl:2: ")


def test_raw_sharegpt_with_empty_conversations(write: Writer) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    rows = [{"id": f"x{n}", "conversations": turns if n % 3 else []} for n in range(9)]
    path = write("a.jsonl", *rows)
    assert message_of(path) == (
        "a.jsonl:1: conversations is empty (one of 3 bad rows; 9 were read)\n"
        "  seen:    also a.jsonl:4; a.jsonl:7\n"
        "  allowed: at least one assistant message\n"
        "  change:  on_bad_row: drop leaves out the bad rows"
    )
    result = prepared(path, on_bad_row="drop")
    assert result.report.format == "sharegpt"
    assert rows_of(result)["dropped"] == {"conversations is empty": 3, "exact duplicate": 5}


def test_rows_that_the_template_refuses(write: Writer) -> None:
    mistral = tiny_tokenizer("mistral")
    wrong = [[{"role": "user", "content": text}, *chat("b", "c")] for text in "xyz"]
    good = [chat("a", "b"), chat("c", "d"), chat("e", "f"), chat("g", "h")]
    path = write("a.jsonl", *({"messages": one} for one in (good[0], *wrong, *good[1:])))
    result = prepare(config_of(path, on_bad_row="drop"), mistral)
    assert [one.where for one in result.train] == ["a.jsonl:1", "a.jsonl:5", "a.jsonl:6", "a.jsonl:7"]
    assert rows_of(result)["dropped"] == {"refused by the chat template": 3}
    with pytest.raises(InputError) as caught:
        prepare(config_of(path, validation_size=2), mistral)
    assert "(one of 3 bad rows; 7 were read)" in str(caught.value)
    assert "on_bad_row: drop leaves out the bad rows" in str(caught.value)


def test_the_data_are_refused_early_if_the_template_refuses_very_many_rows(
    write: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "MOST_COUNTED", 2)
    monkeypatch.setattr(render, "_BATCH_ROWS", 2)
    wrong = [[{"role": "user", "content": text}, *chat("b", "c")] for text in "uvwxyz"]
    path = write("a.jsonl", *({"messages": one} for one in wrong))
    with pytest.raises(InputError, match=r"one of at least 2 bad rows; 2 were read"):
        prepare(config_of(path), tiny_tokenizer("mistral"))


def test_a_damaged_file_is_an_error_whatever_the_rows_may_be(write: Writer) -> None:
    assert message_of(write("a.jsonl", '{"text": "a"}\n{"text": '), on_bad_row="drop").startswith(
        "a.jsonl:2: not valid"
    )
    broken = '{"text": "a"}\n{"text": \n{"text": "b"}\n42\n{"text": "c"}\n\xff\n'
    path = write("b.jsonl", broken)
    result = prepared(path, on_bad_row="drop")
    assert rows_of(result) == {**rows_of(result), "read": 6, "kept": 3}
    assert rows_of(result)["dropped"] == {"a row is not an object": 1, "not valid JSON": 2}
    assert stable(message_of(path)) == snapshot("""\
b.jsonl:2: not valid JSON (one of 3 bad rows; 6 were read)
  seen:    Expecting value, column 9: '{"text":'; also b.jsonl:4: not an object (42); b.jsonl:6
  allowed: one complete object on each line
  change:  on_bad_row: drop leaves out the bad rows\
""")


def test_nothing_but_bad_rows(write: Writer) -> None:
    path = write("a.jsonl", {"x": 1}, {"y": 1})
    assert message_of(path, on_bad_row="drop").startswith("a.jsonl:1: not a known format\n")
    path = write("b.jsonl", {"messages": []}, {"messages": []})
    assert message_of(path, on_bad_row="drop").startswith(
        "dataset: no row is left\n  seen:    dropped: messages is empty 2\n"
    )


# --- what is learned


TURNS = chat("a", "first", "b", "second")


def test_train_on_last_turn(write: Writer) -> None:
    path = write("a.jsonl", {"messages": TURNS})
    assert learned(prepared(path).train[0]) == "first<|im_end|>second<|im_end|>"
    result = prepared(path, train_on_last_turn=True)
    assert learned(result.train[0]) == "second<|im_end|>"
    assert (result.report.labels.num_answers, result.report.labels.num_answers_left_out) == (1, 1)


def test_an_answer_in_a_prompt_is_context(write: Writer) -> None:
    path = write("a.jsonl", {"prompt": TURNS[:3], "completion": TURNS[3:]})
    assert learned(prepared(path).train[0]) == "second<|im_end|>"


# --- columns


def test_column_mapping(write: Writer) -> None:
    rows = [{"question": f"q{n}", "answer": "a", "weight": 3.5, "shop": f"s{n % 2}"} for n in range(4)]
    result = prepared(
        write("a.jsonl", *rows),
        column_mapping={"question": "instruction", "answer": "output", "weight": "ignore", "shop": "input"},
        split_by="shop",
        validation_size=2,
    )
    assert result.report.format == "alpaca"
    assert result.report.num_groups == 2
    swapped = write("b.jsonl", {"prompt": "answer", "completion": "question"})
    example = prepared(swapped, column_mapping={"prompt": "completion", "completion": "prompt"}).train[0]
    assert learned(example) == "answer<|im_end|>"


def test_a_mapping_that_does_not_fit(write: Writer) -> None:
    path = write("a.jsonl", {"question": "q", "answer": "a"}, {"question": "q", "answer": "a", "prompt": "p"})
    assert message_of(path, column_mapping={"qestion": "prompt"}) == (
        "column_mapping: no row has the column qestion\n"
        "  seen:    question, answer, prompt\n"
        "  change:  did you mean question?"
    )
    assert message_of(path, column_mapping={"question": "prompt", "answer": "completion"}) == (
        "column_mapping: question cannot become prompt: the file already has a column prompt\n"
        "  seen:    question, answer, prompt\n"
        "  allowed: each name once\n"
        "  change:  to drop the existing column, add prompt: ignore"
    )


def test_validation_rows_may_be_in_our_names_already(write: Writer) -> None:
    own = write("own.jsonl", {"prompt": "x", "completion": "y"})
    path = write("a.jsonl", {"question": "q", "answer": "a"})
    mapping = {"question": "prompt", "answer": "completion"}
    assert len(prepared(path, eval_dataset=str(own), column_mapping=mapping).validation) == 1
