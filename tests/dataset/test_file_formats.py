"""Several files may have several formats; within a file the first known row, or the most common format, decides."""

from __future__ import annotations

from typing import Any

import pytest

from solotune.dataset import Prepared, prepare
from solotune.dataset.readers.row import RowError
from solotune.errors import InputError
from tests.dataset.conftest import Writer, chat, config_of, tiny_tokenizer

CHATS = [{"messages": chat(f"What is {n}?", f"It is {n}.")} for n in range(6)]
ALPACA = [{"instruction": f"Name {n}.", "input": "", "output": f"name {n}"} for n in range(4)]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": f"q {n}"}, {"from": "gpt", "value": f"a {n}"}]} for n in range(3)
]


def prepared(paths: list[Any], **keys: Any) -> Prepared:
    return prepare(config_of([str(path) for path in paths], **keys), tiny_tokenizer("chatml"))


@pytest.mark.parametrize("on_bad_row", ["error", "drop"])
def test_files_of_several_formats_are_read_together(write: Writer, on_bad_row: str) -> None:
    paths = [
        write("a.jsonl", *CHATS),
        write("b.jsonl", *ALPACA),
        write("c.jsonl", *SHAREGPT),
        write("d.csv", "prompt,completion\na,b\n"),
    ]
    report = prepared(paths, on_bad_row=on_bad_row).report
    assert report.format == "messages, alpaca, sharegpt, prompt-completion"
    assert (report.num_read, report.num_train, dict(report.dropped)) == (14, 14, {})


def test_two_formats_in_one_file_are_bad_rows(write: Writer) -> None:
    paths = [write("a.jsonl", *CHATS), write("b.jsonl", *ALPACA, CHATS[0], CHATS[1])]
    with pytest.raises(RowError) as caught:
        prepared(paths)
    assert caught.value.problem == "b.jsonl:5: mixed formats: this row is messages (one of 2 bad rows; 12 were read)"
    assert "b.jsonl:6" in str(caught.value.seen)
    assert "on_bad_row: drop leaves out the bad rows" in str(caught.value.change)
    assert dict(prepared(paths, on_bad_row="drop").report.dropped) == {"mixed formats: this row is messages": 2}


def test_a_first_row_that_nobody_knows_is_one_bad_row(write: Writer) -> None:
    path = write("a.jsonl", {"meta": 1}, *CHATS)
    with pytest.raises(RowError, match=r"a.jsonl:1: not a known format") as caught:
        prepared([path])
    assert "on_bad_row: drop leaves out this row" in str(caught.value.change)
    assert prepared([path], on_bad_row="drop").report.num_train == 6


def test_a_file_of_which_no_row_is_known_is_refused_as_a_whole(write: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = write("b.jsonl", *({"a": n} for n in range(50)))
    for most in (1000, 10):
        monkeypatch.setattr("solotune.dataset.file_formats.MOST_UNKNOWN", most)
        with pytest.raises(InputError) as caught:
            prepared([write("a.jsonl", *CHATS), unknown])
        assert caught.value.problem == "b.jsonl:1: not a known format"
        assert "on_bad_row" not in str(caught.value)


def test_copies_are_kept_on_request_and_the_message_names_the_ways(write: Writer) -> None:
    path = write("a.jsonl", *CHATS, *[CHATS[0]] * 9)
    removed = prepared([path]).report
    assert (removed.num_train, dict(removed.dropped)) == (6, {"exact duplicate": 9})
    assert removed.notes()["copies"] == (
        "9 exact copies of rows removed; if they are meant, set dataset_exact_deduplication: false, "
        "or give the row a higher weight"
    )
    kept = prepared([path], dataset_exact_deduplication=False, validation_size=3)
    report = kept.report.to_json()
    assert (len(kept.train), len(kept.validation), report["rows"]["dropped"]) == (12, 3, {})
    assert (report["split"]["exact_duplicates"], report["split"]["copies_kept"]) == (0, 9)
    assert len(list(kept.manifest.sides())) == 6
