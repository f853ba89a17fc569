"""`solotune init`: a config that fits model and rows, runs as it is, and gives back whatever names they have."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import solotune
from solotune import cli
from solotune.api.init import text_of
from solotune.api.propose import Proposal
from solotune.config.load import load_config
from solotune.config.run_config import RunConfig
from solotune.config.translate import translated
from solotune.config.write import to_yaml, yaml_value
from solotune.config.yaml_reader import parse, plain
from solotune.errors import InputError

YAML_WORDS = ["a  # b.jsonl", "a: b", "true", "1e5", "12:30", "null", "~", "- a", "'", '"', "\\", "{a: b}", "[a]", "&a",
              "*a", "!!int 1", "%d", "---", "...", "? a", "@a", "`a", "a\nb: c", " a ", "a\n\n  b\n", "\ufeffa", "\x85",
              "\u2028", "\t", "\x7f", "0o7", "2001-01-01", "=", "<<"]  # fmt: skip
texts = st.one_of(st.text(), st.text(alphabet="ab:#-'\"\\ \n\t{}[],&*!%@`?|>~0"), st.sampled_from(YAML_WORDS))


def rows(number: int) -> dict[str, Any]:
    return {"question": f"What is {number} + {number}?", "answer": f"It is {2 * number}."}


CHATS = [{"messages": [{"role": "user", "content": rows(n)["question"]},
                       {"role": "assistant", "content": rows(n)["answer"]}]} for n in range(60)]  # fmt: skip
FILES: dict[str, tuple[str, Any]] = {
    "messages": ("a.jsonl", CHATS),
    "sharegpt": ("a.json", [{"conversations": [{"from": "human", "value": rows(n)["question"]},
                                               {"from": "gpt", "value": rows(n)["answer"]}]} for n in range(60)]),
    "alpaca": ("a.json", [{"instruction": rows(n)["question"], "input": "", "output": rows(n)["answer"]} for n in range(60)]),
    "completions": ("a.jsonl", [{"prompt": rows(n)["question"], "completion": rows(n)["answer"]} for n in range(60)]),
    "text": ("a.jsonl", [{"text": f"Row {n} says that {rows(n)['answer']}"} for n in range(60)]),
    "own names": ("a.jsonl", [rows(n) for n in range(60)]),
    "content": ("a.jsonl", [{"content": f"Row {n} says that {rows(n)['answer']}"} for n in range(60)]),
    "dialog": ("a.jsonl", [{"dialog": row["messages"]} for row in CHATS]),
    "wrapped": ("a.json", {"data": CHATS}),
    "csv": ("a.csv", "question;answer\n" + "".join(f"{rows(n)['question']};{rows(n)['answer']}\n" for n in range(60))),
    "tsv": ("a.tsv", "prompt\tcompletion\n" + "".join(f"{rows(n)['question']}\t{rows(n)['answer']}\n" for n in range(60))),
    "parquet": ("a.parquet", [rows(n) for n in range(60)]),
}  # fmt: skip


def written(folder: Path, name: str, content: Any) -> str:
    path = folder / name
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
    elif isinstance(content, str):
        path.write_text(content)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in content) if path.suffix == ".jsonl" else json.dumps(content)
        path.write_text(lines)
    return str(path)


@pytest.fixture(scope="module")
def model(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The chat model with as many positions as real ones have."""
    folder = tmp_path_factory.mktemp("init") / "model"
    shutil.copytree(chat_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    return str(folder)


@pytest.mark.parametrize("kind", FILES)
def test_the_config_of_every_format_runs(kind: str, model: str, tmp_path: Path) -> None:
    data = written(tmp_path, *FILES[kind])
    path = solotune.init(model, data, tmp_path / "run.yaml")
    config = load_config(path)
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert 12 <= len(lines) <= 16
    assert (config.max_length, config.validation_size, config.per_device_train_batch_size) == (256, 12, 4)
    preview = solotune.data(path)
    assert preview.report.num_kept == 60
    assert [found for found in preview.report.findings or () if found["severity"] == "error"] == []


def test_values_are_fitted_to_the_rows(model: str, tmp_path: Path) -> None:
    long = [{"prompt": f"Tell me {n}.", "completion": f"{n} " + "word " * (20 + n % 90)} for n in range(1100)]
    path = solotune.init(model, written(tmp_path, "a.jsonl", long), tmp_path / "run.yaml")
    config, text = load_config(path), path.read_text()
    rendered = solotune.data(path).report.labels.row_tokens
    assert config.max_length % 64 == 0 and config.max_length - 64 < max(rendered) <= config.max_length
    assert config.validation_size == 0.05  # 55 rows
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 32
    assert "# the longest row has" in text and "rows a step" in text and "(solotune plan)" in text


def test_long_rows_leave_a_choice(model: str, tmp_path: Path) -> None:
    most = [{"prompt": f"Tell me {n}.", "completion": f"{n} word"} for n in range(300)]
    huge = [{"prompt": "all", "completion": "word " * 9000}]
    path = solotune.init(model, written(tmp_path, "a.jsonl", most + huge), tmp_path / "run.yaml")
    assert load_config(path).max_length == 256
    assert "99.7% of the rows fit" in path.read_text()


def test_bad_rows_are_dropped_if_most_are_good(model: str, tmp_path: Path) -> None:
    bad = [{"messages": [{"role": "user"}]}] * 7
    path = solotune.init(model, written(tmp_path, "a.jsonl", CHATS + bad), tmp_path / "run.yaml")
    assert load_config(path).on_bad_row == "drop" and "7 of 67 rows cannot be used" in path.read_text()
    with pytest.raises(InputError, match="most rows cannot be used"):
        solotune.init(model, written(tmp_path, "b.jsonl", CHATS[:5] + bad), tmp_path / "b.yaml")
    assert not (tmp_path / "b.yaml").exists()


def test_arguments_that_are_exchanged_or_missing_are_refused(model: str, tmp_path: Path) -> None:
    data, path = written(tmp_path, "a.jsonl", CHATS), tmp_path / "run.yaml"
    for first, second, said in (
        (data, model, "is a data file, not a model"),
        (model, model, "is a model folder, not data"),
        (str(tmp_path / "none"), data, "no such folder"),
        (model, str(tmp_path / "none.jsonl"), "no such file"),
        (model, None, "the data is missing"),
    ):
        with pytest.raises(InputError, match=said):
            solotune.init(first, second, path)
        assert not path.exists()


@pytest.mark.parametrize(("asked", "answered"), [("Frage", "Antwort"), ("Frage {kurz}", "Antwort: {lang}")])
def test_settings_that_are_given_stay_so_advice_can_be_followed(
    asked: str, answered: str, model: str, tmp_path: Path
) -> None:
    named = f"nr;{asked};{answered}\n" + "".join(f"{n};{rows(n)['question']};{rows(n)['answer']}\n" for n in range(60))
    data, path = written(tmp_path, "a.csv", named), tmp_path / "run.yaml"
    with pytest.raises(InputError) as caught:
        solotune.init(model, data, path)
    change = caught.value.change or ""
    if asked == "Frage":
        assert "for example column_mapping: {Frage: prompt, Antwort: completion}" in change
    _, *advice = shlex.split(change[change.index("solotune init") :])  # pasted into a shell
    assert cli.main([*advice, "learning_rate=1e-4", "-o", str(path)]) == 0
    config = load_config(path)
    assert config.learning_rate == 1e-4 and config.column_mapping == {asked: "prompt", answered: "completion"}
    assert solotune.data(path).report.num_kept == 60
    assert cli.main(["init", model, data, data]) == 2


def test_preference_rows_are_a_decision_of_the_user(model: str, tmp_path: Path) -> None:
    pairs = [{"prompt": f"q {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(60)]
    with pytest.raises(InputError, match="preference data"):
        solotune.init(model, written(tmp_path, "a.jsonl", pairs), tmp_path / "run.yaml")
    sides = [
        {"chosen_messages": row["messages"], "rejected_messages": row["messages"]} for row in CHATS
    ]  # LLaMA-Factory
    with pytest.raises(InputError) as caught:
        solotune.init(model, written(tmp_path, "b.jsonl", sides), tmp_path / "run.yaml")
    assert "'column_mapping={rejected_messages: ignore, chosen_messages: messages}'" in (caught.value.change or "")


def test_tools_that_the_model_cannot_be_shown_are_refused_with_a_command_that_works(model: str, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "weather", "description": "The weather of a town."}}
    calls = [
        {"from": "human", "value": "Rain?"},
        {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"town": "Kiel"}})},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "Yes."},
    ]
    chats = [[{"from": "human", "value": f"What is {n}?"}, {"from": "gpt", "value": f"It is {n}."}] for n in range(60)]
    rows = [{"conversations": one, "tools": json.dumps([tool])} for one in [*chats, *[calls] * 10]]
    data, path = written(tmp_path, "a.json", rows), tmp_path / "run.yaml"
    with pytest.raises(InputError, match="leaves out the tools definitions of 60 of 60 rows") as caught:
        solotune.init(model, data, path)
    change = caught.value.change or ""
    assert change.startswith("use a model whose chat template renders tools; or set chat_template_path to")
    _, *advice = shlex.split(change[change.index("solotune init") :])
    assert cli.main([*advice, "-o", str(path)]) == 0
    preview = solotune.data(path)
    assert not preview.is_fault and preview.report.num_kept == 60
    rows = [{"conversations": one} for one in [*chats[:20], *[[*calls, *chats[n]] for n in range(30)]]]
    with pytest.raises(InputError, match="most rows cannot be used") as caught:
        solotune.init(model, written(tmp_path, "b.json", rows), tmp_path / "b.yaml")
    assert caught.value.change == "set chat_template_path to a template that does, or remove the row"


