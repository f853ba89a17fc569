"""bench.diagnose's configs in which nothing is wrong: they are many, they ask what they say, and mistakes are counted."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from bench.diagnose import report, score, templated_configs
from bench.diagnose.configs import ConfigProgram, as_jsonl
from bench.diagnose.real_configs import programs as real_programs
from bench.diagnose.templated import TASKS, rows
from tests import tiny

SPARE_ROWS = 2200
"""As many as the largest variant needs."""


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_rows_enough_and_the_same_for_a_seed(name: str) -> None:
    asked = rows(TASKS[name], SPARE_ROWS, random.Random(3))
    assert len({prompt for prompt, _ in asked}) == SPARE_ROWS
    assert all(answer.strip() for _, answer in asked)
    assert rows(TASKS[name], 50, random.Random(3)) == asked[:50]
    assert rows(TASKS[name], 50, random.Random(4)) != asked[:50]


def test_a_label_can_be_far_more_common_than_others() -> None:
    answers = [answer for _, answer in rows(TASKS["sentiment"], 400, random.Random(0), imbalance=0.9)]
    assert answers.count("positive") > 340
    assert set(answers) == {"positive", "negative", "neutral", "mixed"}


def test_a_task_with_too_few_prompts_says_so() -> None:
    with pytest.raises(ValueError, match="only"):
        rows(TASKS["unit_conversion"], 10**4, _Stuck())


class _Stuck(random.Random):
    """Always the same number."""

    def random(self) -> float:
        return 0.5

    def getrandbits(self, k: int, /) -> int:
        return 0


def test_there_are_configs_of_every_task_and_at_least_60_over_real_files(tmp_path: Path) -> None:
    (tmp_path / "chitchat.jsonl").touch()
    for name in ("llama3", "qwen3"):
        (tmp_path / "tokenizers" / name).mkdir(parents=True)
    templated = templated_configs.programs(tmp_path / "tokenizers")
    real = real_programs(tmp_path)
    every = [*real, *templated]
    assert len({one.name for one in every}) == len(every) >= 180
    assert len([one for one in real if one.is_before]) >= 60
    assert {one.base for one in real} == {"smollm2", "llama3", "qwen3"}
    assert any(not one.is_before for one in real)
    assert {one.title.split(",")[0] for one in templated if one.is_before} == set(TASKS)
    assert {one.title for one in templated if not one.is_before} == set(TASKS)


def test_without_real_data_only_tasks_are_left(tmp_path: Path) -> None:
    assert real_programs(tmp_path) == []
    assert {one.base for one in templated_configs.programs(tmp_path) if one.is_before} == {"smollm2"}


def test_held_out_rows_of_a_variant_are_other_rows_in_the_same_shape(tmp_path: Path) -> None:
    variant = next(one for one in templated_configs.VARIANTS if one.held_out and one.prefix)
    keys = templated_configs.files_of(TASKS["reports"], variant)(tmp_path)
    train, held_out = (
        {json.dumps(json.loads(line)) for line in Path(keys[key]).read_text().splitlines()}
        for key in ("dataset", "eval_dataset")
    )
    assert (len(train), len(held_out)) == (variant.count, variant.held_out)
    assert not train & held_out
    assert all(TASKS["reports"].system in row for row in train | held_out)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A program over these rows, with a tiny model."""
    import transformers

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model"
    transformers.AutoModelForCausalLM.from_config(tiny.FAMILIES["llama"]()).save_pretrained(model)
    tiny.save_tokenizer(model)
    monkeypatch.setattr(ConfigProgram, "model", lambda self: model)

    def made(chats: list[dict[str, Any]], **keys: Any) -> ConfigProgram:
        def files(folder: Path) -> dict[str, Any]:
            return {"dataset": as_jsonl(folder / "rows.jsonl", chats)}

        return ConfigProgram("x", "tiny", "real", files, {"max_length": 64, **keys})

    return made


