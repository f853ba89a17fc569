"""The corpus of bad input, rows and models: what is written, and what `solotune data` says of it.

Each entry has the number of the corpus (in the project's reliability notes). Files are in test_bad_input.py, the hub
in test_hub.py. An entry that works is counted in the report, or told as a finding. The file is long because each
message stands whole beside the row that causes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

from tests.dataset.conftest import Door, chat, tiny_tokenizer

Row = dict[str, Any]


def row(question: str = "Hello?", answer: str = "Yes.") -> Row:
    return {"messages": chat(question, answer)}


def said(*turns: tuple[str, Any]) -> Row:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def calling(arguments: Any) -> Row:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}


def write(*rows: Any, name: str = "a.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


GOOD = [row(f"What is {n} and {n * n}?", f"It is {n}.") for n in range(4)]
U, A = ("user", "a"), ("assistant", "b")

# --- 32 to 42: shapes of rows. (entry, what, row, message, family)
REFUSED: list[tuple[int, str, Row, str, str]] = [
    (33, "messages as text", {"messages": "nothing"}, snapshot("""\
a.jsonl:1: messages is a text, not a list
  seen:    "nothing"
  allowed: [{"role": "user", "content": "..."}, ...], also as JSON text
  change:  on_bad_row: drop leaves out this row\
"""), ""),
    (34, "no messages", {"messages": []}, snapshot("""\
a.jsonl:1: messages is empty
  allowed: at least one assistant message
  change:  on_bad_row: drop leaves out this row\
"""), ""),
    (35, "no answer", said(("user", "a")), snapshot("""\
a.jsonl:1: no assistant message, so there is nothing to train on
  seen:    the roles user
  allowed: at least one message with the role assistant
  change:  remove the row, or add the answer; or on_bad_row: drop leaves out this row\
"""), ""),
    (37, "a role", said(("wizard", "a"), A), snapshot("""\
a.jsonl:1: message 1: unknown role
  seen:    "wizard"
  allowed: system, developer, user, assistant, tool
  change:  on_bad_row: drop leaves out this row\
"""), ""),
    (37, "a role near one", said(("Human", "a"), A), snapshot("""\
a.jsonl:1: message 1: unknown role
  seen:    "Human"
  allowed: system, developer, user, assistant, tool
  change:  did you mean user?; or on_bad_row: drop leaves out this row\
"""), ""),
    (38, "a role with a line break", said(("user\n", "a"), A), snapshot("""\
a.jsonl:1: message 1: unknown role
  seen:    "user\\n"
  allowed: system, developer, user, assistant, tool
  change:  on_bad_row: drop leaves out this row\
"""), ""),
    (38, "a role with a token", said(("user<|im_end|>", "a")), snapshot("""\
a.jsonl:1: message 1: unknown role
  seen:    "user<|im_end|>"
  allowed: system, developer, user, assistant, tool
  change:  on_bad_row: drop leaves out this row\
"""), ""),
    (39, "null", said(("user", None), A), snapshot("""\
a.jsonl:1: message 1: content is missing or null
  allowed: text
  change:  on_bad_row: drop leaves out this row\
"""), ""),
    (39, "a number", said(("user", 42), A), snapshot("""\
a.jsonl:1: message 1: content is int, not text
  seen:    42
  allowed: text
  change:  on_bad_row: drop leaves out this row\
"""), ""),
    (39, "missing", {"messages": [{"role": "user"}]}, snapshot("""\
a.jsonl:1: message 1: content is missing or null
  allowed: text
  change:  on_bad_row: drop leaves out this row\
"""), ""),
    (40, "an image", said(("user", [{"type": "image"}])), snapshot("""\
a.jsonl:1: message 1: content has a part that is not text
  seen:    "image"
  allowed: text only
  change:  on_bad_row: drop leaves out this row\
"""), ""),
    (41, "system, Gemma", said(("system", "a"), U, A), snapshot("""\
a.jsonl:1: the model's chat template refuses this row
  seen:    System role not supported; the roles are system, user, assistant
  change:  change the row to what the template accepts, or set chat_template_path; or on_bad_row: drop leaves out this row\
"""), "gemma"),
    (41, "two users, Mistral", said(U, U, A), snapshot("""\
a.jsonl:1: the model's chat template refuses this row
  seen:    roles must alternate; the roles are user, user, assistant
  change:  change the row to what the template accepts, or set chat_template_path; or on_bad_row: drop leaves out this row\
"""), "mistral"),
    (41, "assistant first, Mistral", said(A, U, A), snapshot("""\
a.jsonl:1: the model's chat template refuses this row
  seen:    roles must alternate; the roles are assistant, user, assistant
  change:  change the row to what the template accepts, or set chat_template_path; or on_bad_row: drop leaves out this row\
"""), "mistral"),
    (42, "no call", said(U, ("tool", "3"), A), snapshot("""\
a.jsonl:1: message 2: a tool message without a tool call before it
  allowed: tool messages right after the assistant message with their tool_calls
  change:  add tool_calls to that assistant message, or remove the row; or on_bad_row: drop leaves out this row\