AXOLOTL = """
base_model: {model}
datasets:
  - path: {data}
    type: chat_template
adapter: qlora
lora_r: 8
lora_alpha: 16
lora_target_linear: true
sequence_len: 512
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 2
optimizer: paged_adamw_8bit
learning_rate: 0.0001
val_set_size: 0.1
wandb_project: mine
deepspeed: zero2.json
"""


def test_a_config_of_another_tool_is_translated(model: str, tmp_path: Path) -> None:
    theirs = tmp_path / "axolotl.yml"
    theirs.write_text(AXOLOTL.format(model=model, data=written(tmp_path, "a.jsonl", CHATS)))
    path = solotune.init(source=theirs, path=tmp_path / "run.yaml")
    config, text = load_config(path), path.read_text()
    assert (config.lora_r, config.lora_alpha, config.lora_target_modules) == (8, 16, "all-linear")
    assert (config.max_length, config.num_train_epochs, config.learning_rate) == (512, 2, 1e-4)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (2, 4)
    assert (config.validation_size, config.optim, config.base_precision) == (0.1, "paged_adamw_8bit", "nf4")
    assert "# not translated: wandb_project: report_to is the setting" in text
    assert "# not translated: deepspeed: solotune trains on one device" in text


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("load_in_4bit: true", {"base_precision": "nf4"}),
        ("load_in_4bit: false", {"base_precision": "bf16"}),
        ("eval_strategy: steps\neval_steps: 9", {"eval_steps": 9}),
        ("save_strategy: epoch", {"save_strategy": "epoch"}),
    ],
)
def test_keys_that_both_have_are_translated_without_a_remark(theirs: str, ours: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "trl.yaml").write_text(theirs)
    assert translated(tmp_path / "trl.yaml") == (ours, {})


