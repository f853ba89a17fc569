"""S5 and S6: truncated answers and padding with labels are found, and no other fault."""

from __future__ import annotations

import random

from tests.dataset.conftest import tiny_tokenizer
from tests.diagnosis.rules.rows import Bench, answered, each, sentence, talk, with_pad


def test_f24_answers_are_cut(bench: Bench) -> None:
    long = answered(talk(), lambda n, text: text * (4 if n % 2 else 1))
    tokens = sorted(len(e.input_ids) for e in bench.prepared(long, tiny_tokenizer("chatml"))[1].train)
    found = bench.only("F24", long, max_length=tokens[20])
    whole = int(found.fix.removeprefix("max_length: ").split()[0])
    assert tokens[-1] - 64 <= whole <= tokens[-1] + 64
    assert bench.codes(long, max_length=whole) == []
    assert bench.codes(long, max_length=tokens[20], overflow="split") == []
    assert "and dropped" in bench.only("F24", long, max_length=tokens[20], overflow="drop").message


def test_f25_the_prompt_fills_the_window(bench: Bench) -> None:
    rows = each(talk(), lambda n, m: [{**m[0], "content": m[0]["content"] * (9 if n % 4 == 0 else 1)}, m[1]])
    longest = max(len(e.input_ids) for e in bench.prepared(talk(), tiny_tokenizer("chatml"))[1].train)
    found = bench.only("F25", rows, max_length=longest + 20)
    assert found.evidence["dropped"] == 10
    assert found.fix.startswith(f"max_length: {2 * (longest + 20)}")


def test_f29_padding_in_the_texts(bench: Bench) -> None:
    rows = [{"text": sentence(random.Random(n)) + "<|endoftext|>" * (n % 7)} for n in range(40)]
    assert bench.only("F29", rows, "gpt2").evidence["rows_with"] >= 10
    tokenizer = with_pad("gpt2")
    rows = [{"text": sentence(random.Random(n)) + "<|endoftext|>" + "<pad>" * (n % 3)} for n in range(40)]
    assert "<pad>" in bench.only("F29", rows, tokenizer).message
