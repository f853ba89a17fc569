"""S5 and S6: truncated answers and padding with labels are found, and no other fault."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from solotune.dataset import Example
from solotune.diagnosis.rules import ask_all, rules
from solotune.diagnosis.rules.length import prompt_cut, rows_gone_in_truncation
from solotune.diagnosis.run_facts import RunFacts, Settings
from solotune.diagnosis.verdict import decide
from tests.dataset.conftest import chat, tiny_tokenizer
from tests.diagnosis.rules.rows import Bench, Rows, answered, each, sentence, talk, with_pad


def limit_of(bench: Bench, rows: Rows) -> int:
    """A max_length with which these rows fit."""
    return 20 + max(len(e.input_ids) for e in bench.prepared(rows, tiny_tokenizer("chatml"))[1].train)


def test_f24_answers_are_cut(bench: Bench) -> None:
    long, limit = answered(talk(), lambda n, text: text * (5 if n % 2 else 1)), limit_of(bench, talk())
    found = bench.only("F24", long, max_length=limit)
    assert (found.severity, found.affected) == ("error", 0.5)
    whole = int(found.fix.removeprefix("max_length: ").split()[0])
    assert whole % 64 == 0 and bench.codes(long, max_length=whole) == []
    assert bench.codes(long, max_length=limit, overflow="split") == []
    dropped = bench.only("F24", long, max_length=limit, overflow="drop")
    assert "and dropped" in dropped.message and (dropped.severity, dropped.affected) == ("error", 0.5)


def test_f24_is_a_remark_as_long_as_most_answers_have_their_end(bench: Bench) -> None:
    some, limit = answered(talk(), lambda n, text: text * (5 if n % 4 == 0 else 1)), limit_of(bench, talk())
    for overflow in ("truncate", "drop"):
        found = bench.only("F24", some, max_length=limit, overflow=overflow)
        assert (found.severity, found.affected) == ("warning", 0.25)


def test_f24_counts_ends_of_answers_and_not_rows(bench: Bench) -> None:
    """Chats of six answers, all truncated in the fifth: one end of five is lost."""
    said = "it is as it was said before, and as it will be said again"
    chats = [{"messages": chat(f"Number {n}?", said, *["And then?", said] * 5)} for n in range(40)]
    row = bench.prepared(chats, tiny_tokenizer("chatml"), validation_size=0)[1].train[0]
    limit = int(np.flatnonzero(np.diff(row.loss_mask.astype(int)) > 0)[4]) + 10
    found = next(f for f in bench.find(chats, max_length=limit, validation_size=0) if f.code == "F24")
    assert (found.severity, found.affected) == ("warning", 0.2)


def test_f24_is_a_remark_on_documents(bench: Bench) -> None:
    """Plain texts have no end that the model would have to learn."""
    texts = [{"text": sentence(random.Random(n), 60)} for n in range(40)]
    found = bench.only("F24", texts, "gpt2", max_length=200)
    assert (found.severity, found.affected) == ("warning", 1.0) and "texts" in found.message


def test_f25_the_prompt_fills_the_window(bench: Bench) -> None:
    def rows(every: int) -> Rows:
        return each(talk(), lambda n, m: [{**m[0], "content": m[0]["content"] * (9 if n % every == 0 else 1)}, m[1]])

    limit = limit_of(bench, talk())
    found = bench.only("F25", rows(4), max_length=limit)
    assert (found.evidence["dropped"], found.severity, found.affected) == (10, "warning", 0.25)
    wanted = int(found.fix.removeprefix("max_length: ").split()[0])
    assert wanted % 64 == 0 and bench.codes(rows(4), max_length=wanted) == []
    assert bench.only("F25", rows(2), max_length=limit).severity == "error"


def test_f25_before_f24_where_most_rows_have_nothing_left(bench: Bench) -> None:
    """The rows that have an answer all lose its end, but they are fewer. Of another trainer, which keeps the rest."""
    row = next(iter(bench.prepared(talk(4), tiny_tokenizer("chatml"))[1].train))
    begin = int(np.flatnonzero(row.loss_mask)[0])
    kept = [replace(row, input_ids=row.input_ids[a : a + 12], loss_mask=row.loss_mask[a : a + 12])
            for a in [begin - 12] * 12 + [begin - 4] * 8]  # fmt: skip
    run_facts = RunFacts("a run", Settings({"max_length": 12}), tokenizer=tiny_tokenizer("chatml"), train=kept)
    found = {signal.code: signal for signal in ask_all(run_facts)[0] if signal.code in ("F24", "F25")}
    assert found["F25"].affected == 0.6 and found["F24"].affected == 0.4
    assert decide("run", list(found.values())).culprits[0].fault == "F25"


def test_f25_says_when_no_max_length_helps(bench: Bench) -> None:
    rows = each(talk(), lambda n, m: [{**m[0], "content": m[0]["content"] * (9 if n % 4 else 1)}, m[1]])
    model = bench.model(config={"vocab_size": 1000, "max_position_embeddings": 256})
    found = next(f for f in bench.find(rows, max_length=250, model_name_or_path=model) if f.code == "F25")
    assert "the model has 256 positions" in found.fix and "max_length:" not in found.fix


def test_a_few_rows_without_a_label_do_not_hide_many_answers_without_an_end(bench: Bench) -> None:
    rows = answered(talk(60), lambda n, text: text * (5 if n % 2 else 1))
    limit = limit_of(bench, talk(60))
    rows = each(rows, lambda n, m: [{**m[0], "content": m[0]["content"] * (30 if n < 4 else 1)}, m[1]])
    found = {finding.code: finding for finding in bench.find(rows, max_length=limit)}
    assert (found["F24"].severity, found["F25"].severity) == ("error", "warning")
    decided = decide("run", [finding.signal for finding in found.values() if finding.signal])
    assert [culprit.fault for culprit in decided.culprits] == ["F24"]
    assert [remark.fault for remark in decided.remarks] == ["F25"]


def rows_without_beginning(lost: int, begin: int = 0) -> list[Example]:
    """Sixty rows, some of which are at the limit of 40 tokens and begin in the middle."""
    rows = [np.arange(20 + n % 9) + 5 for n in range(60 - lost)] + [np.arange(n, n + 40) % 90 + 9 for n in range(lost)]
    made = [np.concatenate(([1], ids[1:-1], [2])) for ids in rows]
    for ids in made[60 - lost :]:
        ids[0] = 50 + begin
    return [Example(ids.astype(np.int32), np.arange(len(ids)) > 9, f"row {n}", []) for n, ids in enumerate(made)]


@pytest.mark.parametrize(("lost", "kind"), [(30, "invariant"), (6, "remark")])
def test_f26_beginnings_are_lost(lost: int, kind: str) -> None:
    for keys in ({}, {"truncation_mode": "keep_end"}):
        facts = RunFacts("run", Settings({"max_length": 40, **keys}), train=rows_without_beginning(lost))
        signal = prompt_cut(facts)
        assert signal is not None and (signal.kind, signal.affected) == (kind, lost / 60)
    ours = Settings({"max_length": 40, "tool": "solotune"})
    assert all(not one.signals(replace(facts, settings=ours)) for one in rules()["F26"])


def test_f26_is_a_remark_if_the_last_turns_have_their_questions() -> None:
    tokenizer = tiny_tokenizer("chatml")
    rows = []
    for row in talk(20, turns=4):
        ids = np.array(tokenizer.apply_chat_template(row["messages"], return_dict=False)[-180:], np.int32)
        rows.append(Example(ids, np.ones(len(ids), bool), "row", row["messages"]))
    keys = {"max_length": 180, "truncation_mode": "keep_end"}
    signal = prompt_cut(RunFacts("run", Settings(keys), tokenizer=tokenizer, train=rows))
    assert signal is not None and signal.kind == "remark"


def test_a_row_that_ends_as_complete_ones_do_is_no_full_window() -> None:
    """Every token has a label: without its beginning a row is F26, without its answer F25."""
    tokenizer, rows = tiny_tokenizer("chatml"), {"end": [], "start": []}
    for row in talk(20):
        ids = np.array(tokenizer.apply_chat_template(row["messages"], return_dict=False), np.int32)
        for side, kept in (("end", ids[-20:]), ("start", ids[:20])):
            rows[side].append(Example(kept, np.ones(20, bool), "row", row["messages"]))
    found = {side: {s.code for s in ask_all(RunFacts("run", Settings({"max_length": 20}), tokenizer=tokenizer, train=kept))[0]
                    if s.kind == "invariant"} for side, kept in rows.items()}  # fmt: skip
    assert "F25" not in found["end"] and "F26" in found["end"]
    assert "F25" in found["start"] and "F26" not in found["start"]


@pytest.mark.parametrize(("written", "code"), [({"max_seq_length": 6}, "F02"), ({"max_seq_length": 64}, "")])
def test_a_length_under_another_name_and_longer_rows(written: dict[str, int], code: str) -> None:
    import torch

    ids = torch.arange(5, 25)[None].repeat(4, 1)
    batches = [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}]
    run_facts = RunFacts("run", Settings(written), batches=batches)
    assert {s.code for s in ask_all(run_facts)[0] if s.code == "F02"} == ({code} if code else set())


def test_f25_counts_of_another_trainer() -> None:
    for left, kind in ((50, "invariant"), (90, "remark")):
        signal = rows_gone_in_truncation(RunFacts("run", Settings({"rows_in": 100, "rows_out": left})))
        assert signal is not None and (signal.kind, signal.affected) == (kind, 1 - left / 100)
    assert rows_gone_in_truncation(RunFacts("run", Settings({"rows_in": 100, "rows_out": 99}))) is None


def test_f29_padding_in_the_texts(bench: Bench) -> None:
    rows = [{"text": sentence(random.Random(n)) + "<|endoftext|>" * (n % 7)} for n in range(40)]
    assert bench.only("F29", rows, "gpt2").evidence["rows_with"] >= 10
    tokenizer = with_pad("gpt2")
    rows = [{"text": sentence(random.Random(n)) + "<|endoftext|>" + "<pad>" * (n % 3)} for n in range(40)]
    assert "<pad>" in bench.only("F29", rows, tokenizer).message