def test_all_lists_every_key(model: str, tmp_path: Path) -> None:
    data = written(tmp_path, "a.jsonl", CHATS)
    path = solotune.init(model, data, tmp_path / "run.yaml", every_key=True)
    text = path.read_text()
    assert all(f"\n# {key}:" in text or f"\n{key}:" in text for key in RunConfig.model_fields)
    assert load_config(path).max_length == 256


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts, texts, st.booleans())
@example("org/m", "a  # b.jsonl", True)
@example("a\nb: c", "'\n\n x", False)
def test_every_text_survives(tmp_path: Path, model: str, dataset: str, every_key: bool) -> None:
    try:
        config = load_config({"model_name_or_path": model, "dataset": dataset})
    except InputError:  # empty, NUL, a token: no config may hold it
        assume(False)
    found = Proposal(config, {"dataset": dataset}, [model])
    for text in (text_of(found, Path("a\nlora_r: 3\n.yaml"), every_key), to_yaml(config)):
        (tmp_path / "a.yaml").write_text(text, encoding="utf-8", newline="")
        loaded = load_config(tmp_path / "a.yaml")
        assert (loaded.model_name_or_path, loaded.dataset) == (model, dataset)
        assert loaded.model_dump() == config.model_dump()


@settings(deadline=None, max_examples=200)
@given(texts)
@example("\x85")  # in single quotes a blank
@example("?a")  # in a list a key
@example(": 0")  # a key too
def test_every_value_is_read_back(text: str) -> None:
    written = f"a: {yaml_value(text)}\nb: {yaml_value([text, text])}  # a note\n"
    assert plain(parse(written, "here")) == {"a": text, "b": [text, text]}