def test_both_commands_are_asked_of_the_same_rows(program: Any, tmp_path: Path) -> None:
    found, also = program(tiny.chat_rows(60)).asked(tmp_path, 0)
    assert found.verdict == "healthy"
    assert also["data_faults"] == []
    silent = [
        {"messages": [{"role": "user", "content": f"twice {n}"}, {"role": "assistant", "content": "?"}]}
        for n in range(60)
    ]
    found, also = program(silent).asked(tmp_path, 0)
    assert found.verdict == "fault"
    assert also["data_faults"] == ["F35"]
    assert any("F35 error" in said for said in also["data_messages"])


def test_a_refusal_is_a_fault_of_the_data_command(program: Any, tmp_path: Path) -> None:
    found, also = program([{"messages": [{"role": "user", "content": "hi"}]}] * 3).asked(tmp_path, 0)
    assert found.verdict != "healthy"
    assert also["data_faults"] and also["data_messages"][0].startswith("refused:")


def result(verdict: str, name: str = "x/before", kind: str = "real", **parts: Any) -> dict[str, Any]:
    return {"program": name, "kind": kind, "truth": [], "verdict": verdict, "named": [], "remarks": [], **parts}


RESULTS = [
    result("healthy", data_faults=[]),
    result("healthy", data_faults=["F24"], remarks=[("F44", "3 of 25 rows", 0.12)]),
    result("undecided", data_faults=[]),
    result("fault", data_faults=[], named=["F21"], evidence=[["14 rows"]], remarks=[("F44", "2 rows", None)]),
    result("fault", "x", "templated", monitor_verdict="fault", named=["F21"], evidence=[["9 rows"]]),
    result("healthy", "x", "templated", monitor_verdict="fault"),
    result("healthy", "x", "templated", monitor_verdict="undecided"),
]


def test_scores_of_configs_count_verdicts_and_commands_that_disagree() -> None:
    found = score.ordinary_scores(RESULTS[:4])
    assert found == {
        "programs": 4,
        "healthy": 1,
        "healthy, with remarks": 1,
        "undecided": 1,
        "fault": 1,
        "failed": 0,
        "healthy, share": 0.5,
        "commands disagree": 2,
        "undecided at the end of train": 0,
    }
    assert score.ordinary_scores(RESULTS)["undecided at the end of train"] == 1
    assert [score.disagrees(one) for one in RESULTS[4:]] == [False, True, False]


def test_rules_that_accuse_most_come_first_each_with_a_message() -> None:
    found = score.by_rule(RESULTS)
    assert list(found) == ["F21", "F44"]
    assert found["F21"] == {"accused": 2, "remarked": 0, "says": {"accused": "14 rows"}}
    assert found["F44"]["remarked"] == 2


def test_the_page_gets_their_section_and_keeps_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "diagnose.md").write_text("# Page\n\nfaults\n")
    healthy = {"program": "healthy/clean/base", "truth": [], "verdict": "healthy", "named": []}
    faulty = {"program": "F10/x/base", "truth": ["F10"], "verdict": "fault", "named": ["F10"]}
    (tmp_path / "diagnose.jsonl").write_text(f"{json.dumps(healthy)}\n{json.dumps(faulty)}\n")
    report.write_ordinary(RESULTS, 60.0)
    first = (tmp_path / "diagnose.md").read_text()
    assert first.startswith("# Page\n\nfaults\n") and first.count(report.HEADING) == 1
    assert "Of all 8 healthy programs of this benchmark, 2 are called faulty, 25.0%." in first
    assert "14 rows" in first and "`data` says no fault." in first and "`train` accuses." in first
    counts = report.write_ordinary(RESULTS[:1], 60.0)  # those before training, again: the trained ones stay
    second = (tmp_path / "diagnose.md").read_text()
    assert second.count(report.HEADING) == 1 and "faults\n" in second
    assert counts["real, before training"]["programs"] == 1 and counts["templated, trained"]["programs"] == 3
    assert "Of all 5 healthy programs" in second
