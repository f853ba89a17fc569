"""The whole way: rows read = rows kept + rows dropped by reason, and the same tokens every time."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inline_snapshot import snapshot
from transformers import PreTrainedTokenizerBase

from solotune.dataset import Example, Prepared, prepare, render_prompt
from solotune.errors import CheckError, InputError
from tests.dataset.conftest import Writer, chat, config_of, tiny_tokenizer
from tests.messages import stable

CHATML = tiny_tokenizer("chatml")


def prepared(path: Path | str | list[str], **keys: Any) -> Prepared:
    return prepare(config_of(path, **keys), CHATML)


def message_of(path: Path, **keys: Any) -> str:
    with pytest.raises(InputError) as caught:
        prepared(path, **keys)
    return str(caught.value)


def rows(count: int) -> list[dict[str, Any]]:
    return [{"messages": chat(f"What is {n} and {n * n}?", f"It is {n} of {n * 7}.")} for n in range(count)]


def learned(example: Example, tokenizer: PreTrainedTokenizerBase = CHATML) -> str:
    return tokenizer.decode(example.input_ids[example.loss_mask])


def test_examples(write: Writer) -> None:
    result = prepared(write("a.jsonl", *rows(3)))
    assert [example.where for example in result.train] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    assert [learned(example) for example in result.train] == [f"It is {n} of {n * 7}.<|im_end|>" for n in range(3)]
    example = result.train[1]
    assert (example.input_ids.dtype, example.loss_mask.dtype) == (np.int32, bool)
    assert example.messages == chat("What is 1 and 1?", "It is 1 of 7.")
    assert example.prompt_ids.tolist() == render_prompt(CHATML, example.messages[:1])


def test_report(write: Writer) -> None:
    long = "word " * 200
    path = write(
        "a.jsonl",
        *rows(20),
        rows(20)[3],
        {"messages": chat("empty", " ")},
        {"messages": chat(long, "the answer is beyond")},
        {"messages": chat("cut", long)},
    )
    days = {date.today().isoformat()}
    result = prepared(path, max_length=100, validation_size=0.2, seed=1)
    report = result.report.to_json()
    assert report.pop("rendered_on") in days | {date.today().isoformat()}  # midnight may come in between
    everything = [*result.train, *result.validation]
    total, supervised = (
        sum(int(v) for v in values)
        for values in zip(*((len(example.input_ids), example.loss_mask.sum()) for example in everything), strict=True)
    )
    histograms, examples = report.pop("histograms"), report.pop("examples")
    answer_ends = {str(token): rows for token, rows in Counter(e.last_loss_token for e in result.train).items()}
    assert report == {
        "format": "messages",
        "rows": {
            "read": 24,
            "kept": 21,
            "dropped": {"answer beyond max_length": 1, "empty answer": 1, "exact duplicate": 1},
            "truncated": 2,
            "answers_cut": 2,
            "cut_as_text": 0,
            "split": 0,
            "added_by_split": 0,
            "parts_without_label": 0,
            "without_label": 1,
            "with_control_tokens_as_text": 0,
        },
        "unused_keys": {},
        "system_prompt": None,
        "answer_ends": answer_ends,
        "unused": [],
        "prompt_format": "chat",
        "text_formats": {},
        "not_rendered": {},
        "tokens": {"total": total, "supervised": supervised, "supervised_share": round(supervised / total, 4)},
        "weights": {"rows": 0, "answers": 0, "sum": supervised},
        "labels": {
            "answers": 21,
            "answers_left_out": 0,
            "rows_with_end_supervised": 20,
            "rows_with_end_not_supervised": 1,
            "rows_without_end_token": 0,
            "rows_where_prompt_is_not_a_prefix": 0,
            "tokens_across_the_begin_of_an_answer": 0,
            "tokens_cut": result.report.labels.num_tokens_cut,
            "supervised_tokens_cut": result.report.labels.num_labels_cut,
            "answers_without_their_end": 1,
            "answers_beyond_max_length": 0,
            "answers_dropped": 0,
            "rows_by_leading_bos": {"0": 21},
        },
        "split": {
            "train": len(result.train),
            "validation": len(result.validation),
            "groups": 22,
            "exact_duplicates": 1,
            "copies_kept": 0,
            "near_duplicates": 0,
            "close_to_training": 0,
        },
        "sha256": {"train": result.report.train_sha256, "validation": result.report.validation_sha256},
        "schema_nulls": {},
        "beside_rows": {},
        "findings": [],
        "checked": False,
    }
    assert sum(histograms["row_tokens"]["counts"]) == 22
    assert sum(histograms["supervised_share"]["counts"]) == 21
    assert [one["where"] for one in examples] == [one.where for one in result.train[:3]]
    assert max(len(example.input_ids) for example in everything) == 100
    assert len(result.validation) in (3, 4)


def test_truncation_keeps_the_start(write: Writer) -> None:
    path = write("a.jsonl", {"messages": chat("a", "word " * 50)})
    whole, cut = prepared(path).train[0], prepared(path, max_length=40).train[0]
    assert cut.input_ids.tolist() == whole.input_ids[:40].tolist()
    assert cut.loss_mask.tolist() == whole.loss_mask[:40].tolist()
    assert learned(whole).endswith("<|im_end|>")
    assert not learned(cut).endswith("<|im_end|>")


def test_all_tokens_but_the_first_when_asked_for(write: Writer) -> None:
    example = prepared(write("a.jsonl", *rows(1)), assistant_only_loss=False).train[0]
    assert example.loss_mask.tolist() == [False] + [True] * (len(example.input_ids) - 1)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    contents=st.lists(
        st.lists(
            st.sampled_from(["a", "b c", "  ", "<|im_end|>", "long " * 30, "é漢\n"]), min_size=2, max_size=4
        ).filter(lambda row: len(row) % 2 == 0),
        min_size=1,
        max_size=12,
    ),
    max_length=st.sampled_from([8, 20, 60]),
    validation_size=st.sampled_from([0, 1, 0.3]),
)
def test_rows_add_up(tmp_path: Path, contents: list[list[str]], max_length: int, validation_size: float) -> None:
    import json

    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": chat(*row)}) + "\n" for row in contents))
    try:
        result = prepared(path, max_length=max_length, validation_size=validation_size)
    except InputError:
        return  # nothing left, or nothing to hold out: said, not silent
    report = result.report.to_json()
    assert report["rows"]["read"] == len(contents) == report["rows"]["kept"] + sum(report["rows"]["dropped"].values())
    assert report["rows"]["kept"] == len(result.train) + len(result.validation)
    for example in (*result.train, *result.validation):
        assert len(example.input_ids) == len(example.loss_mask) <= max_length
        assert example.loss_mask.any()
        assert not example.loss_mask[0]


def test_the_same_twice_and_another_when_anything_changes(write: Writer) -> None:
    path = write("a.jsonl", *rows(10))

    def hashes(**keys: Any) -> tuple[str, str]:
        report = prepared(path, **{"validation_size": 2, **keys}).report
        return report.train_sha256, report.validation_sha256

    first = hashes()
    assert hashes() == first
    longest = max(len(example.input_ids) for example in prepared(path).train)
    changes = ({"seed": 1}, {"max_length": longest - 1}, {"assistant_only_loss": False}, {"validation_size": 3})
    for change in changes:
        assert hashes(**change) != first, change


# --- texts


@pytest.mark.parametrize(
    ("family", "row", "text", "answer"),
    [
        ("gpt2", {"text": "Hello there"}, "Hello there<|endoftext|>", "ello there<|endoftext|>"),
        ("gpt2", {"text": "Hello there<|endoftext|>"}, "Hello there<|endoftext|>", "ello there<|endoftext|>"),
        ("gpt2", {"prompt": "Q: a\nA:", "completion": " b"}, "Q: a\nA: b<|endoftext|>", " b<|endoftext|>"),
        ("chatml", {"text": "<|im_start|>user\na<|im_end|>"}, "<|im_start|>user\na<|im_end|>", "user\na<|im_end|>"),
    ],
)
def test_texts_end_once(write: Writer, family: str, row: dict[str, str], text: str, answer: str) -> None:
    tokenizer = tiny_tokenizer(family)
    example = prepare(config_of(write("a.jsonl", row)), tokenizer).train[0]
    assert tokenizer.decode(example.input_ids) == text
    assert learned(example, tokenizer) == answer or text.startswith("Hello")
    assert example.messages == []
    assert not example.loss_mask[0]


def test_texts_begin_once(write: Writer) -> None:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tiny_tokenizer("llama3").backend_tokenizer.to_str())
    bos, eos = "<|begin_of_text|>", "<|eot_id|>"
    backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    path = write("a.jsonl", {"text": "Hello there"}, {"text": f"{bos}Hello there, how are you?"})
    examples = prepare(config_of(path), tokenizer).train
    assert [example.input_ids.tolist().count(tokenizer.bos_token_id) for example in examples] == [1, 1]
    assert [tokenizer.decode(example.input_ids) for example in examples] == [
        f"{bos}Hello there{eos}",
        f"{bos}Hello there, how are you?{eos}",
    ]
    assert learned(examples[0], tokenizer) == f"Hello there{eos}"


# --- groups, validation of one's own


def test_split_by(write: Writer) -> None:
    path = write("a.jsonl", *({**row, "shop": n % 4} for n, row in enumerate(rows(20))))
    result = prepared(path, split_by="shop", validation_size=5)
    assert len({int(example.where.split(":")[1]) % 4 for example in result.validation}) == 1
    assert (len(result.validation), result.report.num_groups) == (5, 4)
    assert len({example.group for example in result.validation} - {None}) == 1
    assert message_of(path, split_by="store", validation_size=5) == (
        "a.jsonl:1: split_by: store is missing (one of 20 bad rows; 20 were read)\n"
        "  seen:    the keys messages, shop; also a.jsonl:2; a.jsonl:3; ...\n"
        "  allowed: a key that every row has, with a text or a number"
    )


def test_validation_rows_of_ones_own(write: Writer) -> None:
    mine = write("mine.jsonl", *rows(10)[8:])
    result = prepared(write("a.jsonl", *rows(8), rows(1)[0]), eval_dataset=str(mine))
    assert [example.where for example in result.validation] == ["mine.jsonl:1", "mine.jsonl:2"]
    assert len({example.group for example in result.validation}) == 2
    report = result.report.to_json()
    assert report["rows"]["read"] == 11
    assert report["rows"]["dropped"] == {"exact duplicate": 1}
    with pytest.raises(CheckError) as caught:
        prepared(write("b.jsonl", *rows(10)), eval_dataset=str(mine))
    assert stable(caught.value) == snapshot("""\
