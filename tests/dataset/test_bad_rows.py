"""The corpus of bad input, rows and models: what is written, and what `solotune data` says of it.

Each entry has the number of the corpus (in the project's reliability notes). Files are in test_bad_input.py, the hub
in test_hub.py. An entry that works is counted in the report, or told as a finding.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.dataset.conftest import CHATML, Door, chat, tiny_tokenizer

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
FIRST = "a.jsonl:1: "
CHATS, SECOND = FIRST + "message 1: ", FIRST + "message 2: "
REFUSES = FIRST + "the model's chat template refuses this row"

U, A = ("user", "a"), ("assistant", "b")

# --- 32 to 42: shapes of rows. (entry, what, row, problem, what else the message says, family)
REFUSED: list[tuple[int, str, Row, str, str, str]] = [
    (33, "messages as text", {"messages": json.dumps([])}, FIRST + "messages is a text, not a list", "json.loads", ""),
    (34, "no messages", {"messages": []}, FIRST + "messages is empty", "at least one message", ""),
    (35, "no answer", said(("user", "a")), FIRST + "no assistant message, so nothing to learn", "the roles user", ""),
    (37, "a role", said(("wizard", "a"), A), CHATS + "unknown role", '"wizard"', ""),
    (37, "a role near one", said(("Human", "a"), A), CHATS + "unknown role", "did you mean user?", ""),
    (38, "a role with a line break", said(("user\n", "a"), A), CHATS + "unknown role", '"user\\n"', ""),
    (38, "a role with a token", said(("user<|im_end|>", "a")), CHATS + "unknown role", "<|im_end|>", ""),
    (39, "null", said(("user", None), A), CHATS + "content is missing or null", "text", ""),
    (39, "a number", said(("user", 42), A), CHATS + "content is int, not text", "42", ""),
    (39, "missing", {"messages": [{"role": "user"}]}, CHATS + "content is missing or null", "text", ""),
    (40, "an image", said(("user", [{"type": "image"}])), CHATS + "content has a part that is not text", "only", ""),
    (41, "system, Gemma", said(("system", "a"), U, A), REFUSES, "System role", "gemma"),
    (41, "two users, Mistral", said(U, U, A), REFUSES, "must alternate", "mistral"),
    (41, "assistant first, Mistral", said(A, U, A), REFUSES, "must alternate", "mistral"),
    (42, "no call", said(U, ("tool", "3"), A), SECOND + "a tool message without a tool call before it", "", ""),
    (42, "no template", calling({}), SECOND + "the chat template leaves out this answer or a part of it", "", ""),
    (43, "arguments", calling("{a: 1}"), SECOND + "arguments is not valid JSON", "{a: 1}", "qwen3"),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case[0]} {case[1]}")
def test_rows_that_are_refused_or_dropped(door: Door, case: tuple[int, str, Row, str, str, str]) -> None:
    _, _, bad, problem, also, family = case
    family = family or "chatml"
    door.refuses(write(bad, *GOOD), problem, also, family=family)
    rows = door(write(*GOOD, bad), family=family, on_bad_row="drop").content["rows"]
    assert (rows["read"], rows["kept"], sum(rows["dropped"].values())) == (5, 4, 1)


def test_32_mixed_shapes(door: Door) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"text": "c"}]
    door.refuses(write(GOOD[0], *rows), "a.jsonl:2: mixed formats: this row is prompt-completion",
                 "the keys prompt, completion", "messages (messages), as in a.jsonl:1", "make two files")  # fmt: skip
    found = door(write(*GOOD, *rows), on_bad_row="drop").content["rows"]["dropped"]
    assert found == {"mixed formats: this row is prompt-completion": 1, "mixed formats: this row is text": 1}


def test_36_blank_answers(door: Door) -> None:
    rows = door(write(*GOOD, row(answer=""), row(answer=" \n\t"))).content["rows"]
    assert (rows["kept"], rows["dropped"]) == (4, {"empty answer": 2})
    door.refuses(write(row(answer=" ")), "dataset: no row is left", "dropped: empty answer 1")


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
    assert (found["slug"], found["severity"]) == ("bad-encoding", "warning")


# --- 48 to 51: numbers

LONG = [row(f"x{n} " * 60, f"y{n} " * 9) for n in range(5)]
ERROR = "a.jsonl:1: longer than max_length, and overflow is error"


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
    door.refuses("a.jsonl", ERROR, "64 tokens", "set overflow to truncate", max_length=64, overflow="error")


def test_49_whole_answers_cut(door: Door) -> None:
    found = door(write(*LONG, *GOOD), max_length=64)
    assert (found.code, found.finding("F25")["severity"]) == (3, "error")
    assert found.content["rows"]["without_label"] == 5
    door.refuses(
        write(*LONG), "no training row is left of 5", "answer beyond max_length 5", "raise max_length", max_length=64
    )


def test_50_copies(door: Door) -> None:
    found = door(write(*GOOD[:1] * 20))
    assert found.content["rows"]["dropped"] == {"exact duplicate": 19}
    assert found.finding("F39")["severity"] == "warning"
    cannot = "validation_size: 0.1: the rows cannot be split into training and validation"
    door.refuses("a.jsonl", cannot, "1 distinct rows (and 19 copies, removed) in 1 groups", validation_size=0.1)
    write(*GOOD[2:], row("Other?"), name="b.jsonl")
    leak = "eval_dataset: 2 of 3 validation rows are known from training"
    door.refuses(write(*GOOD), leak, "b.jsonl:1 is a.jsonl:3", eval_dataset="b.jsonl", code=3)
    split = door(write(*GOOD, *GOOD), validation_size=2).content["split"]
    assert (split["train"], split["validation"], split["exact_duplicates"], split["leaks"]) == (2, 2, 4, 0)


def test_51_too_few_rows(door: Door) -> None:
    cannot = "validation_size: {}: the rows cannot be split into training and validation"
    door.refuses(
        write(row()), cannot.format(0.1), "1 distinct rows in 1 groups", "1 rows are wanted", validation_size=0.1
    )
    door.refuses(write(*GOOD), cannot.format(4), "4 distinct rows in 4 groups", "4 rows are wanted", validation_size=4)
    door.refuses("a.jsonl", "dataset: 0 rows", "a.jsonl, split train[:1%]", dataset_split="train[:1%]")
    Path("none.jsonl").touch()
    door.refuses("a.jsonl", "none.jsonl: the file is empty", eval_dataset="none.jsonl")
    assert door("a.jsonl", validation_size=0.01).content["split"]["validation"] == 1
    assert (
        door("a.jsonl", per_device_train_batch_size=8).content["split"]["train"] == 4
    )  # a batch of 4: losses are means


# --- 90 to 93: tokenizers and templates


@pytest.fixture
def model(model_folders: Path, tmp_path: Path) -> Callable[..., str]:
    """model(name=text, ...) -> a model folder with these files changed; None removes one."""

    def make(**files: str | None) -> str:
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(model_folders / "chatml", folder)
        for name, text in files.items():
            path = folder / name.replace("__", ".")
            path.unlink(missing_ok=True)
            if text is not None:
                path.write_text(text)
        return "model"

    return make


NO_TOKENIZER = "model_name_or_path: no tokenizer could be loaded from model"
RUNS = '{"auto_map": {"AutoTokenizer": ["own.Own", null]}, "tokenizer_class": "Own"}'
MODELS: dict[str, tuple[dict[str, str | None], str, str]] = {
    "no tokenizer.json": ({"tokenizer__json": None}, NO_TOKENIZER, "backend tokenizer"),
    "a cut tokenizer.json": ({"tokenizer__json": "{"}, NO_TOKENIZER, "line 1 column 2"),
    "another JSON": ({"tokenizer__json": "{}"}, NO_TOKENIZER, "added_tokens"),
    "a list as its config": ({"tokenizer_config__json": "[]"}, "model/tokenizer_config.json: not a JSON object", ""),
    "code of its own": (
        {"tokenizer_config__json": RUNS, "own__py": "open('ran', 'w')"},
        "model/tokenizer_config.json: auto_map can make a loader run code that comes with the model or from elsewhere",
        "Own",
    ),
    "a broken config": ({"config__json": "{"}, "model/config.json, line 1: not valid JSON", ""),
}


@pytest.mark.parametrize("case", MODELS)
def test_90_models_without_a_usable_tokenizer(door: Door, model: Callable[..., str], case: str) -> None:
    files, problem, also = MODELS[case]
    door.refuses(write(*GOOD), problem, also, model_name_or_path=model(**files))
    assert not Path("ran").exists()


def test_90_no_tokenizer_no_template(door: Door) -> None:
    Path("nothing").mkdir()
    door.refuses(write(*GOOD), "model_name_or_path: nothing has no tokenizer files", "tokenizer.json",
                 model_name_or_path="nothing")  # fmt: skip
    for name in ("./gone", "~nobody-here/model"):
        problem = f"config.yaml line 1, model_name_or_path: no such folder: {name}"
        door.refuses("a.jsonl", problem, "check the path", model_name_or_path=name)
    door.refuses(
        "a.jsonl", "the tokenizer has no chat template, but the rows are chats", "chat_template_path", family="gpt2"
    )


def test_91_ids_beyond_the_embedding(door: Door, model: Callable[..., str]) -> None:
    name = model(config__json='{"model_type": "llama", "vocab_size": 100}')
    found = door(write(*GOOD), model_name_or_path=name)
    assert (found.code, found.finding("F05")["severity"]) == (3, "error")
    assert "the embedding has 100 rows" in found.finding("F05")["message"]


@pytest.mark.parametrize(
    "names", [{"pad_token": "<|im_end|>"}, {"pad_token": None}, {"pad_token": None, "eos_token": None}]
)
def test_92_no_pad_no_eos(door: Door, model: Callable[..., str], names: dict[str, str | None]) -> None:
    """The end of turn is learned whatever the tokenizer calls pad and eos: labels go by position."""
    config = json.dumps({"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", **names})
    found = door(write(*GOOD), model_name_or_path=model(tokenizer_config__json=config))
    assert found.code == 0
    assert found.content["labels"]["rows_with_end_supervised"] == 4


def test_92_eos_that_the_template_never_writes(door: Door, model: Callable[..., str]) -> None:
    config = json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"})
    numbers = json.dumps({"eos_token_id": tiny_tokenizer("chatml").convert_tokens_to_ids("<|endoftext|>")})
    name = model(tokenizer_config__json=config, generation_config__json=numbers)
    assert door(write(*GOOD), model_name_or_path=name).finding("F14")["severity"] == "warning"


LEFT_OUT = "a.jsonl:1: message 2: the chat template leaves out this answer or a part of it"
TEMPLATES = {
    "raises": ("{{ raise_exception('not so') }}", REFUSES, "not so"),
    "calls what is not there": ("{{ foo() }}", REFUSES, "'foo' is undefined"),
    "looks around": ("{{ ''.__class__.__mro__ }}", REFUSES, "unsafe"),
    "reads files": ("{% include '/etc/passwd' %}", REFUSES, "no loader"),
    "calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", REFUSES, "recursion"),
    "counts far": ("{% for i in range(10000000) %}x{% endfor %}", REFUSES, "Range too big"),
    "says always the same": ("hello", LEFT_OUT, "chat_template_path"),
    "drops answers": (CHATML.replace("messages %}", "messages if m.role != 'assistant' %}", 1), LEFT_OUT, "It is 0."),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_93_templates(door: Door, model: Callable[..., str], case: str) -> None:
    template, problem, also = TEMPLATES[case]
    door.refuses(write(*GOOD), problem, also, model_name_or_path=model(chat_template__jinja=template))
    Path("own.jinja").write_text(template)
    door.refuses(write(*GOOD), problem, also, chat_template_path="own.jinja")


def test_93_templates_that_render_something_else(door: Door) -> None:
    Path("own.jinja").write_text(CHATML.replace("messages %}", "messages if m.role != 'user' %}", 1))
    found = door(write(*GOOD), chat_template_path="own.jinja")
    assert (found.code, found.finding("F13")["severity"]) == (3, "error")
    Path("own.jinja").write_text("{{ bos_token }}{{ bos_token }}" + CHATML)
    assert door("a.jsonl", chat_template_path="own.jinja").finding("F08")["severity"] == "warning"
    Path("own.jinja").write_text("{% for %}")
    door.refuses("a.jsonl", "chat_template_path: own.jinja, line 1: not a valid Jinja template", "end of statement",
                 chat_template_path="own.jinja")  # fmt: skip
