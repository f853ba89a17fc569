"""bench.diagnose.fixes: what a fix says is done to the config or the rows that raised it, and the finding is gone."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.diagnose.fixes import GONE, Ask, Case, Outcome, Rows, Said, changes_in, outcomes, repaired, with_changes
from solotune.dataset import prepare
from solotune.diagnosis.facts.row_facts import RowFacts
from solotune.diagnosis.rules import judge
from solotune.errors import SolotuneError
from tests.dataset.conftest import Writer, _nothing_is_kept, config_of, tiny_tokenizer, write  # noqa: F401 - fixtures
from tests.diagnosis.rules.rows import answered, each, sentence, talk


@pytest.mark.parametrize(
    ("fix", "changes"),
    [
        (
            "max_length: 512 (enough for 95 % of the long rows), or overflow: drop to drop these rows",
            {"max_length": 512},
        ),
        ("lora_target_modules: all-linear, lora_r: 16", {"lora_target_modules": "all-linear", "lora_r": 16}),
        ("lora_target_modules: [q_proj, v_proj]", {"lora_target_modules": ["q_proj", "v_proj"]}),
        ("remove eval_dataset, and set validation_size: 0.05", {"eval_dataset": GONE, "validation_size": 0.05}),
        ("warmup_ratio: 0.03 and remove warmup_steps", {"warmup_ratio": 0.03, "warmup_steps": GONE}),
        ("remove `chat_template_path: a.jinja`, or end answers with {{ eos_token }}", {"chat_template_path": GONE}),
        ("init_lora_weights: true (PEFT)", {}),
        ("in TRL packing_strategy: bfd", {}),
        ("export the data again, and read and write it as UTF-8", {}),
        ("shuffle: true", {}),
    ],
)
def test_a_fix_is_the_keys_that_it_begins_with(fix: str, changes: dict[str, Any]) -> None:
    assert changes_in(fix) == changes


def test_a_key_that_is_removed_takes_its_rows_along() -> None:
    case = with_changes(Case({"eval_dataset": "b", "max_length": 8}, [{}], [{}]), {"eval_dataset": GONE, "seed": 1})
    assert case == Case({"max_length": 8, "seed": 1}, [{}], [])


def test_a_fix_that_does_not_work_is_seen() -> None:
    case = Case({"max_length": 8}, [], [])

    def ask(case: Case) -> list[Said]:
        if case.config["max_length"] < 32:
            return [Said("F25", True, "max_length: 16"), Said("F20", False, "a person's work")]
        return [Said("F42", True, "max_length: 8")]

    assert [one.result for one in outcomes(case, ask)] == ["stays", "by hand"]
    told = [Said("F25", True, "max_length: 64")]
    assert [
        one.result for one in outcomes(case, lambda case: ask(case) if case.config["max_length"] > 8 else told)
    ] == ["brings F42"]
    assert [one.result for one in outcomes(case, lambda c: told if c.config["max_length"] == 8 else [])] == ["works"]
    assert not Outcome(*told[0], "by hand").is_wrong and Outcome(*told[0], "stays").is_wrong


def asking(write: Writer, tokenizer: Any) -> Ask:  # noqa: F811 - the fixture
    """The rules on rows, asked of a config with its rows."""
    count = 0

    def ask(case: Case) -> list[Said]:
        nonlocal count
        count += 1
        keys = dict(case.config)
        if "eval_dataset" in keys:
            keys["eval_dataset"] = str(write(f"{count}-eval.jsonl", *case.held_out))
        try:
            config = config_of(write(f"{count}.jsonl", *case.train), **keys)
            prepared = prepare(config, tokenizer)
        except SolotuneError as error:
            return [Said(error.fault or "refused", True, error.change or "")]
        found = judge(RowFacts.of_config(config, tokenizer, prepared.train, prepared.validation, prepared.report))
        return [Said(one.code, one.severity == "error", one.fix) for one in found if one.severity != "info"]

    return ask


def _long_prompts(rows: Rows) -> Rows:
    rng = random.Random(1)
    return each(rows, lambda n, chat: [{**chat[0], "content": sentence(rng, 120)}, chat[1]] if n % 2 else chat)


def _mojibake(rows: Rows) -> Rows:
    return answered(rows, lambda n, text: f"{text} Voilà, déjà à Łódź é".replace("Ł", "L").encode().decode("latin-1"))


def _exchanged(rows: Rows) -> Rows:
    other = {"user": "assistant", "assistant": "user"}
    return each(rows, lambda n, chat: [{**one, "role": other[one["role"]]} for one in chat])


def _users_in_a_row(rows: Rows) -> Rows:
    return each(rows, lambda n, chat: [{"role": "user", "content": "A question for you."}, *chat])


def _pairs(rows: Rows) -> Rows:
    return [{"prompt": row["messages"][0]["content"], "completion": row["messages"][1]["content"]} for row in rows]


CASES: dict[str, tuple[Callable[[Rows], Rows], Callable[[Rows], Rows] | None, dict[str, Any]]] = {
    "F24": (lambda rows: rows, None, {"max_length": 100}),
    "F25": (_long_prompts, None, {"max_length": 256}),
    "F34": (lambda rows: answered(rows, lambda n, text: text if n % 3 else ""), None, {}),
    "F35": (lambda rows: answered(rows, lambda n, text: "Always this." if n % 10 else text), None, {}),
    "F36": (_users_in_a_row, None, {}),
    "F36 exchanged": (_exchanged, None, {}),
    "F37": (_mojibake, None, {}),
    "F12": (_pairs, None, {}),
    "F43": (lambda rows: rows, lambda rows: rows[:20], {}),
    "F44 near": (lambda rows: rows, lambda rows: answered(rows[:20], lambda n, text: f"{text[:-1]} so."), {}),
    "F48": (lambda rows: rows * 2, None, {"validation_size": 3, "dataset_exact_deduplication": False}),
    "F48 file": (lambda rows: rows, lambda rows: talk(3, seed=9), {}),
}
"""What raises the finding: the rows, the held-out rows, keys."""


@pytest.mark.parametrize("name", CASES)
def test_every_fix_of_a_finding_on_rows_works(name: str, write: Writer, tmp_path: Path) -> None:  # noqa: F811
    train, held_out, keys = CASES[name]
    rows = talk(160)
    config = {"eval_dataset": "eval.jsonl"} if held_out else {"validation_size": 0.25}
    case = Case(config | keys, train(copy.deepcopy(rows)), held_out(copy.deepcopy(rows)) if held_out else [])
    found = list(outcomes(case, asking(write, tiny_tokenizer("chatml"))))
    assert name.split()[0] in [one.code for one in found]
    assert [one for one in found if one.is_wrong] == []


def test_data_are_repaired_as_the_fix_says() -> None:
    said = Said("F36", True, "swap the roles user and assistant")
    exchanged = repaired(Case({}, _exchanged(talk(3)), []), said)
    assert exchanged is not None and exchanged.train == talk(3)
    assert repaired(Case({}, [], []), Said("F38", True, "join prompts and answers again")) is None
    texts = [{"text": "USER: how many? BOT: two"}]
    assert repaired(Case({}, texts, []), Said("F12", True, 'give each row as {"messages": [...]}')) is None