eval_dataset: 2 of 2 validation rows are equal or close to training rows
  seen:    mine.jsonl:1 equals b.jsonl:9; mine.jsonl:2 equals b.jsonl:10
  allowed: no row on both sides: the loss on rows seen in training says nothing about new rows
  change:  remove these rows from dataset or from eval_dataset, or remove eval_dataset to hold out rows of dataset instead\
""")


# --- nothing left


def test_nothing_left(write: Writer) -> None:
    assert message_of(write("a.jsonl", {"messages": chat("a", " ")})) == (
        "dataset: no row is left\n  seen:    dropped: empty answer 1\n  change:  check the rows of the file"
    )
    path = write("b.jsonl", *({"messages": chat("word " * 50 + str(n), "b")} for n in range(3)))
    assert message_of(path, max_length=10) == (
        "none of the 3 training rows can be used\n"
        "  seen:    dropped: answer beyond max_length 3\n"
        "  allowed: at least one row whose answer starts within max_length: 10 tokens\n"
        "  change:  raise max_length, or shorten the prompts"
    )
    path = write("c.jsonl", *rows(3), {"messages": chat("word " * 50, "b"), "side": "v"})
    own = write("own.jsonl", {"messages": chat("other " * 50, "b")})
    assert message_of(path, max_length=40, eval_dataset=str(own)).startswith(
        "none of the 1 validation rows can be used\n"
    )


def test_rows_without_a_template(write: Writer) -> None:
    with pytest.raises(InputError) as caught:
        prepare(config_of(write("a.jsonl", *rows(1))), tiny_tokenizer("gpt2"))
    assert stable(caught.value) == snapshot("""\
the tokenizer has no chat template, but the rows are chats
  seen:    TokenizersBackend (a base model?)
  allowed: a model with a chat template, or rows of plain text or prompt + completion texts
  change:  use the instruct model, or set chat_template_path to a Jinja file such as the instruct model's\
""")


def test_forged_tokens_are_counted(write: Writer) -> None:
    path = write("a.jsonl", *rows(2), {"messages": chat("<|im_end|>", "b")})
    assert prepared(path).report.to_json()["rows"]["with_control_tokens_as_text"] == 1


def test_the_demos_model_and_rows(smollm2: PreTrainedTokenizerBase) -> None:
    tickets = Path(__file__).parents[2] / "examples" / "tickets.jsonl"
    result = prepare(config_of(tickets, split_by="shop", validation_size=60, max_length=256), smollm2)
    assert (len(result.train), len(result.validation)) == (660, 60)
    assert all(learned(example, smollm2).endswith("<|im_end|>") for example in result.train)


def test_no_torch_at_import() -> None:
    code = "import solotune.dataset, sys; assert not {'torch', 'transformers', 'datasets'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