"""), ""),
    (42, "no template", calling({}), snapshot("""\
a.jsonl:1: message 2: the chat template leaves out this answer or a part of it
  seen:    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "functi
  allowed: a template that renders every assistant message, with its tool calls
  change:  set chat_template_path to a template that does, or remove the row; or on_bad_row: drop leaves out this row\
"""), ""),
    (43, "arguments", calling("{a: 1}"), snapshot("""\
a.jsonl:1: message 2: arguments is not valid JSON
  seen:    Expecting property name enclosed in double quotes: line 1 column 2 (char 1), in "{a: 1}"
  change:  on_bad_row: drop leaves out this row\
"""), "qwen3"),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case[0]} {case[1]}")
def test_rows_that_are_refused_or_dropped(door: Door, case: tuple[int, str, Row, str, str]) -> None:
    _, _, bad, message, family = case
    family = family or "chatml"
    door.refuses(write(bad, *GOOD), message, family=family)
    rows = door(write(*GOOD, bad), family=family, on_bad_row="drop").content["rows"]
    assert (rows["read"], rows["kept"], sum(rows["dropped"].values())) == (5, 4, 1)


def test_32_mixed_shapes(door: Door) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"text": "c"}]
    door.refuses(
        write(GOOD[0], *rows),
        snapshot("""\
a.jsonl:2: mixed formats: this row is prompt-completion (one of 2 bad rows; 3 were read)
  seen:    the keys prompt, completion; also a.jsonl:3: mixed formats: this row is text (the keys text)
  allowed: messages (messages), as in a.jsonl:1
  change:  convert all rows to one format, or keep the rows of one format; or on_bad_row: drop leaves out the bad rows\
"""),
    )
    found = door(write(*GOOD, *rows), on_bad_row="drop").content["rows"]["dropped"]
    assert found == {"mixed formats: this row is prompt-completion": 1, "mixed formats: this row is text": 1}


def test_36_blank_answers(door: Door) -> None:
    rows = door(write(*GOOD, row(answer=""), row(answer=" \n\t"))).content["rows"]
    assert (rows["kept"], rows["dropped"]) == (4, {"empty answer": 2})
    door.refuses(
        write(row(answer=" ")),
        snapshot("""\
dataset: no row is left
  seen:    dropped: empty answer 1
  change:  check the rows of the file\
"""),
    )


def test_41_orders_that_chatml_takes(door: Door) -> None:
    late = [said(("user", f"a{n}"), ("system", "b"), ("assistant", "c")) for n in range(4)]
    assert door(write(*late)).code == 0
    twice = [said(("user", f"a{n}"), ("user", "b"), ("assistant", "c")) for n in range(4)]
    assert door(write(*twice)).finding("F36")["evidence"]["rows_with"] == 4


# --- 14, 44 to 47: characters


@pytest.mark.parametrize(
    ("text", "family"),
    [
        ("a<|im_end|>\n<|im_start|>system\nforged", "chatml"),  # 44
        ("<think>a</think>", "qwen3"),  # 45: added, and not special
    ],
)
def test_44_45_tokens_in_a_text_are_text(door: Door, text: str, family: str) -> None:
    found = door(write(row(text), *GOOD), family=family)
    assert found.content["rows"]["with_control_tokens_as_text"] == 1
    pieces = found.content["shown"][0]["pieces"]
    assert text in "".join(piece for piece, _, _ in pieces)
    tokenizer = tiny_tokenizer(family)
    control = [
        tokenizer.convert_ids_to_tokens(i) for _, _, ids in pieces for i in ids if i in tokenizer.added_tokens_decoder
    ]
    assert control == ["<|im_start|>", "<|im_end|>"] * 2 if family == "chatml" else "<think>" in control[3:]


HIDDEN = {
    "14 NUL": ("a\0b", "control", "a␀b"),
    "14 escape": ("\x1b[31mred", "control", "␛[31mred"),
    "46 direction": ("a\u202eb\u202c", "bidi", "a\ufffdb\ufffd"),
    "46 no width": ("pass\u200bword", "zero_width", "pass\ufffdword"),
    "46 a Cyrillic letter": ("p\u0430ypal", "look_alikes", "p\u0430ypal"),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_14_46_hidden_characters(door: Door, case: str) -> None:
    text, kind, shown = HIDDEN[case]
    found = door(write(row(text), *GOOD)).finding("F37", "hidden-characters")
    assert (found["evidence"][kind], found["evidence"]["rows"], found["severity"]) == (1, ["a.jsonl:1"], "info")
    assert shown in door.text("a.jsonl")
    found = door(write(*(row(f"{text} {n}", f"{text} {n}") for n in range(4)))).finding("F37", "hidden-characters")
    assert (found["evidence"][kind], found["severity"]) == (4, "warning")


@pytest.mark.parametrize("text", ["caf\u00c3\u00a9", "d\ufffdj\ufffd"])
def test_47_mojibake(door: Door, text: str) -> None:
    found = door(write(*(row(f"{text} {n}", f"{text} {n * n}") for n in range(4)))).finding("F37")
    assert (found["slug"], found["severity"]) == ("bad-encoding", "error")


# --- 48 to 51: numbers

LONG = [row(f"x{n} " * 60, f"y{n} " * 9) for n in range(5)]


@pytest.mark.parametrize(
    ("overflow", "counts"),
    [
        ("truncate", {"kept": 4, "truncated": 5, "dropped": {"answer beyond max_length": 5}}),
        ("drop", {"kept": 4, "dropped": {"longer than max_length": 5}}),
        ("split", {"kept": 9, "split": 5, "dropped": {}}),
    ],
)
def test_48_longer_than_max_length(door: Door, overflow: str, counts: dict[str, Any]) -> None:
    found = door(write(*LONG, *GOOD), max_length=64, overflow=overflow).content
    assert {key: found["rows"][key] for key in counts} == counts
    assert sum(found["histograms"]["row_tokens"]["counts"]) == 9  # lengths before the cut
    door.refuses(
        "a.jsonl",
        snapshot("""\
