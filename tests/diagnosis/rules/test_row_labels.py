"""S4: each fault of the mask is found, and no other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from solotune.dataset import Example
from tests.dataset.conftest import CHATML, tiny_tokenizer
from tests.diagnosis.rules.rows import Bench, Change, each, masked, talk, with_pad, with_template


def without_ends(tokenizer: PreTrainedTokenizerBase) -> Change:
    special = list(tokenizer.all_special_ids) + [i for i, t in tokenizer.added_tokens_decoder.items() if t.special]
    return masked(lambda row: row.loss_mask & ~np.isin(row.input_ids, special))


@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral"])
def test_f17_the_pad_id_is_masked(bench: Bench, family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    by_id = masked(lambda row: row.loss_mask & (row.input_ids != tokenizer.pad_token_id))
    found = bench.only("F17", talk(), tokenizer, by_id)
    assert found.evidence["pad_id"] == tokenizer.pad_token_id
    assert found.severity == "error"


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "mistral", "qwen3"])
def test_f19_the_end_of_turn_is_not_learned(bench: Bench, family: str) -> None:
    tokenizer = with_pad(family)
    found = bench.only("F19", talk(turns=2), tokenizer, without_ends(tokenizer))
    assert found.severity == "error"
    assert found.evidence["answers_with"] == 60


def test_f19_with_a_line_break_that_is_learned_behind_the_end(bench: Bench) -> None:
    """The end is there, so it is not missing (F10)."""
    tokenizer = with_pad("chatml")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    by_id = masked(lambda row: row.input_ids != end)
    assert "F10" not in bench.codes(talk(), tokenizer, by_id, assistant_only_loss=False)
    assert "F19" in bench.codes(talk(), tokenizer, by_id, assistant_only_loss=False)


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "mistral"])
def test_f20_prompts_are_learned(bench: Bench, family: str) -> None:
    found = bench.only("F20", talk(), family, masked(lambda row: np.arange(len(row.loss_mask)) > 0))
    assert found.evidence["rows_with"] == found.evidence["rows_read"] == 30


def test_f20_thinking_that_repeats_the_question(bench: Bench) -> None:
    template = CHATML.replace("{{ m.content }}", "{{ m.reasoning_content }}{{ m.content }}")
    rows = each(talk(), lambda n, m: [m[0], {**m[1], "reasoning_content": f"They ask: {m[0]['content']} Well."}])
    assert bench.codes(rows, with_template("chatml", template)) == []


def test_f20_only_the_end_of_the_prompt(bench: Bench) -> None:
    def early(row: Example) -> np.ndarray:
        learned = row.loss_mask.copy()
        first = int(np.flatnonzero(learned)[0])
        learned[first - 35 : first] = True
        return learned

    assert bench.only("F20", talk(), change=masked(early))


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "mistral"])
def test_f23_the_mask_is_inverted(bench: Bench, family: str) -> None:
    found = bench.only("F23", talk(), family, masked(lambda row: ~row.loss_mask))
    assert found.evidence["rows_with"] == 30


@pytest.mark.parametrize(("every", "severity"), [(3, "error"), (5, "warning")])
def test_f21_rows_without_labels(bench: Bench, every: int, severity: str) -> None:
    def some(rows: list[Example]) -> list[Example]:
        return [replace(r, loss_mask=np.zeros_like(r.loss_mask)) if n % every == 0 else r for n, r in enumerate(rows)]

    found = bench.only("F21", talk(), change=some)
    assert (found.severity, found.affected) == (severity, 1 / every)