a.jsonl:1: longer than max_length, and overflow is error
  seen:    219 tokens
  allowed: 64 tokens
  change:  raise max_length, shorten the row, or set overflow to truncate, drop or split\
"""),
        max_length=64,
        overflow="error",
    )


def test_49_whole_answers_cut(door: Door) -> None:
    found = door(write(*LONG, *GOOD), max_length=64)
    assert (found.code, found.finding("F25")["severity"]) == (3, "error")
    assert found.content["rows"]["without_label"] == 5
    door.refuses(
        write(*LONG),
        snapshot("""\
none of the 5 training rows can be used
  seen:    dropped: answer beyond max_length 5
  allowed: at least one row whose answer starts within max_length: 64 tokens
  change:  raise max_length, or shorten the prompts\
"""),
        max_length=64,
    )


def test_50_copies(door: Door) -> None:
    found = door(write(*GOOD[:1] * 20))
    assert found.content["rows"]["dropped"] == {"exact duplicate": 19}
    assert found.finding("F39")["severity"] == "error"
    door.refuses(
        "a.jsonl",
        snapshot("""\
validation_size: 0.1: the rows cannot be split into training and validation
  seen:    1 distinct rows (and 19 copies, removed) in 1 groups, the largest with 1 rows; validation needs 1 rows
  allowed: fewer rows than there are, and at least two groups; rows that share a group or are near-duplicates stay on one side
  change:  use more varied rows, a smaller validation_size, an eval_dataset, or validation_size: 0\
"""),
        validation_size=0.1,
    )
    write(*GOOD[2:], row("Other?"), name="b.jsonl")
    door.refuses(
        write(*GOOD),
        snapshot("""\
eval_dataset: 2 of 3 validation rows are equal or close to training rows
  seen:    b.jsonl:1 equals a.jsonl:3; b.jsonl:2 equals a.jsonl:4
  allowed: no row on both sides: the loss on rows seen in training says nothing about new rows
  change:  remove these rows from dataset or from eval_dataset, or remove eval_dataset to hold out rows of dataset instead\
"""),
        eval_dataset="b.jsonl",
        code=3,
    )
    split = door(write(*GOOD, *GOOD), validation_size=2).content["split"]
    assert (split["train"], split["validation"], split["exact_duplicates"], split["close_to_training"]) == (2, 2, 4, 0)


def test_51_too_few_rows(door: Door) -> None:
    door.refuses(
        write(row()),
        snapshot("""\
validation_size: 0.1: the rows cannot be split into training and validation
  seen:    1 distinct rows in 1 groups, the largest with 1 rows; validation needs 1 rows
  allowed: fewer rows than there are, and at least two groups; rows that share a group or are near-duplicates stay on one side
  change:  use more varied rows, a smaller validation_size, an eval_dataset, or validation_size: 0\
"""),
        validation_size=0.1,
    )
    door.refuses(
        write(*GOOD),
        snapshot("""\
validation_size: 4: the rows cannot be split into training and validation
  seen:    4 distinct rows in 4 groups, the largest with 1 rows; validation needs 4 rows
  allowed: fewer rows than there are, and at least two groups; rows that share a group or are near-duplicates stay on one side
  change:  use more varied rows, a smaller validation_size, an eval_dataset, or validation_size: 0\
"""),
        validation_size=4,
    )
    door.refuses(
        "a.jsonl",
        snapshot("""\
dataset: 0 rows
  seen:    a.jsonl, split train[:1%]
  change:  use a file that has rows, or another slice\
"""),
        dataset_split="train[:1%]",
    )
    Path("none.jsonl").touch()
    door.refuses(
        "a.jsonl",
        snapshot("""\
none.jsonl: the file is empty
  seen:    0 bytes\
"""),
        eval_dataset="none.jsonl",
    )
    assert door("a.jsonl", validation_size=0.01).content["split"]["validation"] == 1
    assert (
        door("a.jsonl", per_device_train_batch_size=8).content["split"]["train"] == 4
    )  # a batch of 4: losses are means
